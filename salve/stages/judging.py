# SPDX-License-Identifier: MIT
"""How repairs are judged on select images, by few whose attribute is known."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.editing.gains import ERRORS, average_loss, gains_by_groups
from salve.editing.recalibrate import fairest_shift, group_accuracies, likeliest_shift, recalibrated
from salve.editing.reweighting import halves_of
from salve.features.suspects import nearest
from salve.stages.grouped import Grouped

#: Images that come nearest to a class without being of it, on which a repair without labels is judged.
NEAREST = 32


class Judgement(NamedTuple):
    """What select images say of a repair.

    Attributes:
        score: larger is better. accuracy: on all.
        average_loss: what the average by groups of the train images loses at least; NaN where it is not known.
        allowed: within the budget.
        pays: whether it is better by more than chance: see :func:`salve.editing.gains.gains_by_groups`; without labels,
            whether the score gains more than twice the error of that gain.
    """

    score: tuple[float, ...]
    accuracy: float
    average_loss: float
    allowed: bool
    pays: bool


@dataclass(frozen=True, eq=False)
class Judge:
    """Judges repairs by the logits of select images.

    With labels by the worst group's accuracy, and then by the mean over groups: the first must gain, and the second
    more than twice the error of that gain. Without, by how little the images that come nearest to the classes are still
    taken for them (the mean probability), which must fall by more than twice the error of that fall. The budget holds
    for the accuracy of all, and with labels also for the average that weighs groups by their shares of the train
    images, as far as the images that are known can tell: its loss less a standard error.

    Groups are not judged by images that a repair was fitted to: one half of every group judges what was fitted to the
    other. The accuracy of all also counts images that an eraser or new biases were fitted to.

    Attributes:
        known: images whose groups are known; without labels all. plain: all images.
        labelled: whether there are labels. before, plain_before: logits of both in the network as it is.
        suspected: labels of the classes that rely on something. classes: number of all. seed: of the halves.
        shares: of the groups, of the train images; None where they are not known. max_loss: the budget.
    """

    known: Grouped
    plain: Grouped
    labelled: bool
    before: Float[Tensor, "n C"]
    plain_before: Float[Tensor, "N C"]
    suspected: tuple[int, ...]
    classes: int
    seed: int
    shares: Float[Tensor, " G"] | None
    max_loss: float

    @cached_property
    def first(self) -> Bool[Tensor, " n"]:
        """Which of the images that are known are in the first half of their group."""
        return halves_of(self.known.group, self.seed, self.known.object)

    @cached_property
    def accuracy_before(self) -> float:
        return self._accuracy(self.plain_before)

    @cached_property
    def _near(self) -> dict[int, Int[Tensor, " m"]]:
        logits = self.plain_before[:, : self.classes]
        return {k: nearest(logits, self.plain.labels, k, NEAREST) for k in self.suspected}

    def right(self, logits: Float[Tensor, "n C"]) -> Bool[Tensor, " n"]:
        """Which of the images that are known are right."""
        return logits.argmax(dim=1) == self.known.labels

    def with_new_biases(self, known: Float[Tensor, "n C"]) -> tuple[Float[Tensor, "n C"], Float[Tensor, " C"]]:
        """New biases of the suspected classes, where they pay: the logits that are judged, and the shifts.

        With labels each half of the images is judged with the biases that are best for the other half.

        Args:
            known: logits of the images that are known.
        """
        known, labels, groups, classes = known.double(), self.known.labels, self.known.group, self.suspected
        if not self.labelled:
            shifts = recalibrated(known, labels, labels, classes, likeliest_shift)
            return known + shifts, shifts
        shifted = known.clone()
        for half in (self.first, ~self.first) if bool((~self.first).any()) else ():
            shifted[~half] += recalibrated(known[half], labels[half], groups[half], classes, fairest_shift)
        if not self._gains(self.right(known), self.right(shifted)):
            return known, torch.zeros(known.shape[1], dtype=torch.float64)
        return shifted, recalibrated(known, labels, groups, classes, fairest_shift)

    def of(self, known: Float[Tensor, "n C"], plain: Float[Tensor, "N C"]) -> Judgement:
        """Judge a repair by the logits of the images that are known, and of all."""
        accuracy = self._accuracy(plain)
        loss, average, pays = self.accuracy_before - accuracy, math.nan, True
        if self.labelled:
            right, before = self.right(known), self.right(self.before)
            by_group = group_accuracies(right, self.known.group, int(self.known.group.max()) + 1)
            by_group = by_group[~by_group.isnan()]
            score = (float(by_group.min()), float(by_group.mean()))
            pays = self._gains(before, right)
            if self.shares is not None:
                average = average_loss(before, right, self.known.group, self.shares)
                loss = max(loss, average)
        else:
            taken, falls, error = self._taken(plain)
            score, pays = (-taken, accuracy), falls > ERRORS * error
        return Judgement(score, accuracy, average, loss <= self.max_loss + 1e-9, pays)

    def _taken(self, plain: Float[Tensor, "N C"]) -> tuple[float, float, float]:
        """The mean probability with which the images nearest to the suspected classes are still taken for them, by how
        much it falls, and the standard error of that fall, by as many images of a class as show another object."""
        after, before = (logits.double().softmax(dim=1) for logits in (plain, self.plain_before))
        taken, falls, square = [], [], []
        for k, near in self._near.items():
            if len(near):
                fall = before[near, k] - after[near, k]
                taken.append(float(after[near, k].mean()))
                falls.append(float(fall.mean()))
                objects = len(self.plain.object[near].unique())
                # How much one object differs from others is not known: it shows nothing.
                square.append(float(fall.var(unbiased=False)) / objects if objects > 1 else math.inf)
        if not taken:
            return math.nan, math.nan, math.nan
        count = len(taken)
        return sum(taken) / count, sum(falls) / count, math.sqrt(sum(square)) / count

    def _gains(self, before: Bool[Tensor, " n"], after: Bool[Tensor, " n"]) -> bool:
        return gains_by_groups(before, after, self.known.group, self.known.object)

    def _accuracy(self, logits: Float[Tensor, "N C"]) -> float:
        return float((logits.argmax(dim=1) == self.plain.labels).double().mean())
