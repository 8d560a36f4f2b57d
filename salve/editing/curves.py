"""What a grid of strengths does to every class, on cached activations."""

import torch
from jaxtyping import Float
from torch import Tensor

from salve.editing.gate import Mode, edited_logits
from salve.types import Activations, Contribution, Labels

#: Logits computed at once: few enough for a processor's cache, which the passes over them live on.
_BLOCK = 2**20


def edit_curves(
    weight: Float[Tensor, "C M"],
    bias: Float[Tensor, " C"],
    activations: Activations,
    labels: Labels,
    contribution: Contribution | Float[Tensor, "S M"],
    alphas: Float[Tensor, " K"],
    mode: Mode = "suppress",
) -> tuple[Float[Tensor, "K C"], Float[Tensor, "K C"]]:
    """Accuracy and mean KL per class at every strength, all strengths in one pass.

    Args:
        weight, bias: the linear reader. activations: ``[N, M]``. labels: ``[N]``.
        contribution: ``[M]``, or ``[S, M]`` for a set. alphas: ``[K]``. mode: ``suppress`` or ``enhance``.

    Returns:
        Accuracy ``[K, C]`` and ``KL(original ‖ edited)`` in nats ``[K, C]``, float64; NaN for a class without images.
    """
    classes, strengths = len(weight), len(alphas)
    right = torch.zeros(strengths, classes, dtype=torch.float64)
    drift = torch.zeros(strengths, classes, dtype=torch.float64)
    rows = max(1, _BLOCK // (strengths * classes))
    for block, own in zip(activations.split(rows), labels.split(rows), strict=True):
        original = (block @ weight.T + bias).log_softmax(dim=1)  # [n, C]
        logits = edited_logits(weight, bias, block, contribution, alphas, mode)  # [K, n, C]
        highest, predictions = logits.max(dim=2, keepdim=True)
        right.index_add_(1, own, (predictions[..., 0] == own).double())
        drift.index_add_(1, own, _drift(original, logits - highest).double())
    count = torch.bincount(labels, minlength=classes)
    return right / count, drift / count


def _drift(original: Float[Tensor, "n C"], logits: Float[Tensor, "K n C"]) -> Float[Tensor, "K n"]:
    """``KL(p ‖ softmax y) = Σ_i p_i log p_i − Σ_i p_i y_i + log Σ_i e^{y_i}`` of log-probabilities and logits ≤ 0.

    What depends on the original alone is computed once for all strengths. Rounding is kept from making it negative.
    """
    p = original.exp()
    cross = torch.einsum("knc,nc->kn", logits, p)
    return ((p * original).sum(dim=1) - cross + logits.exp().sum(dim=2).log()).clamp_min(0)
