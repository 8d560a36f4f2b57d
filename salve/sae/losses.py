"""Training objectives of sparse autoencoders."""

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
    """``Σ_j (a_j − â_j)² + λ Σ_l |z_l|`` of each row; latents that are not ``signed`` are never negative."""
    return squared_errors(activations, reconstruction) + sparsity * (latents.abs() if signed else latents).sum(dim=1)


def mean_loss(losses: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The mean over rows; 0 for no rows."""
    return losses.mean() if len(losses) else losses.sum()


def sae_loss(
    activations: Activations, reconstruction: Activations, latents: Latents, sparsity: float | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """``mean_n( Σ_j (a_j − â_j)² + λ Σ_l |z_l| )``: the one meaning of λ as a price of latents (docs/method.md).

    Args:
        activations, reconstruction: ``[N, M]``, in units where ``mean ‖a‖² = M``.
        latents: ``[N, d]``.
        sparsity: λ ≥ 0, a price per unit of latent in the unit of squared activation.

    Returns:
        Scalar; the same for a batch and for the batch repeated; 0 for an empty one.
    """
    return mean_loss(l1_losses(activations, reconstruction, latents, sparsity))
