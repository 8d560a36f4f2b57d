# SPDX-License-Identifier: MIT
"""Sparse latents: encoding, decoding and gradients whose cost grows with the latents that may fire, not with ``d``."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.types import Activations, Latents

#: Columns per group in :func:`largest`.
GROUP = 4
#: Up to this number of threads, NumPy's single-threaded but vectorised ``argpartition`` is faster than ``topk``.
THREADS = 4


class SparsePattern:
    """Positions of the entries of a sparse matrix ``[N, d]``, in CSR format.

    Args:
        offsets: ``[N + 1]``; row ``n`` has the columns ``columns[offsets[n] : offsets[n + 1]]``.
        columns: ``[P]``, the latent of each of the ``P`` entries.
        size: ``d``.
    """

    def __init__(self, offsets: Int[Tensor, " N1"], columns: Int[Tensor, " P"], size: int) -> None:
        self.offsets, self.columns, self.size = offsets, columns, size

    @cached_property
    def rows(self) -> Int[Tensor, " P"]:
        """The row of each entry."""
        return torch.repeat_interleave(self.offsets.diff())

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " P"], Int[Tensor, " D1"], Int[Tensor, " P"]]:
        """The same entries in CSC format: their order, where each latent begins in it, and their rows."""
        # NumPy sorts small integers by radix, ten times as fast as torch.
        small = self.columns.to(torch.int16 if self.size <= 2**15 else torch.int32)
        order = torch.from_numpy(np.argsort(small.numpy(force=True), kind="stable")).to(self.columns.device)
        starts = F.pad(torch.bincount(self.columns, minlength=self.size).cumsum(dim=0), (1, 0))
        return order, starts, self.rows[order]

    def sum_by_row(self, table: Float[Tensor, "d M"], values: Float[Tensor, " P"]) -> Float[Tensor, "N M"]:
        """``Σ_l v_nl t_l`` for each row ``n``."""
        return _bags(table, self.columns, self.offsets, values)

    def sum_by_latent(self, table: Float[Tensor, "N M"], values: Float[Tensor, " P"]) -> Float[Tensor, "d M"]:
        """``Σ_n v_nl t_n`` for each latent ``l``."""
        order, starts, rows = self.by_latent
        return _bags(table, rows, starts, values[order])


def _bags(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype), include_last_offset=True
    )


class SparseLatents(NamedTuple):
    """Latents ``[N, d]`` as a sparse matrix: its pattern and the values ``[P]`` of its entries."""

    pattern: SparsePattern
    values: Float[Tensor, " P"]

    def within(self, start: int, stop: int) -> "SparseLatents":
        """The entries of the latents ``start … stop − 1``."""
        offsets, columns = self.pattern.offsets, self.pattern.columns
        kept = (columns >= start) & (columns < stop)
        before = F.pad(kept.cumsum(dim=0), (1, 0))
        return SparseLatents(SparsePattern(before[offsets], columns[kept], self.pattern.size), self.values[kept])

    def decode(self, decoder: Float[Tensor, "M d"]) -> Activations:
        """``D z`` ``[N, M]``, without ``b_dec``."""
        rebuilt = self.pattern.sum_by_row(decoder.detach().T, self.values)
        added: Tensor = _DecoderGradient.apply(rebuilt, decoder, self.values.detach(), self.pattern)
        return added

    def dense(self, like: Latents) -> Latents:
        """As a dense tensor ``[N, d]`` of the dtype of ``like``, without gradient."""
        values = self.values.detach().to(like.dtype)
        return torch.zeros_like(like).index_put_((self.pattern.rows, self.pattern.columns), values)


def pattern_of_mask(mask: Bool[Tensor, "N d"]) -> SparsePattern:
    """The pattern of a mask's True entries."""
    return SparsePattern(F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)), mask.nonzero()[:, 1], mask.shape[1])


def pattern_of_indices(indices: Int[Tensor, "N k"], size: int) -> SparsePattern:
    """The pattern with ``k`` entries per row, given by their columns; ``size`` is ``d``."""
    rows, k = indices.shape
    return SparsePattern(torch.arange(0, rows * k + 1, k, device=indices.device), indices.flatten(), size)


def largest(values: Float[Tensor, "N d"], k: int) -> Int[Tensor, "N k"]:
    """Columns of the ``k`` largest values of each row, in no order.

    Faster than ``topk`` for many columns. Columns are divided into groups: the ``k`` largest values lie in the ``k``
    groups with the largest maxima, since each of these maxima is at least as large as any value outside these groups.
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
    """As :func:`largest`, for few columns."""
    if torch.get_num_threads() > THREADS:
        return values.topk(k, dim=1, sorted=False).indices
    columns = np.argpartition(values.detach().float().numpy(), -k, axis=1)[:, -k:]
    return torch.from_numpy(np.ascontiguousarray(columns))


def encode_sparse(
    pre: Latents,
    activations: Activations,
    encoder: Float[Tensor, "d M"],
    bias: Float[Tensor, " d"],
    pattern: SparsePattern,
) -> SparseLatents:
    """Pre-activations ``E a + b`` at a pattern's entries, with a gradient that is computed for these entries only.

    Args:
        pre: ``[N, d]``, all pre-activations, computed without gradient.
        activations: ``[N, M]``, minus ``b_dec``.
        encoder, bias: of the SAE.
        pattern: the entries.
    """
    values: Tensor = _Encode.apply(pre, activations, encoder, bias, pattern)
    return SparseLatents(pattern, values)


class _Encode(torch.autograd.Function):
    """Some entries of ``A Eᵀ + b``: ``∂/∂E_l = Σ_n g_nl a_n``, ``∂/∂b_l = Σ_n g_nl``, ``∂/∂a_n = Σ_l g_nl E_l``."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, activations: Tensor, encoder: Tensor, bias: Tensor, pattern: SparsePattern
    ) -> Tensor:
        ctx.save_for_backward(activations, encoder)
        ctx.pattern = pattern
        return pre[pattern.rows, pattern.columns].to(encoder.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        activations, encoder = ctx.saved_tensors
        pattern: SparsePattern = ctx.pattern
        by_latent = pattern.sum_by_latent(activations, gradient)
        bias = torch.zeros_like(encoder[:, 0]).index_add_(0, pattern.columns, gradient)
        inputs = pattern.sum_by_row(encoder, gradient) if ctx.needs_input_grad[1] else None
        return None, inputs, by_latent, bias, None


class _DecoderGradient(torch.autograd.Function):
    """The identity, with the gradient ``∂/∂D_l = Σ_n z_nl g_n`` of ``D z``: faster than ``embedding_bag``'s own."""

    @staticmethod
    def forward(ctx: Any, rebuilt: Tensor, decoder: Tensor, values: Tensor, pattern: SparsePattern) -> Tensor:
        ctx.save_for_backward(values)
        ctx.pattern = pattern
        return rebuilt

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient], [values] = gradients, ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None, None
        return gradient, ctx.pattern.sum_by_latent(gradient.contiguous(), values).T, None, None
