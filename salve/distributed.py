# SPDX-License-Identifier: MIT
"""Batches over several ranks: each rank takes a part, and together the parts are the batch of a single device.

A row's random draws, such as its augmentation, depend only on the epoch and the row, not on the process that loads it
or on what it loaded before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import (
    BatchSampler,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

T = TypeVar("T")
R = TypeVar("R")

#: The CPU's generator uses 32 bits of a seed.
_SEEDS = 2**32


class Ranks(Protocol):
    """Call a function on every rank at once; see :class:`salve.processes.ranks.Ranks`."""

    @property
    def several(self) -> bool: ...

    @property
    def devices(self) -> list[torch.device]: ...

    def __call__(self, work: Callable[..., Any], /, *args: Any) -> Any: ...


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside a process group, and in :func:`alone`."""
    if distributed.is_available() and distributed.is_initialized() and not _alone.get():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def alone() -> Iterator[None]:
    """In this context the batches of a rank are whole, as if there were no other."""
    reset = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(reset)


_alone = ContextVar("_alone", default=False)


def divided(work: Callable[[T], R], parts: Sequence[T], advance: Callable[[int], None] = lambda _: None) -> list[R]:
    """``[work(part) for part in parts]``, divided among the ranks; every rank gets all results.

    Args:
        work: does a part without other ranks. parts: the same on each rank.
        advance: called with the number of parts done, on all ranks together, for a progress bar.
    """
    rank, ranks = rank_and_world_size()
    own = []
    with alone():
        for place in range(rank, len(parts), ranks):
            own.append(work(parts[place]))
            advance(min(ranks, len(parts) - place))
    if ranks == 1:
        return own
    by_rank: list[Any] = [None] * ranks
    group: Any = distributed.new_group(backend="gloo")  # NCCL would need a GPU to meet
    distributed.all_gather_object(by_rank, own, group)
    return [by_rank[place % ranks][place // ranks] for place in range(len(parts))]


class OnLeader:
    """A function that does nothing on the other ranks, to which it is sent: the leader shows the progress."""

    def __init__(self, function: Callable[[int], None] = lambda _: None) -> None:
        self._function = function

    def __call__(self, count: int) -> None:
        self._function(count)

    def __reduce__(self) -> tuple[type["OnLeader"], tuple[()]]:
        return OnLeader, ()


class RankBatches(Sampler[list[int]]):
    """Batches of indices; with W ranks, rank r yields the rows ``r::W`` of each.

    With one rank they equal the batches of a ``DataLoader`` with the same arguments and random state. All ranks must
    have the same random state when they start to iterate, so that they draw the same order. Every rank yields the same
    number of lists, the last of which may be empty. No row is repeated or left out.

    Args:
        n: number of rows. batch_size: rows of a batch over all ranks.
        shuffle: in an order drawn from torch's global generator.
        drop_last: leave out an incomplete last batch.
        weights: with shuffle, draw ``n`` rows with replacement, each in proportion to its weight; a row may then be
            repeated or left out.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        weights: Sequence[float] | None = None,
    ) -> None:
        rows = range(n)
        order: Sampler[int] = RandomSampler(rows) if shuffle else SequentialSampler(rows)
        if shuffle and weights is not None:
            order = WeightedRandomSampler(weights, n)
        self._batches = BatchSampler(order, batch_size, drop_last)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        # Not in __init__: a loader may be made before the process group.
        rank, ranks = rank_and_world_size()
        for batch in self._batches:
            yield batch[rank::ranks]


class RunBlocks(Sampler[list[Tensor]]):
    """Batches of shuffled indices for rows on disk, a block of batches at a time, with few seeks.

    Rows 0…n−1 are cut into runs of neighbours, and the runs are shuffled. A block holds the next runs, and shuffles
    their rows into batches. So batches are random samples, in whatever order the rows are stored. Each epoch draws a
    new order from torch's global generator. With W ranks, rank r yields the rows ``r::W`` of each batch.

    Args:
        n: number of rows. batch_size: rows of a batch over all ranks.
        block: rows of a block, a multiple of ``batch_size``.
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
        """The indices of each block of an epoch, over all ranks, in the order of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(-(-self._n // self._run), generator=generator) * self._run
        stop = (first + self._run).clamp(max=self._n)
        end = (stop - first).cumsum(0)  # of each run, in the order of the epoch
        for start in range(0, self._n, self._block):
            at = torch.arange(start, min(start + self._block, self._n))
            run = torch.searchsorted(end, at, right=True)
            rows = stop[run] - (end[run] - at)
            yield rows[torch.randperm(len(rows), generator=generator)]


class DrawnBatches(Sampler[list[tuple[int, int]]]):
    """Batches of ``(index, seed)`` for :class:`DrawnItems`; the seeds change every epoch.

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
    """A dataset whose random draws depend on a seed alone: ``items[index, seed]``.

    Args:
        items: a dataset that draws from torch's global generator, whose state is restored.
    """

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
            return self._items[index]


def total(rows: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; itself without a process group. Every rank must call this."""
    _, ranks = rank_and_world_size()
    if ranks == 1:
        return rows
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    summed = rows.detach().clone() if device is None else rows.detach().to(device)
    distributed.all_reduce(summed)
    return summed.to(rows.device)


def batch_share(n_local: int) -> float:
    """The factor ``W · n_local / n_global`` on a rank's mean loss; 1.0 without a process group.

    DDP averages gradients over the W ranks. With this factor the average is the gradient of the mean over the whole
    batch, however its rows are distributed. Every rank must call this for every batch, with the number of its own rows.
    """
    _, ranks = rank_and_world_size()
    if ranks == 1:
        return 1.0
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    n_global = torch.tensor(n_local, device=device)
    distributed.all_reduce(n_global)
    return ranks * n_local / int(n_global)
