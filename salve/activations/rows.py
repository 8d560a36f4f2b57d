# SPDX-License-Identifier: MIT
"""Feed activations to a training, in batches or in blocks of batches, from memory or from disk."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from salve.activations import AnyRows
from salve.activations.schedule import Schedule, pass_seed
from salve.distributed import RankBatches, RunBlocks, rank_and_world_size

#: Bytes of activations in a block from memory.
BLOCK_BYTES = 64 * 2**20
#: Bytes of a run of rows read from disk: few enough for many runs per block, enough to make seeks cheap.
RUN_BYTES = 64 * 2**10


class Block(NamedTuple):
    """Several consecutive batches: their rows ``[B, M]`` and the number of rows of each batch."""

    rows: Tensor
    sizes: tuple[int, ...]


class Blocks:
    """Batches of row indices for the steps of a Trainer epoch, a block of batches at a time.

    With W ranks, rank r yields the rows ``r::W`` of each batch.

    Args:
        data: knows the steps and their order. block_rows: rows of a block, which holds at least one batch.
    """

    def __init__(self, data: "ActivationsData", block_rows: int) -> None:
        self._data, self._size = data, data.schedule.batch_size
        self._batches = max(1, block_rows // self._size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        rank, ranks = rank_and_world_size()
        data, steps = self._data, self._data.steps_at_hand
        for start in range(steps.start, steps.stop, self._batches):
            order = data.schedule.order(data.seed, range(start, min(start + self._batches, steps.stop)))
            yield [batch[rank::ranks] for batch in order.split(self._size)]


class StoredBlocks:
    """As :class:`Blocks`, for rows on disk, in an order with few seeks: see :class:`salve.distributed.RunBlocks`.

    Rows of a block that fill no whole batch begin the next block.

    Args:
        data: knows the steps. block: rows shuffled at a time, a multiple of the batch size.
    """

    def __init__(self, data: "ActivationsData", block: int) -> None:
        self._data, self._size = data, data.schedule.batch_size
        self._passes = run_blocks(data.train, self._size, block)

    def __iter__(self) -> Iterator[list[Tensor]]:
        rank, ranks = rank_and_world_size()
        left = torch.empty(0, dtype=torch.long)
        for rows in self._rows():
            left = torch.cat([left, rows])
            whole, left = left.split([len(left) - len(left) % self._size, len(left) % self._size])
            if len(whole):
                yield [batch[rank::ranks] for batch in whole.split(self._size)]

    def _rows(self) -> Iterator[Tensor]:
        """The rows of the epoch's steps, block by block."""
        data = self._data
        for number, first, last in data.schedule.spans(data.steps_at_hand):
            at = 0
            for block in self._passes.blocks(pass_seed(data.seed, number)):
                yield block[max(0, first - at) : max(0, last - at)]
                at += len(block)
                if at >= last:
                    break


class Rows(Dataset[Tensor]):
    """A dataset of the rows of tensors of equal length, fetched a batch at a time instead of row by row."""

    def __init__(self, *tensors: AnyRows) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The hook with which a DataLoader fetches a whole batch by one indexing operation."""
        rows = torch.as_tensor(indices, dtype=torch.long)  # an empty list would become float
        return tuple(tensor[rows] for tensor in self.tensors)


class _Loads(IterableDataset[Block]):
    """Rows of a tensor, a block at a time, in the order of a sampler; how many blocks there are may change."""

    def __init__(self, rows: AnyRows, order: Iterable[list[Tensor]]) -> None:
        self._rows, self._order = rows, order

    def __iter__(self) -> Iterator[Block]:
        for batches in self._order:
            yield Block(self._rows[torch.cat(batches)], tuple(len(batch) for batch in batches))


def rows_loader(
    *tensors: AnyRows, batch_size: int, shuffle: bool = False, weights: Sequence[float] | None = None
) -> DataLoader[Any]:
    """A DataLoader over the rows of tensors, a batch at a time; a rank's part of a batch may be empty.

    Args:
        tensors: of equal length. batch_size: over all ranks. shuffle, weights: see :class:`RankBatches`.
    """
    rows = Rows(*tensors)
    batches = RankBatches(len(rows), batch_size, shuffle, weights=weights)
    return DataLoader(rows, batch_sampler=batches, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


def run_blocks(rows: AnyRows, batch_size: int, block: int) -> RunBlocks:
    """The order in which an epoch reads rows ``[N, M]`` from disk, with runs of :data:`RUN_BYTES`."""
    return RunBlocks(len(rows), batch_size, block, max(1, RUN_BYTES // (4 * rows.shape[1])))


class StreamedBatches:
    """Batches of rows read from disk a block at a time, in the order of :class:`salve.distributed.RunBlocks`.

    Args:
        tensors: of equal length; the first are activations on disk.
        batch_size: rows of a batch over all ranks.
        block: rows read and shuffled at a time, a multiple of ``batch_size``.
    """

    def __init__(self, *tensors: AnyRows, batch_size: int, block: int) -> None:
        self._tensors, self._steps = tensors, -(-len(tensors[0]) // batch_size)
        self._blocks = run_blocks(tensors[0], batch_size, block)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batches in self._blocks:
            rows, sizes = torch.cat(batches), [len(batch) for batch in batches]
            yield from zip(*(tensor[rows].split(sizes) for tensor in self._tensors), strict=True)


class ActivationsData(pl.LightningDataModule):
    """Activations as a DataModule: training rows, and validation rows with their labels.

    The training's steps are divided into ``max_epochs`` equal parts, and a Lightning epoch is one part. So the number
    of validations does not depend on the number of rows.

    Args:
        train: ``[N, M]``. val: ``[N', M]``. val_labels: ``[N']``.
        schedule: of the training.
        seed: of the order of rows.
        block: for rows on disk, the number shuffled at a time, a multiple of the batch size; None for rows in memory.
    """

    def __init__(
        self,
        train: AnyRows,
        val: AnyRows,
        val_labels: Tensor,
        schedule: Schedule,
        seed: int = 0,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.val_labels = train, val, val_labels
        self.schedule, self.seed, self.block = schedule, seed, block

    @property
    def steps_at_hand(self) -> range:
        """The steps of the Trainer's current epoch; all steps without a Trainer."""
        if self.trainer is None:
            return range(self.schedule.steps)
        # Not from the Trainer's epoch, which is not yet restored when the first batch after a checkpoint is drawn.
        return self.schedule.part_after(self.trainer.global_step, int(self.trainer.max_epochs or 1))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled rows, a :class:`Block` at a time."""
        at_once = BLOCK_BYTES // (4 * self.train.shape[1])
        order = StoredBlocks(self, self.block) if self.block else Blocks(self, at_once)
        return DataLoader(_Loads(self.train, order), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows with labels, in order."""
        return rows_loader(self.val, self.val_labels, batch_size=max(self.schedule.batch_size, 4096))


class WholeData(ActivationsData):
    """As :class:`ActivationsData`, for an ensemble: a training batch is the whole split ``[N, M]``, in order."""

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch of all rows; each member draws its own order from it."""
        whole: Any = [self.train]
        return DataLoader(whole, batch_size=None)
