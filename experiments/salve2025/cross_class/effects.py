"""Which classes a latent counts for, and what suppressing it does to every class: pure functions.

Axes: ``N`` images, ``M`` width, ``d`` latents, ``C`` classes, ``K`` strengths.
"""

import math

import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from experiments.compare import strength_to
from salve.features import kinds, shares
from salve.types import Activations, Contribution

#: Strengths at which every latent is tried.
ALPHAS = (0, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 50, 60, 80, 100)


def weights(means: Float[Tensor, "C d"]) -> Float[Tensor, "C d"]:
    """How much a latent counts for a class, as a multiple of the class's average latent: ``|μ_kl| / mean_l |μ_kl|``.

    A share says nothing of size: it may be large for a latent that hardly ever leaves zero. A latent counts from 1 on.

    Returns:
        ``[C, d]``; 0 for a class without images or with nothing but zeros.
    """
    size = means.nan_to_num(0.0).abs()
    average = size.mean(dim=1, keepdim=True)
    return size / torch.where(average > 0, average, torch.ones_like(average))


def counting(means: Float[Tensor, "C d"], threshold: float) -> tuple[list[str], Bool[Tensor, "C d"]]:
    """What each latent is, and the classes that depend on it.

    A class depends on a latent of which it holds a share of at least τ/2, and which counts for it (:func:`weights`). A
    latent that :func:`salve.features.kinds` calls cross-class stays so only if two classes depend on it in this
    sense; a latent that counts for no class is ``"idle"``.

    Args:
        means: class means ``μ [C, d]``. threshold: τ.

    Returns:
        ``d`` kinds, and ``[C, d]``.
    """
    counts = weights(means) >= 1
    depends = (shares(means) >= threshold / 2) & counts
    found: list[str] = []
    for latent, kind in enumerate(kinds(means, threshold)):
        if not bool(counts[:, latent].any()):
            found.append("idle")
        elif kind == "cross-class" and int(depends[:, latent].sum()) < 2:
            found.append("diffuse")
        else:
            found.append(kind)
    return found, depends


def first_crossing(
    alphas: Float[ndarray, " K"], accuracy: Float[ndarray, "K C"], classes: list[int], level: float
) -> float:
    """The smallest :func:`experiments.compare.strength_to` of some classes; ``inf`` if none of them gets there."""
    found = [strength_to(alphas, accuracy[:, k], level) for k in classes]
    return min((alpha for alpha in found if not math.isnan(alpha)), default=math.inf)


def gated_logits(
    weight: Float[Tensor, "C M"], bias: Float[Tensor, " C"], activations: Activations, gate: Contribution
) -> Float[Tensor, "N C"]:
    """Logits behind a gate ``[M]`` on the activations."""
    return activations @ (weight * gate).T + bias
