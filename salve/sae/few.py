"""Products with the few latents that may fire, at a cost that grows with their number and not with the dictionary."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.types import Activations, Latents


class Few(NamedTuple):
    """Latents chosen for each row: row ``n`` has ``columns[offsets[n] : offsets[n + 1]]``, with their values.

    Attributes:
        offsets: ``[N + 1]``. columns: ``[P]`` for the ``P`` pairs of a row and a latent. values: ``[P]``.
    """

    offsets: Int[Tensor, " N1"]
    columns: Int[Tensor, " P"]
    values: Float[Tensor, " P"]

    def within(self, start: int, stop: int) -> "Few":
        """Only the latents ``start … stop − 1``."""
        kept = (self.columns >= start) & (self.columns < stop)
        before = F.pad(kept.cumsum(dim=0), (1, 0))
        return Few(before[self.offsets], self.columns[kept], self.values[kept])

    def decode(self, decoder: Float[Tensor, "M d"]) -> Activations:
        """``D z`` ``[N, M]``, without a shift."""
        # A row is a bag of decoder columns, summed with the latents as weights.
        return F.embedding_bag(
            self.columns, decoder.T, self.offsets, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )

    def dense(self, like: Latents) -> Latents:
        """As latents ``[N, d]`` of the shape of ``like``, without a gradient."""
        rows = torch.repeat_interleave(self.offsets.diff())
        return torch.zeros_like(like).index_put_((rows, self.columns), self.values.detach().to(like.dtype))


def chosen_by(mask: Bool[Tensor, "N d"]) -> tuple[Int[Tensor, " N1"], Int[Tensor, " P"]]:
    """Offsets and columns of :class:`Few` for latents that a mask names."""
    return F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)), mask.nonzero()[:, 1]


def ranked(indices: Int[Tensor, "N k"]) -> tuple[Int[Tensor, " N1"], Int[Tensor, " P"]]:
    """Offsets and columns of :class:`Few` for ``k`` latents of each row."""
    rows, k = indices.shape
    return torch.arange(0, rows * k + 1, k, device=indices.device), indices.flatten()


def encode_few(
    pre: Latents,
    activations: Activations,
    encoder: Float[Tensor, "d M"],
    bias: Float[Tensor, " d"],
    offsets: Int[Tensor, " N1"],
    columns: Int[Tensor, " P"],
) -> Few:
    """Pre-activations ``E a + b`` of chosen latents, with a gradient that is computed for those only.

    Args:
        pre: ``[N, d]``, all pre-activations, computed without a gradient. activations: ``[N, M]``, centred already.
    """
    values: Tensor = _Encode.apply(pre, activations, encoder, bias, offsets, columns)
    return Few(offsets, columns, values)


class _Encode(torch.autograd.Function):
    """Entries of ``A Eᵀ + b``: ``∂/∂E_l = Σ_n g_nl a_n``, ``∂/∂b_l = Σ_n g_nl``, ``∂/∂a_n = Σ_l g_nl E_l``."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, activations: Tensor, encoder: Tensor, bias: Tensor, offsets: Tensor, columns: Tensor
    ) -> Tensor:
        ctx.save_for_backward(activations, encoder, offsets, columns)
        rows = torch.repeat_interleave(offsets.diff())
        return pre[rows, columns].to(encoder.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        activations, encoder, offsets, columns = ctx.saved_tensors
        rows = torch.repeat_interleave(offsets.diff())
        size = len(encoder)
        # The other way around, a latent is a bag of activations.
        order = columns.argsort()
        starts = F.pad(torch.bincount(columns, minlength=size).cumsum(dim=0), (1, 0))
        by_latent = Few(starts, rows[order], gradient[order]).decode(activations.T)
        bias = torch.zeros_like(encoder[:, 0]).index_add_(0, columns, gradient)
        inputs = Few(offsets, columns, gradient).decode(encoder.T) if ctx.needs_input_grad[1] else None
        return None, inputs, by_latent, bias, None, None
