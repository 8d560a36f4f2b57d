"""Products with the few latents that may fire, at a cost that grows with their number and not with the dictionary."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.types import Activations, Latents

#: Columns of a group in :func:`largest`.
GROUP = 4
#: Up to so many, NumPy's choice of the largest, which uses vector instructions and one thread, beats torch's.
THREADS = 4


class Pairs:
    """Latents chosen for each of ``N`` rows: row ``n`` has ``columns[offsets[n] : offsets[n + 1]]``.

    Args:
        offsets: ``[N + 1]``. columns: ``[P]`` for the ``P`` pairs of a row and a latent. size: ``d``.
    """

    def __init__(self, offsets: Int[Tensor, " N1"], columns: Int[Tensor, " P"], size: int) -> None:
        self.offsets, self.columns, self.size = offsets, columns, size

    @cached_property
    def rows(self) -> Int[Tensor, " P"]:
        """The row of each pair."""
        return torch.repeat_interleave(self.offsets.diff())

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " P"], Int[Tensor, " D1"], Int[Tensor, " P"]]:
        """The other way around: the pairs' order, where each latent begins and ends in it, and the rows."""
        # NumPy has a radix sort of small integers, ten times as fast as torch's sort.
        small = self.columns.to(torch.int16 if self.size <= 2**15 else torch.int32)
        order = torch.from_numpy(np.argsort(small.numpy(force=True), kind="stable")).to(self.columns.device)
        starts = F.pad(torch.bincount(self.columns, minlength=self.size).cumsum(dim=0), (1, 0))
        return order, starts, self.rows[order]

    def of_rows(self, table: Float[Tensor, "d M"], values: Float[Tensor, " P"]) -> Float[Tensor, "N M"]:
        """``Σ_l v_nl t_l`` for each row."""
        return _bags(table, self.columns, self.offsets, values)

    def of_latents(self, table: Float[Tensor, "N M"], values: Float[Tensor, " P"]) -> Float[Tensor, "d M"]:
        """``Σ_n v_nl t_n`` for each latent."""
        order, starts, rows = self.by_latent
        return _bags(table, rows, starts, values[order])


def _bags(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


class SparseLatents(NamedTuple):
    """Chosen latents, with their values ``[P]``."""

    pairs: Pairs
    values: Float[Tensor, " P"]

    def within(self, start: int, stop: int) -> "SparseLatents":
        """Only the latents ``start … stop − 1``."""
        offsets, columns = self.pairs.offsets, self.pairs.columns
        kept = (columns >= start) & (columns < stop)
        before = F.pad(kept.cumsum(dim=0), (1, 0))
        return SparseLatents(Pairs(before[offsets], columns[kept], self.pairs.size), self.values[kept])

    def decode(self, decoder: Float[Tensor, "M d"]) -> Activations:
        """``D z`` ``[N, M]``, without ``b_dec``."""
        rebuilt = self.pairs.of_rows(decoder.detach().T, self.values)
        added: Tensor = _DecoderGradient.apply(rebuilt, decoder, self.values.detach(), self.pairs)
        return added

    def dense(self, like: Latents) -> Latents:
        """As latents ``[N, d]`` of the shape of ``like``, without a gradient."""
        values = self.values.detach().to(like.dtype)
        return torch.zeros_like(like).index_put_((self.pairs.rows, self.pairs.columns), values)


def chosen_by(mask: Bool[Tensor, "N d"]) -> Pairs:
    """Latents that a mask names."""
    return Pairs(F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)), mask.nonzero()[:, 1], mask.shape[1])


def ranked(indices: Int[Tensor, "N k"], size: int) -> Pairs:
    """``k`` latents of ``size`` for each row."""
    rows, k = indices.shape
    return Pairs(torch.arange(0, rows * k + 1, k, device=indices.device), indices.flatten(), size)


def largest(values: Float[Tensor, "N d"], k: int) -> Int[Tensor, "N k"]:
    """Columns of the ``k`` largest values of each row, in no order.

    Choosing takes time with what there is to choose from. So the columns compete in groups: the ``k`` largest values
    are in the ``k`` groups with the largest maxima, since each of these groups has a value at least as large as any
    outside of them.
    """
    rows, columns = values.shape
    if columns < 8 * k:
        return _top(values, k)
    groups = -(-columns // GROUP)
    if short := GROUP * groups - columns:
        values = F.pad(values, (0, short), value=-torch.inf)
    # Group g has the columns g, g + groups, …
    table = values.view(rows, GROUP, groups)
    best = largest(table.amax(dim=1), k)
    among = table.gather(2, best[:, None].expand(rows, GROUP, k)).flatten(start_dim=1)
    first = torch.arange(0, GROUP * groups, groups, device=values.device)
    candidates = (best[:, None] + first[:, None]).flatten(start_dim=1)
    return candidates.gather(1, _top(among, k))


def _top(values: Float[Tensor, "N d"], k: int) -> Int[Tensor, "N k"]:
    """As :func:`largest`, of few columns."""
    if torch.get_num_threads() > THREADS:
        return values.topk(k, dim=1, sorted=False).indices
    columns = np.argpartition(values.detach().float().numpy(), -k, axis=1)[:, -k:]
    return torch.from_numpy(np.ascontiguousarray(columns))


def encode_sparse(
    pre: Latents,
    activations: Activations,
    encoder: Float[Tensor, "d M"],
    bias: Float[Tensor, " d"],
    pairs: Pairs,
) -> SparseLatents:
    """Pre-activations ``E a + b`` of chosen latents, with a gradient that is computed for those only.

    Args:
        pre: ``[N, d]``, all pre-activations, computed without a gradient. activations: ``[N, M]``, centred already.
    """
    values: Tensor = _Encode.apply(pre, activations, encoder, bias, pairs)
    return SparseLatents(pairs, values)


class _Encode(torch.autograd.Function):
    """Entries of ``A Eᵀ + b``: ``∂/∂E_l = Σ_n g_nl a_n``, ``∂/∂b_l = Σ_n g_nl``, ``∂/∂a_n = Σ_l g_nl E_l``."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, activations: Tensor, encoder: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(activations, encoder)
        ctx.pairs = pairs
        return pre[pairs.rows, pairs.columns].to(encoder.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        activations, encoder = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        by_latent = pairs.of_latents(activations, gradient)
        bias = torch.zeros_like(encoder[:, 0]).index_add_(0, pairs.columns, gradient)
        inputs = pairs.of_rows(encoder, gradient) if ctx.needs_input_grad[1] else None
        return None, inputs, by_latent, bias, None


class _DecoderGradient(torch.autograd.Function):
    """Nothing but a gradient: ``∂/∂D_l = Σ_n z_nl g_n`` of ``D z``, faster than ``embedding_bag`` has it."""

    @staticmethod
    def forward(ctx: Any, rebuilt: Tensor, decoder: Tensor, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values)
        ctx.pairs = pairs
        return rebuilt

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient], [values] = gradients, ctx.saved_tensors
        return gradient, ctx.pairs.of_latents(gradient.contiguous(), values).T, None, None
