# SPDX-License-Identifier: MIT
"""What all sparse autoencoders share (docs/method.md): one meaning of the encoder, decoder and latents.

Every variant is ``z = f(E (a − b_dec) + b)``, ``â = D z + b_dec``: an encoder ``E [d, M]``, a decoder ``D [M, d]`` of
unit-norm columns, and ``b_dec [M]``, zero unless centred or learned. Variants differ in ``f`` and in the loss.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.sae.losses import l1_losses, squared_errors
from salve.sae.sparse import SparseLatents
from salve.types import Activations, Latents, UserError
from salve.variants import TRAITS, Traits


class SAEOutput(NamedTuple):
    """Result of one forward pass.

    Attributes:
        pre: pre-activations ``[N, d]``.
        dense_latents: latents ``[N, d]``, or None where ``sparse`` holds them.
        reconstruction: ``â`` ``[N, M]``.
        sparse: the latents that may fire, as a sparse matrix. Gradients then flow through it alone: ``pre`` and
            ``latents`` have none.
    """

    pre: Tensor
    dense_latents: Tensor | None
    reconstruction: Tensor
    sparse: SparseLatents | None = None

    @property
    def latents(self) -> Latents:
        """``[N, d]``; built from ``sparse`` on demand."""
        if self.sparse is not None:
            return self.sparse.dense(self.pre)
        assert self.dense_latents is not None
        return self.dense_latents


class SAE(nn.Module):
    """Base class of all variants.

    Args:
        width: ``M``, channels of the activation.
        dictionary_size: ``d``, number of latents.
        generator: draws the initial decoder. The encoder starts as its transpose times :meth:`start_strength`.

    Attributes:
        encoder: ``[d, M]``.
        decoder: ``[M, d]``, columns of unit norm.
        bias: ``[d]``, zero where a variant has none.
        b_dec: ``[M]``, subtracted before encoding and added after decoding. It is fixed unless :meth:`learn_b_dec` is
            called.
    """

    #: The name of the variant; of a class of the user's own its path, which need not be set.
    variant: ClassVar[str]
    #: Names of the constructor's settings besides the sizes; each is an attribute of the same name. The names are kept
    #: in :mod:`salve.variants`, which refuses wrong settings without importing torch.
    takes: ClassVar[tuple[str, ...]] = ()
    has_bias: ClassVar[bool] = True
    #: Latents take both signs: a decoder column and its negative are the same feature.
    signed: ClassVar[bool] = False
    #: A latent fires when it adds more than this share of the activation's norm (salve.metrics.firing).
    firing_threshold: ClassVar[float] = 0.0
    #: How dead latents can be revived: ``resample`` or ``auxk`` (salve.sae.revival).
    revived_by: ClassVar[str | None] = None
    #: Names of the tensors that have the unit of an activation.
    in_units: ClassVar[tuple[str, ...]] = ("bias", "b_dec")

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        decoder = torch.randn(width, dictionary_size, generator=generator)
        decoder /= decoder.norm(dim=0, keepdim=True)
        # Stored column by column, so that one latent's column is contiguous in memory.
        self.decoder = nn.Parameter(decoder.T.contiguous().T)
        self.encoder = nn.Parameter(self.decoder.detach().T * self.start_strength())
        self.bias = nn.Parameter(torch.zeros(dictionary_size), requires_grad=self.has_bias)
        self.b_dec: Tensor
        self.register_buffer("b_dec", torch.zeros(width))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.partition(".")[0] != "salve":
            cls.variant = f"{cls.__module__}.{cls.__qualname__}"
        if traits := TRAITS.get(cls.variant):
            cls.takes, cls.revived_by = traits.takes, traits.revived_by

    @classmethod
    def check(cls, dictionary_size: int, **settings: Any) -> None:
        """Check the size and the settings in :attr:`takes`; a class of one's own extends it for its own settings.

        Raises:
            UserError: one is outside its range.
        """
        # A class of one's own has the checks of the variant that it derives from, if it derives from one.
        kinds = [getattr(kind, "variant", "") for kind in cls.__mro__]
        variant = next((kind for kind in kinds if kind in TRAITS), "")
        TRAITS.get(variant, Traits()).check(variant, dictionary_size, **settings)

    @property
    def width(self) -> int:
        """``M``."""
        return self.decoder.shape[0]

    @property
    def dictionary_size(self) -> int:
        """``d``."""
        return self.decoder.shape[1]

    def settings(self) -> dict[str, Any]:
        """Constructor arguments besides width and dictionary size, JSON-like."""
        return {name: getattr(self, name) for name in self.takes}

    def pre_activations(self, activations: Activations) -> Latents:
        """``E (a − b_dec) + b``: ``[N, M] → [N, d]``, affine in ``a``."""
        return torch.addmm(self.bias, activations - self.b_dec, self.encoder.T)

    def activate(self, pre: Latents) -> Latents:
        """``f``: ``[N, d] → [N, d]``.

        ``∂z_l/∂pre_m`` must be zero for ``l ≠ m``, and also for ``l = m`` where ``z_l`` is zero. Ensembles call it
        under ``torch.vmap``: no branch may depend on values.
        """
        raise NotImplementedError

    def encode(self, activations: Activations) -> Latents:
        """Latents ``z`` ``[N, d]`` of raw activations ``[N, M]``."""
        return self.activate(self.pre_activations(activations))

    def decode(self, latents: Latents) -> Activations:
        """Reconstruction ``â`` ``[N, M]`` of latents ``[N, d]``."""
        return torch.addmm(self.b_dec, latents, self.decoder.T)

    def forward(self, activations: Activations) -> tuple[Activations, Latents]:
        """Reconstruction ``[N, M]`` and latents ``[N, d]``."""
        output = self.run(activations)
        return output.reconstruction, output.latents

    def run(self, activations: Activations) -> SAEOutput:
        """One forward pass, with everything that :meth:`losses` needs."""
        pre = self.pre_activations(activations)
        latents = self.activate(pre)
        return SAEOutput(pre, latents, self.decode(latents))

    def run_alone(self, activations: Activations) -> SAEOutput:
        """As :meth:`run`, but optimised for training one SAE; cannot be used under ``torch.vmap``."""
        return self.run(activations)

    def losses(
        self, activations: Activations, output: SAEOutput, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """The training loss of each row; here :func:`salve.sae.losses.l1_losses` with λ ``sparsity``."""
        if isinstance(sparsity, float) and sparsity == 0:  # skips the sum over all latents
            return squared_errors(activations, output.reconstruction)
        return l1_losses(activations, output.reconstruction, output.latents, sparsity, self.signed)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale the decoder's columns to unit norm, in place; a frozen decoder stays as it is."""
        if not self.decoder_frozen:
            normalise_columns(self.decoder)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """Make an SAE that was trained on ``a / scale`` take raw ``a``, in place.

        Its latents grow by ``scale``. Only the tensors in the unit of an activation change; decoder columns keep unit
        norm.
        """
        for name in self.in_units:
            getattr(self, name).mul_(scale)

    def learn_b_dec(self) -> None:
        """Make ``b_dec`` trainable: the pre-encoder bias of Bricken et al. 2023."""
        b_dec = self.b_dec.clone()
        del self.b_dec
        self.b_dec = nn.Parameter(b_dec)

    def freeze_decoder(self) -> None:
        """Leave the decoder as it is in all that follows: a control for what its directions are worth."""
        self.decoder.requires_grad_(False)

    @property
    def decoder_frozen(self) -> bool:
        """Whether training leaves the decoder as it is."""
        return not self.decoder.requires_grad

    @torch.no_grad()
    def start_from(self, rows: Activations, mean: Float[Tensor, " M"]) -> None:
        """Initialise decoder columns as directions from the mean activation to rows, and the encoder accordingly.

        Columns beyond the number of rows stay random, as do those whose row equals the mean.

        Args:
            rows: ``[n, M]``, n ≤ d, drawn from all activations. mean: ``[M]``, of all activations.

        Raises:
            UserError: the decoder is frozen.
        """
        if self.decoder_frozen:
            raise UserError("A frozen decoder keeps its columns, and cannot start from data.")
        directions = rows - mean
        length = directions.norm(dim=1, keepdim=True)
        drawn = self.decoder.T[: len(rows)]
        self.decoder[:, : len(rows)] = torch.where(length > 0, directions / length, drawn).T
        self.encoder.copy_(self.decoder.T * self.start_strength())

    def start_strength(self) -> float:
        """The initial norm of the encoder's rows, ``min(1, M/d)``.

        With more latents than channels, unit rows would make the reconstruction ``d/M`` times too long.
        """
        return min(1.0, self.width / self.dictionary_size)

    @torch.no_grad()
    def restart(self, latents: Tensor, directions: Tensor) -> None:
        """Reset latents to new directions, with a weak encoder (Bricken et al. 2023).

        Those of a frozen decoder keep their directions, and only the encoder is reset.

        Args:
            latents: ``[L]``, their indices. directions: ``[L, M]``, of unit norm.
        """
        alive = torch.ones(self.dictionary_size, dtype=torch.bool, device=latents.device)
        alive[latents] = False
        strength = self.encoder[alive].norm(dim=1).mean() if alive.any() else 1.0
        if self.decoder_frozen:
            directions = self.decoder[:, latents].T
        else:
            self.decoder[:, latents] = directions.T
        self.encoder[latents] = 0.2 * strength * directions
        self.bias[latents] = 0


@torch.no_grad()
def normalise_columns(decoder: Tensor) -> None:
    """Scale the columns of ``[…, M, d]`` to unit norm, in place; columns of zeros stay zero."""
    decoder.div_(decoder.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(decoder.dtype).tiny))
