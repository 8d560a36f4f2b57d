# SPDX-License-Identifier: MIT
"""The accuracy by which the strength of an edit is chosen."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from salve.editing.matched import LEVEL, strength_to
from salve.editing.methods import FittedEdit, Target
from salve.editing.methods.change import Change
from salve.stages.bench import Bed
from salve.stages.through_tail import batches_of

CLASSES = 3


class Images:
    """Images of two classes in parts; at strength α, those of class 0 are right whose number is ``flips`` or more."""

    def __init__(self, flips: Sequence[float], others: int) -> None:
        self.flips, self.ran = torch.tensor(flips), 0
        self.labels = torch.tensor([0] * len(flips) + [1] * others)

    def chosen(self, classes: Sequence[int] | None) -> list[int]:
        return [
            label for label in (0, 1) if (classes is None or label in classes) and bool((self.labels == label).any())
        ]

    def parts(self, change: Any, classes: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        alpha = 0.0 if change is None else float(change.activations(torch.zeros(1)))
        for label in self.chosen(classes):
            right = self.flips > alpha if label == 0 else torch.ones(int((self.labels == 1).sum()), dtype=torch.bool)
            for part in batches_of(list(range(len(right))), 16, 8):
                self.ran += len(part)
                said = torch.where(right[part], label, 2)
                yield F.one_hot(said, CLASSES).float(), torch.full((len(part),), label)


def searched(images: Images, classes: tuple[int, ...] = (0,)) -> Any:
    edit = FittedEdit(lambda alpha: Change(lambda _: torch.tensor([alpha])))
    nothing: list[Any] = [None] * 5
    bed = Bed(*nothing)
    bed.__dict__["samples"] = {"select": images}
    return bed.on_select(edit, Target("storm", classes, (), (), ()))


def test_two_of_forty_images_are_at_five_percent() -> None:
    accuracy = searched(Images([1.0] * 38 + [50.0] * 2, 0))
    assert accuracy(2.0) == LEVEL
    assert strength_to(accuracy, 100.0) == pytest.approx(1.0, rel=0.04)


def test_three_of_forty_are_above_it() -> None:
    accuracy = searched(Images([1.0] * 37 + [50.0] * 3, 0))
    assert accuracy(2.0) == pytest.approx(3 / 40)
    assert strength_to(accuracy, 100.0) == pytest.approx(50.0, rel=0.04)


def test_no_more_images_run_than_show_that_the_class_is_still_there() -> None:
    images = Images([1.0] * 40, 0)
    accuracy = searched(images)
    assert accuracy(0.5) > LEVEL
    assert images.ran == 8
    assert accuracy(2.0) == 0.0
    assert images.ran == 8 + 40
    assert accuracy(0.0) == accuracy(0.0) > LEVEL
    assert images.ran == 8 + 40 + 8  # without an edit, once


def test_several_classes_count_alike() -> None:
    accuracy = searched(Images([1.0] * 40, 4), (0, 1, 2))  # of class 2 there are no images
    assert accuracy(2.0) == pytest.approx(0.5)


def test_a_class_without_images_has_no_accuracy() -> None:
    assert math.isnan(searched(Images([1.0], 0), (2,))(1.0))
    assert math.isnan(strength_to(searched(Images([1.0], 0), (2,)), 100.0))


@pytest.mark.parametrize(
    ("count", "size", "first", "sizes"),
    [(40, 64, 8, [8, 32]), (40, 16, 8, [8, 16, 16]), (5, 16, 8, [5]), (8, 16, 8, [8]), (40, 16, 0, [16, 16, 8]),
     (9, 4, 8, [4, 4, 1]), (0, 4, 8, [])],
)  # fmt: skip
def test_batches_hold_every_number_once(count: int, size: int, first: int, sizes: list[int]) -> None:
    found = batches_of(list(range(count)), size, first)
    assert [len(part) for part in found] == sizes
    assert [number for part in found for number in part] == list(range(count))
