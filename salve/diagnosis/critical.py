"""Critical strengths: the α at which an image's class gives way (METHOD §5, Law 2)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from salve.types import Activations, Contribution, Labels, UserError

Criterion = Literal["logit", "flip"]
Method = Literal["exact", "linear"]

#: Elements of the largest intermediate tensor; bounds memory to about a quarter of a gigabyte in float64.
_BLOCK = 2**23


def critical_strength(
    weight: Float[Tensor, "C M"],
    bias: Float[Tensor, " C"],
    activations: Activations,
    contribution: Contribution,
    labels: Labels,
    criterion: Criterion = "flip",
    method: Method = "exact",
) -> Float[Tensor, " N"]:
    """The smallest strength of suppression at which each image's class gives way.

    With ``y_i(α) = b_i + Σ_j w_ij a_j max(0, 1 − α |c_j|)`` and ``i`` the image's label:

    - ``logit``: ``y_i`` reaches zero (Flovik 2025);
    - ``flip``: ``y_i`` no longer exceeds every other class's logit, so the prediction leaves ``i``.

    ``exact`` uses that ``y(α)`` is piecewise linear with breakpoints ``1/|c_j|``: between two of them it is
    ``P − α Q`` with reversed cumulative sums ``P, Q`` over the channels in order of ``|c|``, so the first crossing
    needs no root finder. ``linear`` is the published approximation ``y(0) / Σ_j w_ij a_j |c_j|``, exact while no
    channel is closed (``α max |c| < 1``).

    Args:
        weight: ``[C, M]`` and bias: ``[C]`` of the linear reader.
        activations: ``[N, M]``, finite.
        contribution: ``[M]`` of the latent.
        labels: ``[N]``, the class to watch for each image.
        criterion: ``logit`` or ``flip``.
        method: ``exact`` or ``linear``.

    Returns:
        ``[N]``: 0 where the class does not hold even without an edit, +inf where it never gives way.

    Raises:
        UserError: unknown criterion or method, labels outside ``0 … C−1``, activations that are not finite.

    Cost:
        ``N·M`` for ``logit`` and ``N·C·M`` for ``flip``, in time; memory is bounded by blocks over images.
    """
    if criterion not in ("logit", "flip"):
        raise UserError(f"criterion={criterion} is unknown; choose logit or flip.")
    if method not in ("exact", "linear"):
        raise UserError(f"method={method} is unknown; choose exact or linear.")
    if not bool(activations.isfinite().all()):
        raise UserError("Critical strengths need finite activations; some are NaN or infinite.")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(weight)):
        raise UserError(f"Labels must lie in 0 … {len(weight) - 1}, the classes of the reader.")
    solve = _first_crossing if method == "exact" else _linear_crossing
    # Cancellation in the cumulative sums is worst where closed channels dominate: float64 inside, whatever comes in.
    wide, offset, strength = weight.double(), bias.double(), contribution.double().abs()
    rows = max(1, _BLOCK // (weight.shape[1] * (len(weight) if criterion == "flip" else 1)))
    found = []
    for block, own in zip(activations.double().split(rows), labels.split(rows), strict=True):
        if criterion == "logit":
            terms, constant = wide[own] * block, offset[own]  # [n, M], [n]
            found.append(solve(terms, constant, strength))
        else:
            terms = (wide[own][:, None] - wide[None]) * block[:, None]  # [n, C, M], one row per rival
            crossing = solve(terms, offset[own][:, None] - offset[None], strength)  # [n, C]
            crossing.scatter_(1, own[:, None], torch.inf)  # a class is no rival of itself
            found.append(crossing.amin(dim=1))
    return torch.cat(found).to(activations.dtype) if found else activations.new_zeros(0)


def _first_crossing(
    terms: Float[Tensor, "*rows M"], constant: Float[Tensor, "*rows"], strength: Contribution
) -> Float[Tensor, "*rows"]:
    """Smallest ``α ≥ 0`` with ``f(α) = constant + Σ_j terms_j max(0, 1 − α strength_j) ≤ 0``, else +inf."""
    order = strength.argsort(descending=True)
    size, terms = strength[order], terms[..., order]
    active = int((size > torch.finfo(size.dtype).tiny).sum())  # below, 1/|c| overflows: such a channel never closes
    # open_k and slope_k sum over the channels still open between breakpoints k−1 and k (none closed before k = 0).
    open_sum = terms.flip(-1).cumsum(-1).flip(-1) + constant[..., None]
    slope = (terms * size).flip(-1).cumsum(-1).flip(-1)
    start = open_sum[..., 0]
    if active == 0:
        return torch.where(start <= 0, 0.0, torch.inf).to(terms.dtype)
    breakpoints = 1 / size[:active]
    # The value at each breakpoint, from the segment that ends there.
    ends = open_sum[..., :active] - breakpoints * slope[..., :active]
    # At the last breakpoint only untouched channels are left: summing them directly keeps an exact zero a zero.
    rest = terms[..., active:].sum(-1) + constant
    ends = torch.cat([ends[..., :-1], rest[..., None]], dim=-1)
    below = ends <= 0
    segment = below.to(torch.uint8).argmax(dim=-1, keepdim=True)  # the first segment that ends at or below zero
    p, q = open_sum.gather(-1, segment)[..., 0], slope.gather(-1, segment)[..., 0]
    upper = breakpoints[segment[..., 0]]
    lower = torch.where(segment[..., 0] > 0, breakpoints[(segment[..., 0] - 1).clamp_min(0)], torch.zeros_like(upper))
    root = torch.where(q > 0, p / torch.where(q > 0, q, torch.ones_like(q)), upper)
    root = torch.minimum(torch.maximum(root, lower), upper)
    root = torch.where(below.any(dim=-1), root, torch.inf)
    return torch.where(start <= 0, torch.zeros_like(root), root)


def _linear_crossing(
    terms: Float[Tensor, "*rows M"], constant: Float[Tensor, "*rows"], strength: Contribution
) -> Float[Tensor, "*rows"]:
    """The approximation ``f(0) / Σ_j terms_j strength_j``; +inf where ``f`` does not fall."""
    start, fall = terms.sum(-1) + constant, terms @ strength
    root = torch.where(fall > 0, start / torch.where(fall > 0, fall, torch.ones_like(fall)), torch.inf)
    return torch.where(start <= 0, torch.zeros_like(root), root)
