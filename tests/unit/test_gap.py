"""The gap to retrained, beside sums by hand."""

import math

import pytest
import torch

from salve.editing.gap import gap_to_retrained

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])


def says(*classes: int) -> torch.Tensor:
    """Logits of a network that is sure of what it says: eight times as likely as each of the two others."""
    return math.log(8) * torch.nn.functional.one_hot(torch.tensor(classes), 3).double()


def test_the_gap_is_the_mean_of_its_parts_in_which_classes_count_alike() -> None:
    edited = says(0, 1, 1, 1, 1, 1, 2, 2, 2, 1)  # a quarter of class 0 is left; of the others 1 and 3/4
    retrained = says(1, 1, 2, 1, 1, 0, 2, 2, 2, 2)  # nothing is left; of the others 1/2 and 1
    found = gap_to_retrained(edited, retrained, LABELS, [0])
    assert (found["gap_own"], found["gap_others"]) == pytest.approx((0.25, 0.125))
    assert found["gap"] == pytest.approx(0.1875)
    assert found["agreement"] == pytest.approx(0.6)
    # Where they differ: 0.8 ln 8 for what it is sure of, less 0.1 ln 8 for what the other is sure of.
    assert found["gap_kl"] == pytest.approx(0.4 * 0.7 * math.log(8))
    assert set(gap_to_retrained(edited, edited, LABELS, [0]).values()) == {0.0, 1.0}


def test_without_images_of_the_class_there_is_no_gap() -> None:
    logits = says(1, 1)
    assert math.isnan(gap_to_retrained(logits, logits, torch.tensor([1, 1]), [0])["gap"])
