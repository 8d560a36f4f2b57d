# SPDX-License-Identifier: MIT
"""The effect of a grid of strengths on every class, from cached activations."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salve.backbones.tail import LinearTail
from salve.editing.gating import Mode, edited_logits, logits_by_strength
from salve.types import Activations, Contribution, Labels

#: Logits computed at a time: few enough to stay in a processor's cache.
_BLOCK = 2**20
#: Rows of activations at a time, at least: matrix products of few rows are slow.
_ROWS = 256

#: An edit, or something to compare with it: activations ``[n, M]`` and strengths ``[K]`` to logits ``[K, n, C]``.
LogitsAt: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def edit_curves(
    tail: LinearTail,
    activations: Activations,
    labels: Labels,
    contribution: Contribution | Float[Tensor, "S M"],
    alphas: Float[Tensor, " K"],
    mode: Mode = "suppress",
) -> tuple[Float[Tensor, "K C"], Float[Tensor, "K C"]]:
    """Accuracy and mean KL per class at every strength of the gate, in one pass for all strengths.

    Args:
        tail: the linear reader. activations: ``[N, M]``. labels: ``[N]``.
        contribution: ``[M]``, or ``[S, M]`` for a set. alphas: ``[K]``. mode: ``suppress`` or ``enhance``.

    Returns:
        As :func:`strength_curves`.
    """

    def logits_at(block: Tensor, strengths: Tensor) -> Tensor:
        return edited_logits(tail, block, contribution, strengths, mode)

    return strength_curves(tail, activations, labels, logits_at, alphas)


def edit_accuracies(
    tail: LinearTail,
    activations: Activations,
    labels: Labels,
    contribution: Contribution | Float[Tensor, "S M"],
    alphas: Float[Tensor, " K"],
    mode: Mode = "suppress",
) -> Float[Tensor, "K C"]:
    """Only the accuracies of :func:`edit_curves`; with many classes in a fraction of the time.

    Only the logits at one strength are in memory at a time, so that the rows of a block do not depend on the number of
    strengths, and fewer blocks are needed.

    Returns:
        ``[K, C]`` float64; NaN for a class without images.
    """

    def logits(block: Tensor) -> Iterator[tuple[int, Tensor]]:
        return logits_by_strength(tail, block, contribution, alphas, mode)

    return accuracies_of(logits, activations, labels, len(alphas), len(tail))


def accuracies_of(
    logits_by_strength: Callable[[Tensor], Iterator[tuple[int, Tensor]]],
    activations: Activations,
    labels: Labels,
    count: int,
    classes: int,
) -> Float[Tensor, "K C"]:
    """As :func:`edit_accuracies`, of any edit.

    Args:
        logits_by_strength: of a block of activations, by the index of each strength the logits ``[n, C]``.
        activations, labels: see :func:`edit_curves`. count: ``K``. classes: ``C``.
    """
    right = torch.zeros(count, classes, dtype=torch.float64)
    rows = max(_ROWS, _BLOCK // (2 * classes))
    for block, own in zip(activations.split(rows), labels.split(rows), strict=True):
        for k, logits in logits_by_strength(block):
            right[k].index_add_(0, own, (logits.argmax(dim=1) == own).double())
    return right / torch.bincount(labels, minlength=classes)


def edit_outcomes(
    tail: LinearTail,
    activations: Activations,
    labels: Labels,
    contribution: Contribution | Float[Tensor, "S M"],
    alpha: float,
    mode: Mode = "suppress",
) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """The effect of one strength on each image.

    Args:
        tail, activations, labels, contribution, mode: see :func:`edit_curves`. alpha: the strength.

    Returns:
        Whether the edited head is right, ``[N]``, and ``KL(original ‖ edited)`` in nats, ``[N]``.
    """
    return outcomes_of(
        tail, lambda block: edited_logits(tail, block, contribution, [alpha], mode)[0], activations, labels
    )


def outcomes_of(
    tail: LinearTail, logits_of: Callable[[Tensor], Tensor], activations: Activations, labels: Labels
) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
    """As :func:`edit_outcomes`, of any edit; ``logits_of`` gives the edited logits ``[n, C]`` of activations."""
    right, drift = [], []
    rows = max(_ROWS, _BLOCK // (2 * len(tail)))
    for block, own in zip(activations.split(rows), labels.split(rows), strict=True):
        logits = logits_of(block)[None]
        highest, predictions = logits.max(dim=2, keepdim=True)
        right.append(predictions[0, :, 0] == own)
        drift.append(_drift(tail(block).log_softmax(dim=1), logits - highest)[0])
    return torch.cat(right), torch.cat(drift)


def strength_curves(
    tail: LinearTail,
    activations: Activations,
    labels: Labels,
    logits_at: LogitsAt,
    strengths: Float[Tensor, " K"],
) -> tuple[Float[Tensor, "K C"], Float[Tensor, "K C"]]:
    """Accuracy and mean KL per class at every strength of any edit.

    Args:
        tail: the linear reader without edit. activations: ``[N, M]``. labels: ``[N]``.
        logits_at: gives the edited logits ``[K, n, C]`` of ``n`` images, at every strength. strengths: ``[K]``.

    Returns:
        Accuracy ``[K, C]`` and ``KL(original ‖ changed)`` in nats ``[K, C]``, float64; NaN for a class without images.
    """
    classes, count = len(tail), len(strengths)
    right = torch.zeros(count, classes, dtype=torch.float64)
    drift = torch.zeros(count, classes, dtype=torch.float64)
    rows = max(1, _BLOCK // (count * classes))
    for block, own in zip(activations.split(rows), labels.split(rows), strict=True):
        original = tail(block).log_softmax(dim=1)  # [n, C]
        logits = logits_at(block, strengths)  # [K, n, C]
        highest, predictions = logits.max(dim=2, keepdim=True)
        right.index_add_(1, own, (predictions[..., 0] == own).double())
        drift.index_add_(1, own, _drift(original, logits - highest).double())
    images = torch.bincount(labels, minlength=classes)
    return right / images, drift / images


def _drift(original: Float[Tensor, "n C"], logits: Float[Tensor, "K n C"]) -> Float[Tensor, "K n"]:
    """``KL(p ‖ softmax y) = Σ_i p_i log p_i − Σ_i p_i y_i + log Σ_i e^{y_i}``, from ``log p`` and logits ``y ≤ 0``.

    Terms of the original are computed once for all strengths. Rounding may not make the result negative.
    """
    p = original.exp()
    cross = torch.einsum("knc,nc->kn", logits, p)
    return ((p * original).sum(dim=1) - cross + logits.exp().sum(dim=2).log()).clamp_min(0)
