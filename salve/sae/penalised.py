# SPDX-License-Identifier: MIT
"""Variants with a sparsity penalty in the loss: L1, or for JumpReLU the number of latents that fire."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.sae.base import SAE, SAEOutput
from salve.sae.losses import squared_errors
from salve.types import Activations, Latents


class LinearL1(SAE):
    """The paper's SAE: no activation function and no bias, so latents are signed (Flovik 2025)."""

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
    """A gate decides which latents fire, a magnitude path how strongly (Rajamanoharan et al. 2024a, arXiv 2404.16014).

        π = E (a − b_dec) + b,   z = 1[π > 0] ⊙ ReLU( exp(r) ⊙ E (a − b_dec) + b_mag )
        loss = ‖a − â‖² + λ ‖ReLU(π)‖₁ + ‖a − â_frozen(ReLU(π))‖²

    Only the gate is penalised, so the penalty does not shrink the latents. The last term trains the gate: it decodes
    ``ReLU(π)`` with the decoder and ``b_dec`` held fixed.

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
        """Latents from the gate's pre-activations ``π``."""
        strength = (self.magnitude.exp() * (pre - self.bias) + self.magnitude_bias).relu()
        return torch.where(pre > 0, strength, 0.0)

    def losses(
        self, activations: Activations, output: SAEOutput, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """Squared error, the gate's L1 penalty, and the gate's own squared error."""
        gate = output.pre.relu()
        frozen = gate @ self.decoder.detach().T + self.b_dec.detach()
        own = squared_errors(activations, frozen) + sparsity * gate.sum(dim=1)
        return squared_errors(activations, output.reconstruction) + own

    @torch.no_grad()
    def restart(self, latents: Tensor, directions: Tensor) -> None:
        """As for every variant; also resets the magnitude path."""
        super().restart(latents, directions)
        self.magnitude[latents] = 0
        self.magnitude_bias[latents] = 0


class JumpReLU(SAE):
    """A learned threshold per latent, and an L0 penalty (Rajamanoharan et al. 2024b, arXiv 2407.14435).

        z = π ⊙ 1[π > θ],   loss = ‖a − â‖² + λ Σ_l 1[π_l > θ_l]

    ``θ = exp(log_threshold)`` is trained through the pseudo-derivatives ``∂z/∂θ = −(θ/ε) K((π − θ)/ε)`` and
    ``∂1[π > θ]/∂θ = −(1/ε) K((π − θ)/ε)``, with ``K`` the rectangle of width and area one around zero. The penalty
    acts on ``θ`` only.

    Args:
        bandwidth: ε > 0, in the unit of the training activations.

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
        # θ = 1: the root mean square of a random direction's pre-activation where mean ‖a‖² = M.
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
        """Zeros whose derivative with respect to ``θ`` is ``−K((π − θ)/ε) / ε``."""
        fixed = threshold.detach()
        near = ((pre.detach() - fixed).abs() < self.bandwidth / 2).to(pre.dtype)
        return near / self.bandwidth * (fixed - threshold)

    def losses(
        self, activations: Activations, output: SAEOutput, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """Squared error plus λ for each latent that fires."""
        threshold = self.threshold
        fires = (output.pre > threshold).to(output.pre.dtype) + self._moved(output.pre, threshold)
        return squared_errors(activations, output.reconstruction) + sparsity * fires.sum(dim=1)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """As for every variant; thresholds and bandwidth have the unit of an activation, too."""
        super().fold(scale)
        self.log_threshold.add_(math.log(scale))
        self.bandwidth *= scale
