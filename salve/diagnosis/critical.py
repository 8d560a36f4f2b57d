# SPDX-License-Identifier: MIT
"""Critical strengths: the α at which an image loses its class (docs/method.md, Law 2)."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from salve.backbones.tail import LinearTail
from salve.types import Activations, Contribution, Labels, UserError

Criterion = Literal["logit", "flip"]
Method = Literal["exact", "linear"]

#: Elements of the largest intermediate tensors: few enough to stay in a processor's cache.
_BLOCK = 2**18
#: Images at a time, at least: matrix products of fewer rows are slow.
_ROWS = 16


def critical_strength(
    tail: LinearTail,
    activations: Activations,
    contribution: Contribution,
    labels: Labels,
    criterion: Criterion = "flip",
    method: Method = "exact",
) -> Float[Tensor, " N"]:
    """The smallest strength of suppression at which each image loses its class.

    With ``y_i(α) = b_i + Σ_j w_ij a_j max(0, 1 − α |c_j|)`` and ``i`` the image's label:

    - ``logit``: ``y_i`` reaches zero (Flovik 2025);
    - ``flip``: ``y_i`` no longer exceeds every other class's logit, so that the prediction changes.

    ``exact`` uses that ``y(α)`` is piecewise linear with breakpoints ``1/|c_j|``. Between two of them it is
    ``P − α Q``, with reversed cumulative sums ``P, Q`` over the channels in order of ``|c|``, so that no root finder is
    needed. Neighbouring channels in this order form bins. A bin is skipped if the values at both of its ends are larger
    than the function can sag between them (see :class:`_Lines`), so that no crossing is missed. ``linear`` is the
    published approximation ``y(0) / Σ_j w_ij a_j |c_j|``, exact while no channel is closed (``α max |c| < 1``).

    Args:
        tail: the linear reader.
        activations: ``[N, M]``, finite.
        contribution: ``[M]`` of the latent.
        labels: ``[N]``, the class to watch for each image.
        criterion: ``logit`` or ``flip``.
        method: ``exact`` or ``linear``.

    Returns:
        ``[N]``: 0 for an image that does not have its class without an edit, +inf for one that never loses it.

    Raises:
        UserError: unknown criterion or method, labels outside ``0 … C−1``, or activations that are not finite.

    Cost:
        ``flip`` takes three matrix products of ``2·N·M·C`` flops (``linear``: two), ``logit`` a few passes over ``N·M``
        numbers. ``exact`` adds about twenty passes over ``N·C·√M`` (``logit``: ``N·√M``) numbers, for ``√M`` bins of
        ``√M`` channels. Blocks of images bound the memory.
    """
    if criterion not in ("logit", "flip"):
        raise UserError(f"criterion={criterion} is unknown; choose logit or flip.")
    if method not in ("exact", "linear"):
        raise UserError(f"method={method} is unknown; choose exact or linear.")
    if not bool(activations.isfinite().all()):
        raise UserError("activations must be finite, but some of their values are NaN or infinite.")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(tail)):
        raise UserError(f"labels must lie in 0 … {len(tail) - 1}, the classes of the reader.")
    # Always float64, because the cumulative sums may cancel, most where closed channels dominate.
    reader = _Reader(tail.weight.double(), tail.bias.double(), contribution.double().abs())
    solve = _first_crossing if method == "exact" else _linear_crossing
    rivals = len(tail) if criterion == "flip" else 1
    rows = max(_ROWS, _BLOCK // max(tail.weight.shape[1], len(reader.size) * rivals))
    found = [
        solve(reader, block.double(), own, criterion)
        for block, own in zip(activations.split(rows), labels.split(rows), strict=True)
    ]
    return torch.cat(found).to(activations.dtype) if found else activations.new_zeros(0)


class _Reader:
    """The reader, with channels in rising order of ``|c|``: those that never close, and bins of those that close.

    Attributes:
        whole: ``[C, M]`` and bias: ``[C]``, as given. strength: ``[M]``, ``|c|``.
        open, closing: channels that never close, and those that do.
        weight: ``[C, B, S]``, of the channels that close, in ``B`` bins of ``S``.
        size, close: ``[B, S]``, their ``|c|`` and breakpoints ``1/|c|``.
        lower, upper: ``[B]``, the range of α in which a bin's channels close; it starts where the next bin's ends.
        sag: ``[B, S]``, how far ``max(0, 1 − α |c|)`` falls below its chord over this range.
    """

    def __init__(self, weight: Float[Tensor, "C M"], bias: Float[Tensor, " C"], strength: Contribution) -> None:
        self.whole, self.bias, self.strength = weight, bias, strength
        order = strength.argsort()
        closes = strength[order] > torch.finfo(strength.dtype).tiny  # below this, 1/|c| overflows
        self.open, self.closing = order[~closes], order[closes]
        self.side = max(1, math.isqrt(len(self.closing)))  # S; B + S is smallest if they are equal
        self.weight = self.binned(weight)
        size = strength[self.closing]
        # The last bin is filled up with channels of weight zero, which close with the strongest one.
        self.size = torch.cat([size, size[-1:].expand(-len(size) % self.side)]).view(-1, self.side)
        self.close = 1 / self.size
        self.upper = self.close[:, 0]
        self.lower = torch.cat([self.upper, self.upper.new_zeros(1)])[1:]
        width = (self.upper - self.lower).clamp_min(torch.finfo(size.dtype).tiny)[:, None]
        self.sag = self.size * (self.close - self.lower[:, None]) * ((self.upper[:, None] - self.close) / width)

    def binned(self, rows: Float[Tensor, "R M"]) -> Float[Tensor, "R B S"]:
        """From rows over all channels to rows over the bins."""
        chosen = F.pad(rows[:, self.closing], (0, -len(self.closing) % self.side))
        return chosen.view(len(rows), chosen.shape[1] // self.side, self.side)


class _Lines(NamedTuple):
    """The margin ``f`` that must stay positive, at the ends of the bins.

    There is one ``f`` for each image and rival class; for ``logit``, one for each image.

    At ``upper_b`` it is ``f = open_b − upper_b slope_b``; at 0 it is ``open_B``. Within bin b, ``f`` is nowhere more
    than ``sag_b`` below the smaller of its values at the two ends. Each channel contributes ``t max(0, 1 − α s)``
    with ``s = |c|``. If ``t > 0``, this is convex and at most ``t s (β − lower) (upper − β) / (upper − lower)`` below
    its chord (at the breakpoint β); otherwise it lies above its chord. ``sag`` adds these bounds up, with
    ``|w_i| + |w_m|`` as a bound of ``|w_i − w_m|``.
    """

    open: Float[Tensor, "B1 n R"]
    slope: Float[Tensor, "B1 n R"]
    sag: Float[Tensor, "B n R"]


def _lines(reader: _Reader, activations: Activations, labels: Labels, criterion: Criterion) -> _Lines:
    """Three matrix products for each bin, summed from the channels that close last."""
    closing = reader.binned(activations)
    untouched = activations[:, reader.open] @ reader.whole[:, reader.open].T + reader.bias  # [n, C]
    if criterion == "logit":
        untouched = untouched.gather(1, labels[:, None])
        terms = closing * reader.weight[labels]  # [n, B, S]
        each, falls = terms.sum(2).T[:, :, None], torch.einsum("nbs,bs->bn", terms, reader.size)[:, :, None]
        sag = torch.einsum("nbs,bs->bn", terms.abs(), reader.sag)[:, :, None]
    else:
        each = torch.einsum("nbs,cbs->bnc", closing, reader.weight)
        falls = torch.einsum("nbs,cbs->bnc", closing, reader.weight * reader.size)
        sag = torch.einsum("nbs,cbs->bnc", closing.abs(), reader.weight.abs() * reader.sag)
    open_sum = torch.cat([untouched[None], each]).cumsum(0)
    slope = torch.cat([torch.zeros_like(untouched)[None], falls]).cumsum(0)
    if criterion == "logit":
        return _Lines(open_sum, slope, sag)
    own = labels[None, :, None]

    def own_of(table: Tensor) -> Tensor:
        return table.gather(2, own.expand(len(table), -1, -1))

    return _Lines(own_of(open_sum) - open_sum, own_of(slope) - slope, own_of(sag) + sag)


def _first_crossing(
    reader: _Reader, activations: Activations, labels: Labels, criterion: Criterion
) -> Float[Tensor, " n"]:
    """The smallest ``α ≥ 0`` at which each image loses its class; +inf if there is none."""
    lines = _lines(reader, activations, labels, criterion)
    bins, start = len(reader.size), lines.open[-1]
    ends = torch.cat([lines.open[:-1] - reader.upper[:, None, None] * lines.slope[:-1], start[None]])
    maybe = torch.minimum(ends[:-1], ends[1:]) <= lines.sag  # [B, n, R]
    lost = start <= 0
    if criterion == "flip":  # a class is no rival of itself
        maybe.scatter_(2, labels[None, :, None].expand(bins, -1, -1), False)
        lost.scatter_(1, labels[:, None], False)
    found = torch.where(lost.any(dim=1), 0.0, torch.inf).to(start.dtype)
    left = maybe.any(dim=2) & (found > 0)  # [B, n], bins still to search
    number = torch.arange(1, bins + 1, device=left.device)[:, None]
    while left.any():
        first = (left * number).amax(dim=0) - 1  # [n], −1 if no bin is left; the last bin closes first
        images = (first >= 0).nonzero()[:, 0]
        which, rivals = maybe[first[images], images].nonzero(as_tuple=True)
        image = images[which]
        roots = _search(reader, lines, activations, labels, criterion, first[image], image, rivals)
        nearest = found[images].scatter_reduce(0, which, roots, "amin")
        found[images] = nearest
        left[first[images], images] = False
        left[:, images[nearest.isfinite()]] = False
    return found


def _search(
    reader: _Reader,
    lines: _Lines,
    activations: Activations,
    labels: Labels,
    criterion: Criterion,
    bins: Tensor,
    images: Tensor,
    rivals: Tensor,
) -> Float[Tensor, " p"]:
    """The first crossing in a bin, for ``p`` pairs of an image and a rival; +inf if there is none."""
    weight = reader.weight[labels[images], bins]  # [p, S]
    if criterion == "flip":
        weight = weight - reader.weight[rivals, bins]
    channels = F.pad(reader.closing, (0, -len(reader.closing) % reader.side)).view(-1, reader.side)[bins]
    terms = weight * activations[images[:, None], channels]
    size, close = reader.size[bins], reader.close[bins]
    at = (bins, images, rivals)
    # Sums over the channels that close later, before and after each channel; the later bins are included.
    open_sum = torch.cat([lines.open[at][:, None], terms], dim=1).cumsum(1)  # [p, S + 1]
    slope = torch.cat([lines.slope[at][:, None], terms * size], dim=1).cumsum(1)
    # At its own breakpoint a channel contributes zero; leaving it out keeps an exact zero exact.
    below = open_sum[:, :-1] - close * slope[:, :-1] <= 0
    last = (below * torch.arange(1, below.shape[1] + 1, device=below.device)).amax(dim=1, keepdim=True) - 1
    segment = last.clamp_min(0)
    p, q = open_sum.gather(1, segment + 1), slope.gather(1, segment + 1)
    upper = close.gather(1, segment)
    lower = torch.cat([close[:, 1:], reader.lower[bins][:, None]], dim=1).gather(1, segment)
    root = torch.where(q > 0, p / torch.where(q > 0, q, torch.ones_like(q)), upper)
    root = torch.minimum(torch.maximum(root, lower), upper)
    return torch.where(last >= 0, root, torch.inf)[:, 0]


def _linear_crossing(
    reader: _Reader, activations: Activations, labels: Labels, criterion: Criterion
) -> Float[Tensor, " n"]:
    """The linear approximation ``f(0) / Σ_j terms_j strength_j``; +inf if ``f`` does not fall."""
    own = labels[:, None]
    start = activations @ reader.whole.T + reader.bias  # [n, C]
    fall = activations @ (reader.whole * reader.strength).T
    if criterion == "logit":
        start, fall = start.gather(1, own), fall.gather(1, own)
    else:
        start, fall = start.gather(1, own) - start, fall.gather(1, own) - fall
    root = torch.where(fall > 0, start / torch.where(fall > 0, fall, torch.ones_like(fall)), torch.inf)
    root = torch.where(start <= 0, torch.zeros_like(root), root)
    if criterion == "flip":
        root.scatter_(1, own, torch.inf)
    return root.amin(dim=1)
