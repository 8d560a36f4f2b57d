# SPDX-License-Identifier: MIT
"""Terms of the training losses (docs/method.md)."""

from jaxtyping import Float
from torch import Tensor

from salve.types import Activations, Latents


def squared_errors(activations: Activations, reconstruction: Activations) -> Float[Tensor, " N"]:
    """``Σ_j (a_j − â_j)²`` of each row."""
    return (activations - reconstruction).square().sum(dim=1)


def l1_losses(
    activations: Activations,
    reconstruction: Activations,
    latents: Latents,
    sparsity: float | Float[Tensor, ""],
    signed: bool = True,
) -> Float[Tensor, " N"]:
    """``Σ_j (a_j − â_j)² + λ Σ_l |z_l|`` of each row.

    Args:
        activations, reconstruction: ``[N, M]``, scaled so that ``mean ‖a‖² = M``.
        latents: ``[N, d]``.
        sparsity: λ ≥ 0.
        signed: latents may be negative. False saves taking absolute values.
    """
    return squared_errors(activations, reconstruction) + sparsity * (latents.abs() if signed else latents).sum(dim=1)


def mean_loss(losses: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The mean over rows; 0 for no rows."""
    return losses.mean() if len(losses) else losses.sum()
