# SPDX-License-Identifier: MIT
"""The gap to retrained: how far an edited network is from one that never saw the class (docs/method.md)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from salve.metrics import kl_divergence, per_class_accuracy


def gap_to_retrained(
    edited: Float[Tensor, "N C"], retrained: Float[Tensor, "N C"], labels: Int[Tensor, " N"], own: Sequence[int]
) -> dict[str, float]:
    """The gap between two networks, and its parts.

    Args:
        edited, retrained: logits of both for test images. labels: of these images. own: labels of the classes taken.

    Returns:
        ``gap``, the mean of ``gap_own`` and ``gap_others``: by how much the accuracy on the classes taken, and the one
        on all others, differ (absolute, every class counted alike). ``gap_kl``: mean KL from the retrained network's
        predictions to the edited one's, in nats. ``agreement``: share of the images of which both say the same. NaN
        where there are no such images.
    """
    each = [per_class_accuracy(logits.argmax(dim=1), labels, logits.shape[1]) for logits in (edited, retrained)]
    mine = torch.isin(torch.arange(len(each[0])), torch.tensor(list(own)))
    parts = [float((each[0][part].nanmean() - each[1][part].nanmean()).abs()) for part in (mine, ~mine)]
    return {
        "gap": sum(parts) / 2,
        "gap_own": parts[0],
        "gap_others": parts[1],
        "gap_kl": float(kl_divergence(retrained, edited).clamp_min(0).mean()),
        "agreement": float((edited.argmax(dim=1) == retrained.argmax(dim=1)).double().mean()),
    }
