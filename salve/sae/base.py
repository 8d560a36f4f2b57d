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
from salve.types import Activations, Latents
from salve.variants import TRAITS, check_variant


class Pass(NamedTuple):
    """One pass through an SAE: pre-activations and latents ``[N, d]``, reconstruction ``[N, M]``.

    Where ``sparse`` holds the latents that may fire, gradients go through them, and ``pre`` and ``latents`` have none.
    """

    pre: Tensor
    of_all: Tensor | None
    reconstruction: Tensor
    sparse: SparseLatents | None = None

    @property
    def latents(self) -> Latents:
        """``[N, d]``; made only when asked for, where ``sparse`` holds them."""
        if self.sparse is not None:
            return self.sparse.dense(self.pre)
        assert self.of_all is not None
        return self.of_all


class SAE(nn.Module):
    """What all variants share.

    Args:
        width: ``M``, channels of the activation.
        dictionary_size: ``d``, number of latents.
        generator: draws the initial decoder; the encoder starts as its transpose, times :meth:`start_strength`.

    Attributes:
        encoder: ``[d, M]``. decoder: ``[M, d]``, columns of unit norm. bias: ``[d]``, zero where a variant has none.
        b_dec: ``[M]``, subtracted before encoding and added after decoding; trained after :meth:`learn_b_dec` only.
    """

    variant: ClassVar[str]
    #: Names of the settings that the constructor takes besides the sizes; each is an attribute of the same name. As all
    #: that a wrong setting is refused by, they are kept in :mod:`salve.variants`, which needs no torch.
    takes: ClassVar[tuple[str, ...]] = ()
    has_bias: ClassVar[bool] = True
    #: Latents take both signs, so that a decoder column and its negative are one feature.
    signed: ClassVar[bool] = False
    #: A latent fires when it adds more than this share of the activation's norm (salve.metrics.firing).
    firing_threshold: ClassVar[float] = 0.0
    #: What may be done for latents that have died: ``resample`` or ``auxk`` (salve.sae.revival).
    revived_by: ClassVar[str | None] = None
    #: Tensors in the unit of an activation.
    in_units: ClassVar[tuple[str, ...]] = ("bias", "b_dec")

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        decoder = torch.randn(width, dictionary_size, generator=generator)
        decoder /= decoder.norm(dim=0, keepdim=True)
        # Column after column in memory: what a latent adds is then read and scaled as one piece.
        self.decoder = nn.Parameter(decoder.T.contiguous().T)
        self.encoder = nn.Parameter(self.decoder.detach().T * self.start_strength())
        self.bias = nn.Parameter(torch.zeros(dictionary_size), requires_grad=self.has_bias)
        self.b_dec: Tensor
        self.register_buffer("b_dec", torch.zeros(width))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if traits := TRAITS.get(cls.variant):
            cls.takes, cls.revived_by = traits.takes, traits.revived_by

    @classmethod
    def check(cls, dictionary_size: int, **settings: Any) -> None:
        """Raises UserError if the size or a setting is outside its range."""
        check_variant(cls.variant, dictionary_size, **settings)

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
        """``E (a − s) + b``: ``[N, M] → [N, d]``, affine in ``a``."""
        return torch.addmm(self.bias, activations - self.b_dec, self.encoder.T)

    def activate(self, pre: Latents) -> Latents:
        """``f``: ``[N, d] → [N, d]``; ``∂z_l/∂pre_m`` is zero for ``l ≠ m``, and for ``l = m`` where ``z_l`` is zero.

        Ensembles run it under ``torch.vmap``: no branch may depend on values.
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
        passed = self.run(activations)
        return passed.reconstruction, passed.latents

    def run(self, activations: Activations) -> Pass:
        """One pass, with all that :meth:`losses` may need of it."""
        pre = self.pre_activations(activations)
        latents = self.activate(pre)
        return Pass(pre, latents, self.decode(latents))

    def run_alone(self, activations: Activations) -> Pass:
        """As :meth:`run`, in the fastest way for a training step of one SAE; not under ``torch.vmap``."""
        return self.run(activations)

    def losses(
        self, activations: Activations, passed: Pass, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """What training minimises, for each row; here :func:`salve.sae.losses.l1_losses` with λ ``sparsity``."""
        if isinstance(sparsity, float) and sparsity == 0:  # saves a look at every latent
            return squared_errors(activations, passed.reconstruction)
        return l1_losses(activations, passed.reconstruction, passed.latents, sparsity, self.signed)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Project the decoder's columns back to unit norm, in place."""
        normalise_columns(self.decoder)

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """Make an SAE that was trained on ``a / scale`` take raw ``a``: its latents grow by ``scale``.

        Only what has the unit of an activation changes; the decoder keeps its unit columns.
        """
        for name in self.in_units:
            getattr(self, name).mul_(scale)

    def learn_b_dec(self) -> None:
        """Train ``b_dec`` with the rest: the pre-encoder bias of Bricken et al. 2023."""
        b_dec = self.b_dec.clone()
        del self.b_dec
        self.b_dec = nn.Parameter(b_dec)

    @torch.no_grad()
    def start_from(self, rows: Activations, mean: Float[Tensor, " M"]) -> None:
        """Make the decoder's columns directions from the mean activation to rows, and the encoder follow.

        Columns that they are too few for, or whose rows are at the mean themselves, stay random.

        Args:
            rows: ``[n, M]``, at most d; drawn from all activations. mean: of all activations.
        """
        directions = rows - mean
        length = directions.norm(dim=1, keepdim=True)
        drawn = self.decoder.T[: len(rows)]
        self.decoder[:, : len(rows)] = torch.where(length > 0, directions / length, drawn).T
        self.encoder.copy_(self.decoder.T * self.start_strength())

    def start_strength(self) -> float:
        """What the encoder's rows start with: ``d > M`` columns together would give ``d / M`` times what is encoded."""
        return min(1.0, self.width / self.dictionary_size)

    @torch.no_grad()
    def restart(self, latents: Tensor, directions: Tensor) -> None:
        """Begin latents ``[L]`` anew along unit directions ``[L, M]``, with a weak encoder (Bricken et al. 2023)."""
        alive = torch.ones(self.dictionary_size, dtype=torch.bool, device=latents.device)
        alive[latents] = False
        strength = self.encoder[alive].norm(dim=1).mean() if alive.any() else 1.0
        self.decoder[:, latents] = directions.T
        self.encoder[latents] = 0.2 * strength * directions
        self.bias[latents] = 0


@torch.no_grad()
def normalise_columns(decoder: Tensor) -> None:
    """Scale the columns of ``[…, M, d]`` to unit norm, in place; a column of zeros stays."""
    decoder.div_(decoder.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(decoder.dtype).tiny))
