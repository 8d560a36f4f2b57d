# SPDX-License-Identifier: MIT
"""The schedule of an SAE's training, in optimiser steps: which rows each step sees, and when latents count as dead."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

#: A latent is dead after this share of the training without firing, or after one pass if that is shorter.
PATIENCE = 1 / 20


def pass_seed(seed: int, number: int) -> int:
    """The seed of the order of rows in pass ``number``."""
    return seed * 100_003 + number


@dataclass(frozen=True)
class Schedule:
    """A training of a fixed number of steps over rows that are drawn without replacement, pass after pass.

    Every step has a full batch: the last batch of a pass is filled up with the first rows of the next one.

    Args:
        rows: ``N``.
        batch_size: rows of a step, over all ranks; at most ``N``, larger values are reduced to it.
        steps: optimiser steps.
    """

    rows: int
    batch_size: int
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", min(self.batch_size, self.rows))

    @classmethod
    def of_epochs(cls, rows: int, batch_size: int, epochs: float) -> "Schedule":
        """The schedule of ``epochs`` passes over the rows."""
        return cls(rows, batch_size, max(1, math.ceil(epochs * rows / min(batch_size, rows))))

    @property
    def passes(self) -> float:
        """How often each row is seen on average."""
        return self.steps * self.batch_size / self.rows

    def part(self, number: int, parts: int) -> range:
        """The steps of part ``number`` of ``parts``, whose lengths differ by at most one step."""
        return range(number * self.steps // parts, (number + 1) * self.steps // parts)

    def part_after(self, done: int, parts: int) -> range:
        """The remaining steps of the current part after ``done`` steps; empty after the last step."""
        number = -(-(done + 1) * parts // self.steps) - 1  # the first part that ends after `done`
        return range(done, min(self.part(number, parts).stop, self.steps))

    def spans(self, steps: range) -> Iterator[tuple[int, int, int]]:
        """The rows of some steps, as ``(pass number, first, last)`` in the order of each pass."""
        start, stop = steps.start * self.batch_size, steps.stop * self.batch_size
        while start < stop:
            number, first = divmod(start, self.rows)
            last = min(self.rows, first + stop - start)
            yield number, first, last
            start += last - first

    def order(self, seed: int, steps: range) -> Int[Tensor, " n"]:
        """The rows of some steps, batch after batch, for a training with this seed."""
        return torch.cat([self._of_pass(seed, number)[first:last] for number, first, last in self.spans(steps)])

    def _of_pass(self, seed: int, number: int) -> Int[Tensor, " N"]:
        generator = torch.Generator().manual_seed(pass_seed(seed, number))
        return torch.randperm(self.rows, generator=generator)

    def restarts(self, times: int) -> set[int]:
        """The numbers of steps after which dead latents restart, ``times`` over the first half of the training."""
        return {self.steps * (i + 1) // (2 * times) for i in range(times)} - {0}

    def patience(self, resample: int = 0) -> int:
        """The number of rows without firing after which a latent is dead.

        One pass, but at most :data:`PATIENCE` of the training's rows or, with ``resample`` restarts, the rows between
        two restarts.
        """
        steps = max(1, int(self.steps * PATIENCE))
        if resample:
            steps = max(1, self.steps // (2 * resample))
        return min(self.rows, steps * self.batch_size)
