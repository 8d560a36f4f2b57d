"""How an SAE's training goes, in optimiser steps: at what pace, and over which rows, whatever their number."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

#: A latent is dead when it has not fired for so large a share of the training, if there are more rows than that.
PATIENCE = 1 / 20


def pass_seed(seed: int, number: int) -> int:
    """What the order of rows in a pass is drawn with."""
    return seed * 100_003 + number


@dataclass(frozen=True)
class Schedule:
    """A training of ``steps`` steps over ``rows`` rows, ``batch_size`` at a time, pass after pass without replacement.

    Every step has a whole batch: one that a pass has too few rows left for begins the next pass. So a step is the same
    whatever the number of rows; with fewer rows than a batch, all of them are a batch.

    Args:
        rows: ``N``. batch_size: rows of a step, over all ranks; more than there are become all.
        steps: optimiser steps.
    """

    rows: int
    batch_size: int
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", min(self.batch_size, self.rows))

    @classmethod
    def of_epochs(cls, rows: int, batch_size: int, epochs: float) -> "Schedule":
        """As many steps as so many passes take."""
        return cls(rows, batch_size, max(1, math.ceil(epochs * rows / min(batch_size, rows))))

    @property
    def passes(self) -> float:
        """How often each row is seen, on average."""
        return self.steps * self.batch_size / self.rows

    def part(self, number: int, parts: int) -> range:
        """The steps of one of so many parts of the training, which differ by one step at most."""
        return range(number * self.steps // parts, (number + 1) * self.steps // parts)

    def part_after(self, done: int, parts: int) -> range:
        """The steps that are left of a part when so many of the training's are done; none when all are."""
        number = -(-(done + 1) * parts // self.steps) - 1  # the first part that ends after them
        return range(done, min(self.part(number, parts).stop, self.steps))

    def spans(self, steps: range) -> Iterator[tuple[int, int, int]]:
        """Where the rows of some steps lie: the number of each pass, and from where to where in its order."""
        start, stop = steps.start * self.batch_size, steps.stop * self.batch_size
        while start < stop:
            number, first = divmod(start, self.rows)
            last = min(self.rows, first + stop - start)
            yield number, first, last
            start += last - first

    def order(self, seed: int, steps: range) -> Int[Tensor, " n"]:
        """Which rows some steps see, batch after batch, for a training with this seed."""
        return torch.cat([self._of_pass(seed, number)[first:last] for number, first, last in self.spans(steps)])

    def _of_pass(self, seed: int, number: int) -> Int[Tensor, " N"]:
        generator = torch.Generator().manual_seed(pass_seed(seed, number))
        return torch.randperm(self.rows, generator=generator)

    def restarts(self, times: int) -> set[int]:
        """After how many steps dead latents begin anew, so many times, evenly over the first half."""
        return {self.steps * (i + 1) // (2 * times) for i in range(times)} - {0}

    def patience(self, resample: int = 0) -> int:
        """Rows for which a latent has not fired when it is dead: as many as there are.

        A training that is too short for that takes a twentieth of its rows, and one that resamples no more than there
        are between two times.
        """
        steps = max(1, int(self.steps * PATIENCE))
        if resample:
            steps = max(1, self.steps // (2 * resample))
        return min(self.rows, steps * self.batch_size)
