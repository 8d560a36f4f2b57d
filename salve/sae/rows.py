"""Activations on their way into a training."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from salve.backbones import AnyRows
from salve.data.ranks import RankBatches, RunBlocks, place

#: Bytes of activations that a training gets at a time.
BLOCK_BYTES = 64 * 2**20
#: Bytes that are read from one place of a disk: few, so that a block has many runs; not so few that seeking takes long.
RUN_BYTES = 64 * 2**10


class Block(NamedTuple):
    """Many batches of a training at once: rows ``[B, M]``, and how many of them belong to each batch, in order."""

    rows: Tensor
    sizes: tuple[int, ...]


class Blocks(Sampler[list[Tensor]]):
    """Batches of indices in an order drawn from torch's global generator, a block of batches at a time.

    With W ranks, rank r yields rows ``r::W`` of each batch. The draws are those of a ``DataLoader`` that shuffles.

    Args:
        n: rows to draw from. batch_size: rows of a batch over all ranks. block_rows: of a block; at least one batch.
    """

    def __init__(self, n: int, batch_size: int, block_rows: int) -> None:
        self._n, self._batch_size = n, batch_size
        self._block = batch_size * max(1, block_rows // batch_size)

    def __len__(self) -> int:
        return -(-self._n // self._block)

    def __iter__(self) -> Iterator[list[Tensor]]:
        rank, ranks = place()
        order = torch.tensor(list(RandomSampler(range(self._n))))
        for block in order.split(self._block):
            yield [batch[rank::ranks] for batch in block.split(self._batch_size)]


class Rows(Dataset[Tensor]):
    """The rows of one or more tensors of equal length, fetched a batch at a time instead of row by row."""

    def __init__(self, *tensors: AnyRows) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """What DataLoader asks for: the whole batch in one indexing operation."""
        rows = torch.as_tensor(indices, dtype=torch.long)  # an empty list has no type of its own
        return tuple(tensor[rows] for tensor in self.tensors)


class _Gathered(Dataset[Block]):
    """Rows of a tensor, a block at a time."""

    def __init__(self, rows: AnyRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, batch: Tensor) -> Block:
        return self.__getitems__([batch])

    def __getitems__(self, batches: list[Tensor]) -> Block:
        """What DataLoader asks for: all batches in one indexing operation."""
        return Block(self._rows[torch.cat(batches)], tuple(len(batch) for batch in batches))


def rows_loader(*tensors: AnyRows, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """A DataLoader over tensor rows without per-row work; a rank gets its part of each batch, which may be empty."""
    rows = Rows(*tensors)
    return DataLoader(rows, batch_sampler=RankBatches(len(rows), batch_size, shuffle), collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


def run_blocks(rows: AnyRows, batch_size: int, block: int) -> RunBlocks:
    """The order in which an epoch reads rows ``[N, M]`` from disk; see :class:`salve.data.ranks.RunBlocks`."""
    return RunBlocks(len(rows), batch_size, block, max(1, RUN_BYTES // (4 * rows.shape[1])))


class StreamedBatches:
    """Batches of rows that are read a block at a time, in an order of :class:`salve.data.ranks.RunBlocks`.

    Args:
        tensors: of equal length; the first are activations on disk. batch_size: rows of a batch over all ranks.
        block: rows that are read and shuffled at a time, a multiple of it.
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

    Args:
        train: ``[N, M]``. val: ``[N', M]``. val_labels: ``[N']``. batch_size: rows per step.
        block: rows that are shuffled at a time if they are read from disk, a multiple of ``batch_size``; None if they
            are in memory.
    """

    def __init__(
        self, train: AnyRows, val: AnyRows, val_labels: Tensor, batch_size: int, block: int | None = None
    ) -> None:
        super().__init__()
        self.train, self.val, self.val_labels = train, val, val_labels
        self.batch_size, self.block = batch_size, block

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.train) // self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled rows, a :class:`Block` at a time."""
        if self.block:
            sampler: Any = run_blocks(self.train, self.batch_size, self.block)
        else:
            sampler = Blocks(len(self.train), self.batch_size, BLOCK_BYTES // (4 * self.train.shape[1]))
        return DataLoader(_Gathered(self.train), batch_sampler=sampler, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows with labels, in order."""
        return rows_loader(self.val, self.val_labels, batch_size=max(self.batch_size, 4096))


class EpochsData(ActivationsData):
    """Activations for an ensemble: a training batch is the whole split ``[N, M]``, in order."""

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch; each member has its own order of rows."""
        whole: Any = [self.train]
        return DataLoader(whole, batch_size=None)
