"""One batch over several processes: every rank takes its part, and the parts together are the batch of one device.

What is random about a row, such as its augmentation, depends on the epoch and the row alone: not on the process that
loads it, nor on what that process loaded before.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler, SequentialSampler

#: The CPU's generator tells seeds apart by 32 bits.
_SEEDS = 2**32


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) outside a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class RankBatches(Sampler[list[int]]):
    """Batches of indices; with W ranks, rank r yields rows ``r::W`` of each.

    Alone, these are the batches that a ``DataLoader`` makes of the same arguments, by the same random draws. All
    ranks must have the same random state when they start to iterate; then they draw the same order. Every rank yields
    equally many lists, the last of which may be empty. No row is repeated and none left out.

    Args:
        n: rows to draw from. batch_size: rows of a batch over all ranks. shuffle: in an order drawn from torch's
            global generator. drop_last: leave out an incomplete last batch.
    """

    def __init__(self, n: int, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> None:
        rows = range(n)
        order: Sampler[int] = RandomSampler(rows) if shuffle else SequentialSampler(rows)
        self._batches = BatchSampler(order, batch_size, drop_last)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        # Asked for here, not in __init__: a loader may be made before the ranks are.
        rank, ranks = rank_and_world_size()
        for batch in self._batches:
            yield batch[rank::ranks]


class RunBlocks(Sampler[list[Tensor]]):
    """Batches of shuffled indices, a block of batches at a time, for which few places of a disk are read.

    Rows 0…n−1 are cut into runs of neighbours. A block takes the next runs in random order, and its batches all its
    rows in random order: they are a sample from everywhere, whatever order the rows are stored in. Each epoch draws
    anew from torch's global generator; with W ranks, rank r yields rows ``r::W`` of each batch.

    Args:
        n: rows to draw from. batch_size: rows of a batch over all ranks. block: rows of a block, a multiple of it.
        run: rows of a run.
    """

    def __init__(self, n: int, batch_size: int, block: int, run: int) -> None:
        self._n, self._batch_size, self._block, self._run = n, batch_size, block, run

    def __len__(self) -> int:
        return -(-self._n // self._block)

    def __iter__(self) -> Iterator[list[Tensor]]:
        rank, ranks = rank_and_world_size()
        for rows in self.blocks(int(torch.randint(_SEEDS, ()))):
            yield [batch[rank::ranks] for batch in rows.split(self._batch_size)]

    def blocks(self, seed: int) -> Iterator[Tensor]:
        """The indices of each block of an epoch, of all ranks, in an order drawn with a seed of its own."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(-(-self._n // self._run), generator=generator) * self._run
        stop = (first + self._run).clamp(max=self._n)
        end = (stop - first).cumsum(0)  # of each run, counted in the order of the epoch
        for start in range(0, self._n, self._block):
            at = torch.arange(start, min(start + self._block, self._n))
            run = torch.searchsorted(end, at, right=True)
            rows = stop[run] - (end[run] - at)
            yield rows[torch.randperm(len(rows), generator=generator)]


class DrawnBatches(Sampler[list[tuple[int, int]]]):
    """Batches of ``(index, seed)`` for :class:`DrawnItems`, with other seeds in every epoch.

    Args:
        batches: batches of indices.
    """

    def __init__(self, batches: RankBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = int(torch.randint(_SEEDS, ()))
        for batch in self._batches:
            yield [(index, (epoch + index) % _SEEDS) for index in batch]


class DrawnItems(Dataset[Any]):
    """Items whose random draws come from a seed: ``items[index, seed]``.

    Args:
        items: draws from torch's global generator, which stays as it was.
    """

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
            return self._items[index]


def batch_share(n_local: int) -> float:
    """``W · n_local / n_global``, by which a rank's mean loss is multiplied; 1.0 without a process group.

    DDP averages gradients over the W ranks. With this factor the average is the gradient of the mean over the whole
    batch, however its rows are spread. Every rank must call it for every batch, with the number of its own rows.
    """
    _, ranks = rank_and_world_size()
    if ranks == 1:
        return 1.0
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    n_global = torch.tensor(n_local, device=device)
    distributed.all_reduce(n_global)
    return ranks * n_local / int(n_global)
