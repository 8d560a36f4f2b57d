"""Formulas of the measures, pure: tensors in, tensors out, dtypes kept."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salve.types import Activations, Labels, Latents, Logits


def fraction_of_variance_explained(x: Activations, x_hat: Activations) -> Float[Tensor, ""]:
    """FVE: ``1 − Σ (x − x̂)² / Σ (x − x̄)²`` with the mean ``x̄`` taken per dimension.

    Args:
        x: ``[N, M]`` activations. x_hat: ``[N, M]`` their reconstructions.

    Returns:
        Scalar; 1 when perfect, 0 for the per-dimension mean, below 0 for worse. Activations without any variance
        give 1 when reconstructed perfectly and 0 otherwise, as in scikit-learn's variance-weighted ``r2_score``.
    """
    residual = (x - x_hat).square().sum()
    variance = (x - x.mean(dim=0, keepdim=True)).square().sum()
    return explained(residual, variance)


def explained(residual: Tensor, variance: Tensor) -> Float[Tensor, ""]:
    """``1 − residual / variance`` with its value where there is no variance."""
    flat = (residual == 0).to(residual.dtype)
    return torch.where(variance > 0, 1 - residual / variance.clamp_min(torch.finfo(variance.dtype).tiny), flat)


def firing(latents: Latents, activations: Activations, negligible: float = 0.0) -> Bool[Tensor, "N d"]:
    """Which latents fire for which image: ``|z_l| > negligible · ‖a‖``.

    The decoder's columns have unit norm, so ``|z_l|`` is the length of what latent ``l`` adds to the reconstruction;
    linear latents are never exactly zero, and count only when they add more than a share of the activation.
    """
    return latents.abs() > negligible * activations.norm(dim=1, keepdim=True)


def per_class_accuracy(predictions: Labels, labels: Labels, num_classes: int) -> Float[Tensor, " C"]:
    """Share of each class's images that are predicted right ``[C]``; NaN for a class without images."""
    right = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return right / torch.bincount(labels, minlength=num_classes)


def kl_divergence(original: Logits, edited: Logits) -> Float[Tensor, " N"]:
    """``KL(p_original ‖ p_edited)`` of the predictive distributions, in nats, per image ``[N]``."""
    p, q = original.log_softmax(dim=1), edited.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)
