# SPDX-License-Identifier: MIT
"""Effects of latents on the logits of classes, to first order (docs/method.md)."""

from jaxtyping import Float
from torch import Tensor


def class_effects(attributions: Float[Tensor, "C M"], decoder: Float[Tensor, "M d"]) -> Float[Tensor, "C d"]:
    """How much each class's own logit falls per strength α when a latent is suppressed, to first order.

    The gate ``1 − α |c_j|`` takes ``α |c_j|`` of what channel ``j`` adds to the logit, so that
    ``R_kl = Σ_j S_kj |D_jl|``.

    Args:
        attributions: ``S``, what each channel adds to the logit of class ``k``, in the mean over the class's images:
            ``a_j ∂y_k/∂a_j``, summed over positions. NaN for a class without images.
        decoder: ``[M, d]`` with unit-norm columns.

    Returns:
        ``[C, d]``, in the dtype of the attributions.
    """
    return attributions @ decoder.to(attributions).abs()


def effect_scores(effects: Float[Tensor, "C d"]) -> Float[Tensor, "C d"]:
    """``R_kl − mean_{k'≠k} |R_k'l|``: the effect on the class, less the mean absolute effect on the others.

    Args:
        effects: ``[C, d]``; NaN rows, of classes without images, are left out.

    Returns:
        ``[C, d]``; NaN where effects are.
    """
    known = ~effects.isnan()
    size = effects.nan_to_num(0.0).abs()
    others = (known.sum(dim=0) - 1).clamp_min(1)
    return effects - (size.sum(dim=0) - size) / others
