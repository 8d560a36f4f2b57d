"""What a training step minimises, as a function that one SAE and many at once can go through."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from salve.sae.base import SAE, Pass
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
    """Mean loss of a batch, and its latents, detached.

    Args:
        sparsity: λ of the variant. dead: latents that AuxK uses. auxk: how many of them at most, 0 for no such term.
    """
    loss, passed = step_loss(sae, activations, sparsity, dead, auxk)
    return loss, passed.latents.detach()


def step_loss(
    sae: SAE,
    activations: Activations,
    sparsity: float | Float[Tensor, ""],
    dead: Bool[Tensor, " d"] | None = None,
    auxk: int = 0,
) -> tuple[Float[Tensor, ""], Pass]:
    """As :func:`objective`, with the whole pass, whose latents are not made where nobody asks for them."""
    # A price of latents needs the gradient of every one.
    passed = sae.run(activations) if sparsity else sae.run_alone(activations)
    return _mean_loss(sae, activations, passed, sparsity, dead, auxk), passed


def _mean_loss(
    sae: SAE,
    activations: Activations,
    passed: Pass,
    sparsity: float | Float[Tensor, ""],
    dead: Bool[Tensor, " d"] | None,
    auxk: int,
) -> Float[Tensor, ""]:
    losses = sae.losses(activations, passed, sparsity)
    if auxk and dead is not None:
        losses = losses + AUXILIARY * auxk_losses(sae, activations, passed, dead, auxk)
    return mean_loss(losses)


class Objective(nn.Module):
    """:func:`objective` of an SAE as a module, for ``torch.func.functional_call``."""

    def __init__(self, sae: SAE, auxk: int) -> None:
        super().__init__()
        self.sae, self.auxk = sae, auxk

    def forward(
        self, activations: Activations, sparsity: Float[Tensor, ""], dead: Bool[Tensor, " d"]
    ) -> tuple[Float[Tensor, ""], Latents]:
        """Mean loss and latents."""
        passed = self.sae.run(activations)
        return _mean_loss(self.sae, activations, passed, sparsity, dead, self.auxk), passed.latents.detach()
