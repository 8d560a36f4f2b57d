"""Sparse autoencoders that pay for their latents: an L1 price or, for JumpReLU, a price for each one that fires."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.sae.base import SAE, Pass
from salve.sae.losses import squared_errors
from salve.types import Activations, Latents


class LinearL1(SAE):
    """The paper's: no activation function and no bias, so latents are signed (Flovik 2025)."""

    variant = "linear_l1"
    has_bias = False
    signed = True
    firing_threshold = 0.01

    def activate(self, pre: Latents) -> Latents:
        """The identity."""
        return pre


class ReluL1(SAE):
    """Non-negative latents under an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023)."""

    variant = "relu_l1"

    def activate(self, pre: Latents) -> Latents:
        """``max(0, ·)``."""
        return pre.relu()


class Gated(SAE):
    """Whether a latent fires and how strongly are two questions (Rajamanoharan et al. 2024a, arXiv 2404.16014).

        π = E (a − s) + b,   z = 1[π > 0] ⊙ ReLU( exp(r) ⊙ E (a − s) + b_mag )
        loss = ‖a − â‖² + λ ‖ReLU(π)‖₁ + ‖a − â_frozen(ReLU(π))‖²

    The price is on the gate only, so that it does not shrink the latents. The last term teaches
    the gate, through a decoder and ``b_dec`` that get no gradient from it.

    Attributes:
        magnitude: ``r [d]``. magnitude_bias: ``b_mag [d]``. The base class's ``bias`` is the gate's.
    """

    variant = "gated"
    in_units = ("bias", "b_dec", "magnitude_bias")

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__(width, dictionary_size, generator)
        self.magnitude = nn.Parameter(torch.zeros(dictionary_size))
        self.magnitude_bias = nn.Parameter(torch.zeros(dictionary_size))

    def activate(self, pre: Latents) -> Latents:
        """From the gate's pre-activations ``π`` to latents."""
        strength = (self.magnitude.exp() * (pre - self.bias) + self.magnitude_bias).relu()
        return torch.where(pre > 0, strength, 0.0)

    def losses(
        self, activations: Activations, passed: Pass, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """Squared error, price of the gate, and the gate's own squared error."""
        gate = passed.pre.relu()
        frozen = gate @ self.decoder.detach().T + self.b_dec.detach()
        own = squared_errors(activations, frozen) + sparsity * gate.sum(dim=1)
        return squared_errors(activations, passed.reconstruction) + own

    @torch.no_grad()
    def restart(self, latents: Tensor, directions: Tensor) -> None:
        """As for all, with the strength as at the start."""
        super().restart(latents, directions)
        self.magnitude[latents] = 0
        self.magnitude_bias[latents] = 0


class JumpReLU(SAE):
    """A learned threshold for each latent, and a price for each latent that fires (Rajamanoharan et al. 2024b).

        z = π ⊙ 1[π > θ],   loss = ‖a − â‖² + λ Σ_l 1[π_l > θ_l]

    (arXiv 2407.14435), where ``θ = exp(log_threshold)`` is trained through the pseudo-derivatives
    ``∂z/∂θ = −(θ/ε) K((π − θ)/ε)`` and ``∂1[π > θ]/∂θ = −(1/ε) K((π − θ)/ε)`` with ``K`` the rectangle of width and
    area one around zero. The price acts on ``θ`` only.

    Args:
        bandwidth: ε > 0, in the unit of the activations that it is trained on, as is θ, which starts at 1.

    Attributes:
        log_threshold: ``log θ [d]``.
    """

    variant = "jumprelu"

    def __init__(
        self,
        width: int,
        dictionary_size: int,
        generator: torch.Generator | None = None,
        bandwidth: float = 1.0,
    ) -> None:
        self.check(dictionary_size, bandwidth=bandwidth)
        super().__init__(width, dictionary_size, generator)
        self.bandwidth = float(bandwidth)
        # θ = 1, the root mean square of what a random direction finds in activations with mean ‖a‖² = M.
        self.log_threshold = nn.Parameter(torch.zeros(dictionary_size))

    @property
    def threshold(self) -> Float[Tensor, " d"]:
        """``θ``."""
        return self.log_threshold.exp()

    def activate(self, pre: Latents) -> Latents:
        """``π`` where it is above ``θ``."""
        threshold = self.threshold
        kept = torch.where(pre > threshold, pre, 0.0)
        return kept + threshold.detach() * self._moved(pre, threshold) if self.training else kept

    def _moved(self, pre: Latents, threshold: Float[Tensor, " d"]) -> Latents:
        """Zeros, whose derivative by ``θ`` is ``−K((π − θ)/ε) / ε``."""
        fixed = threshold.detach()
        near = ((pre.detach() - fixed).abs() < self.bandwidth / 2).to(pre.dtype)
        return near / self.bandwidth * (fixed - threshold)

    def losses(
        self, activations: Activations, passed: Pass, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """Squared error, and λ for each latent that fires."""
        threshold = self.threshold
        fires = (passed.pre > threshold).to(passed.pre.dtype) + self._moved(passed.pre, threshold)
        return squared_errors(activations, passed.reconstruction) + sparsity * fires.sum(dim=1)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """As for all; the thresholds and the bandwidth have the unit of an activation, too."""
        super().fold(scale)
        self.log_threshold.add_(math.log(scale))
        self.bandwidth *= scale
