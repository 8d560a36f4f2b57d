"""What a grid of strengths does to every class, on cached activations."""

import torch
from jaxtyping import Float
from torch import Tensor

from salve.editing.gate import Mode, edited_logits
from salve.metrics import kl_divergence
from salve.types import Activations, Contribution, Labels

#: Logits computed at once; bounds memory to about 128 MB in float32.
_BLOCK = 2**25


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
        original = block @ weight.T + bias  # [n, C]
        logits = edited_logits(weight, bias, block, contribution, alphas, mode)  # [K, n, C]
        hits = (logits.argmax(dim=2) == own).double()
        spread = kl_divergence(original.repeat(strengths, 1), logits.flatten(0, 1)).reshape(strengths, -1).double()
        right.index_add_(1, own, hits)
        drift.index_add_(1, own, spread)
    count = torch.bincount(labels, minlength=classes)
    return right / count, drift / count
