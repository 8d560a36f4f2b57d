# SPDX-License-Identifier: MIT
"""The training objective, for one SAE and, under ``torch.vmap``, for many."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from salve.sae.base import SAE, SAEOutput
from salve.sae.losses import mean_loss
from salve.sae.revival import AUXILIARY, auxk_losses
from salve.types import Activations, Latents


def objective(
    sae: SAE,
    activations: Activations,
    sparsity: float | Float[Tensor, ""],
    dead: Bool[Tensor, " d"] | None = None,
    auxk: int = 0,
) -> tuple[Float[Tensor, ""], Latents]:
    """The mean loss of a batch, and its latents without gradient.

    Args:
        sae: in train mode.
        activations: ``[N, M]``.
        sparsity: λ of the variant.
        dead: ``[d]``, the latents that AuxK may use; None for no AuxK term.
        auxk: number of dead latents that AuxK uses at most; 0 for no AuxK term.

    Returns:
        Scalar loss and latents ``[N, d]``.
    """
    loss, output = step_loss(sae, activations, sparsity, dead, auxk)
    return loss, output.latents.detach()


def step_loss(
    sae: SAE,
    activations: Activations,
    sparsity: float | Float[Tensor, ""],
    dead: Bool[Tensor, " d"] | None = None,
    auxk: int = 0,
) -> tuple[Float[Tensor, ""], SAEOutput]:
    """As :func:`objective`, but returns the whole forward pass: its dense latents are only built on demand."""
    # A sparsity penalty needs the gradient of every latent.
    output = sae.run(activations) if sparsity else sae.run_alone(activations)
    return _mean_loss(sae, activations, output, sparsity, dead, auxk), output


def _mean_loss(
    sae: SAE,
    activations: Activations,
    output: SAEOutput,
    sparsity: float | Float[Tensor, ""],
    dead: Bool[Tensor, " d"] | None,
    auxk: int,
) -> Float[Tensor, ""]:
    losses = sae.losses(activations, output, sparsity)
    if auxk and dead is not None:
        losses = losses + AUXILIARY * auxk_losses(sae, activations, output, dead, auxk)
    return mean_loss(losses)


class Objective(nn.Module):
    """:func:`objective` as a module, for ``torch.func.functional_call``."""

    def __init__(self, sae: SAE, auxk: int) -> None:
        super().__init__()
        self.sae, self.auxk = sae, auxk

    def forward(
        self, activations: Activations, sparsity: Float[Tensor, ""], dead: Bool[Tensor, " d"]
    ) -> tuple[Float[Tensor, ""], Latents]:
        """Mean loss and latents."""
        output = self.sae.run(activations)
        return _mean_loss(self.sae, activations, output, sparsity, dead, self.auxk), output.latents.detach()
