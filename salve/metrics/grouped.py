# SPDX-License-Identifier: MIT
"""Accuracy of groups of images, and how often a prediction changes, as pure functions."""

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from salve.types import Labels


def group_accuracy(
    predictions: Labels, labels: Labels, group: Int[Tensor, " N"], groups: int
) -> tuple[Float64[Tensor, " G"], Int[Tensor, " G"]]:
    """The share of right predictions in each group.

    Args:
        predictions: ``[N]``. labels: ``[N]``. group: ``[N]``, 0 to G − 1; −1 where it is unknown.
        groups: ``G``.

    Returns:
        Accuracies ``[G]``, NaN for a group without images; and the number of images of each group ``[G]``.
    """
    known = group >= 0
    counts = torch.bincount(group[known], minlength=groups)
    right = torch.bincount(group[known & (predictions == labels)], minlength=groups)
    return right.double() / counts, counts


def flip_rate(without: Labels, with_it: Labels) -> Float64[Tensor, ""]:
    """How often the prediction changes when a shortcut is put in: the share of ``i`` with ``without_i ≠ with_it_i``.

    Args:
        without, with_it: ``[N]``, predictions of the same images without the shortcut and with it.
    """
    return (without != with_it).double().mean()
