"""Sparse autoencoders on one footing (METHOD §2): one interface, one meaning of the encoder, decoder and latents.

Every variant is ``z = f(E (a − s) + b)``, ``â = D z + s``, with an encoder ``E [d, M]``, a decoder ``D [M, d]`` of
unit-norm columns and a fixed shift ``s [M]`` (zero unless centred). What differs is ``f`` and the sparsity term.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from salve.types import Activations, Latents, UserError


class SAE(nn.Module):
    """What all variants share.

    Args:
        width: ``M``, channels of the activation.
        dictionary_size: ``d``, number of latents.
        generator: draws the initial decoder; the encoder starts as its transpose.

    Attributes:
        encoder: ``[d, M]``. decoder: ``[M, d]``, columns of unit norm. bias: ``[d]``, zero where a variant has none.
        shift: ``[M]``, subtracted before encoding and added after decoding; not trained.
    """

    variant: ClassVar[str]
    has_bias: ClassVar[bool] = True
    #: A latent fires when it adds more than this share of the activation's norm (salve.metrics.firing).
    negligible: ClassVar[float] = 0.0

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        decoder = torch.randn(width, dictionary_size, generator=generator)
        decoder /= decoder.norm(dim=0, keepdim=True)
        self.decoder = nn.Parameter(decoder)
        self.encoder = nn.Parameter(decoder.T.clone())
        self.bias = nn.Parameter(torch.zeros(dictionary_size), requires_grad=self.has_bias)
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(width))

    @property
    def width(self) -> int:
        """``M``."""
        return self.decoder.shape[0]

    @property
    def dictionary_size(self) -> int:
        """``d``."""
        return self.decoder.shape[1]

    def settings(self) -> dict[str, int | float]:
        """Constructor arguments besides width and dictionary size."""
        return {}

    def pre_activations(self, activations: Activations) -> Latents:
        """``E (a − s) + b``: ``[N, M] → [N, d]``, affine in ``a``."""
        return (activations - self.shift) @ self.encoder.T + self.bias

    def activate(self, pre: Latents) -> Latents:
        """``f``: ``[N, d] → [N, d]``; where the result is not zero it equals its argument.

        Ensembles run it under ``torch.vmap``: no branch may depend on values.
        """
        raise NotImplementedError

    def encode(self, activations: Activations) -> Latents:
        """Latents ``z`` ``[N, d]`` of raw activations ``[N, M]``."""
        return self.activate(self.pre_activations(activations))

    def decode(self, latents: Latents) -> Activations:
        """Reconstruction ``â`` ``[N, M]`` of latents ``[N, d]``."""
        return latents @ self.decoder.T + self.shift

    def forward(self, activations: Activations) -> tuple[Activations, Latents]:
        """Reconstruction ``[N, M]`` and latents ``[N, d]``."""
        latents = self.encode(activations)
        return self.decode(latents), latents

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Project the decoder's columns back to unit norm, in place."""
        normalise_columns(self.decoder)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """Make an SAE that was trained on ``a / scale`` take raw ``a``: latents and shift grow by ``scale``.

        Each ``f`` here commutes with a positive factor, so only what has the unit of an activation changes; the
        decoder keeps its unit columns.
        """
        self.bias.mul_(scale)
        self.shift.mul_(scale)


@torch.no_grad()
def normalise_columns(decoder: Tensor) -> None:
    """Scale the columns of ``[…, M, d]`` to unit norm, in place; a column of zeros stays."""
    decoder.div_(decoder.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(decoder.dtype).tiny))


class LinearL1(SAE):
    """The paper's: no activation function and no bias, so latents are signed (Flovik 2025)."""

    variant = "linear_l1"
    has_bias = False
    negligible = 0.01

    def activate(self, pre: Latents) -> Latents:
        """The identity."""
        return pre


class ReluL1(SAE):
    """Non-negative latents under an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023)."""

    variant = "relu_l1"

    def activate(self, pre: Latents) -> Latents:
        """``max(0, ·)``."""
        return pre.relu()


class TopK(SAE):
    """The ``k`` largest pre-activations of each image, and only if positive (Makhzani & Frey 2013; Gao et al. 2024).

    Args:
        k: latents that may fire for one image, ``1 ≤ k ≤ d``.
    """

    variant = "topk"

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None, k: int = 8) -> None:
        if not 1 <= k <= dictionary_size:
            raise UserError(f"sae.k={k} must lie between 1 and sae.dictionary_size={dictionary_size}.")
        super().__init__(width, dictionary_size, generator)
        self.k = k

    def settings(self) -> dict[str, int | float]:
        """``k``."""
        return {"k": self.k}

    def activate(self, pre: Latents) -> Latents:
        """Keep the ``k`` largest entries of each row, zero the rest."""
        values, indices = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())


VARIANTS: dict[str, type[SAE]] = {kind.variant: kind for kind in (LinearL1, ReluL1, TopK)}


def make_sae(
    variant: str, width: int, dictionary_size: int, generator: torch.Generator | None = None, **settings: int | float
) -> SAE:
    """An untrained SAE of a variant by name.

    Raises:
        UserError: unknown variant, or settings outside their range.
    """
    if variant not in VARIANTS:
        raise UserError(f"sae.variant={variant} is unknown; the variants are {', '.join(VARIANTS)}.")
    if dictionary_size < 1:
        raise UserError(f"sae.dictionary_size={dictionary_size} must be at least 1.")
    return VARIANTS[variant](width, dictionary_size, generator, **settings)
