"""Training objectives of sparse autoencoders."""

from jaxtyping import Float
from torch import Tensor

from salve.types import Activations, Latents


def sae_loss(
    activations: Activations, reconstruction: Activations, latents: Latents, sparsity: float | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """``mean_n( Σ_j (a_j − â_j)² + λ Σ_l |z_l| )``: the one meaning of λ in this project (METHOD §2).

    Args:
        activations, reconstruction: ``[N, M]``, in units where ``mean ‖a‖² = M``.
        latents: ``[N, d]``.
        sparsity: λ ≥ 0, a price per unit of latent in the unit of squared activation.

    Returns:
        Scalar; the same for a batch and for the batch repeated; 0 for an empty one.
    """
    squared = (activations - reconstruction).square().sum(dim=1)
    losses = squared + sparsity * latents.abs().sum(dim=1)
    return losses.mean() if len(losses) else losses.sum()
