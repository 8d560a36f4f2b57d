# SPDX-License-Identifier: MIT
"""Critical strengths behind a tail that is not linear (docs/method.md, *Diagnose*).

There is no law to say where a logit crosses zero. So the first crossing is sought on a grid of strengths, which is part
of its definition, and then refined.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from salve.backbones.graph import GraphTail
from salve.diagnosis.critical import Criterion
from salve.types import Labels, UserError

#: Of a crossing, by how much it may lie above the true one within its interval of the grid.
TOLERANCE = 0.01
CRITERIA: tuple[Criterion, ...] = ("logit", "flip")


class Crossing(NamedTuple):
    """Where images lose their class: 0 without an edit, +inf at no strength of the grid.

    Attributes:
        logit, flip: ``[N]`` float64, the critical strengths.
        flip_grid: ``[N]`` float64, the strength of the grid at which the prediction is first found lost.
    """

    logit: Float[Tensor, " N"]
    flip: Float[Tensor, " N"]
    flip_grid: Float[Tensor, " N"]


@torch.no_grad()
def first_crossing(
    tail: GraphTail,
    contributions: Float[Tensor, "*N M"],
    labels: Labels,
    grid: Sequence[float],
    tolerance: float = TOLERANCE,
) -> Crossing:
    """The first strength of suppression on a grid at which each image loses its class, refined by bisection.

    The criteria are those of :func:`salve.diagnosis.critical_strength`. An interval of the grid whose ends both hold
    the class is not searched: a class that is lost and back between two strengths of the grid is not seen. Within the
    first interval that ends in a loss, bisection returns a strength at which the class is lost, and which lies at most
    ``tolerance`` of itself above one at which it is held.

    Args:
        tail: of the images.
        contributions: ``[M]`` of one latent, or ``[N, M]``, of each image's own latent.
        labels: ``[N]``, the class to watch for each image.
        grid: rising strengths.
        tolerance: relative width of the last interval.

    Raises:
        UserError: activations or logits that are NaN or infinite, labels that are no class, or a grid that does not
            rise.

    Cost:
        At most one pass of the tail over all images for each strength of the grid, and one for each halving: for each
        criterion 7 where an interval begins at half of its end, and more where it begins at 0. The scan ends when all
        images have lost both.
    """
    if any(not 0 <= low < high for low, high in pairwise(grid)):
        raise UserError(f"The strengths of a grid must rise from 0 or more, but are {list(grid)}.")
    _check(tail, labels)
    size = contributions.to(tail.activations).abs()

    def held(alphas: Tensor) -> Tensor:
        gate = (1 - alphas.to(size)[:, None] * size).clamp_min(0)  # [N, M], each image under its own strength
        return _margins(tail.gated(gate), labels) > 0

    nothing = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    low = nothing.expand(len(CRITERIA), -1).clone()  # [2, N], the last strength at which the class is held
    high = torch.where(held(nothing), torch.inf, low)  # the first at which it is lost
    for alpha in (one for one in grid if one > 0):
        waiting = high.isinf()
        if not waiting.any():
            break
        holds = held(nothing + alpha)
        low = torch.where(waiting & holds, alpha, low)
        high = torch.where(waiting & ~holds, alpha, high)
    flip_grid = high[1]
    logit, flip = (_bisected(held, at, low[at], high[at], tolerance) for at in range(len(CRITERIA)))
    return Crossing(logit, flip, flip_grid)


def _bisected(held: Callable[[Tensor], Tensor], criterion: int, low: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """Halve the intervals ``[N]`` of a criterion until they are narrow, and return their upper ends."""
    while (wide := high.isfinite() & (high - low > tolerance * high)).any():
        middle = torch.where(wide, (low + high) / 2, 0)
        holds = held(middle)[criterion]
        low = torch.where(wide & holds, middle, low)
        high = torch.where(wide & ~holds, middle, high)
    return high


def attributions(
    tail: GraphTail, labels: Labels, criterion: Criterion = "logit"
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N M"]]:
    """What each channel adds to the value that must stay positive, to first order: ``Σ_p a_jp ∂y/∂a_jp``.

    By the gate ``1 − α |c_j|`` the value falls by ``α Σ_j |c_j| attribution_j``, to first order in α. So one backward
    pass serves all latents: their effects are ``attributions @ |D|``.

    Args:
        tail: of the images. labels: ``[N]``, the class to watch for each image.
        criterion: ``logit``, the logit of the class; ``flip``, its lead over the strongest other class without an edit.

    Returns:
        The values ``[N]``, and the attributions of the channels ``[N, M]``.

    Raises:
        UserError: activations or logits that are NaN or infinite, or labels that are no class.
    """
    _check(tail, labels)
    with torch.enable_grad():
        activations = tail.activations.detach().requires_grad_()
        values = _margins(tail(activations), labels)[CRITERIA.index(criterion)]
        (gradient,) = torch.autograd.grad(values.sum(), activations)
    return values.detach(), (activations.detach() * gradient).sum(dim=1)


def linear_crossing(
    tail: GraphTail, contributions: Float[Tensor, "*N M"], labels: Labels, criterion: Criterion = "flip"
) -> Float[Tensor, " N"]:
    """The published approximation of a critical strength, ``y / R`` with ``R = Σ_j |c_j| attribution_j``.

    Behind a linear tail it is that of :func:`salve.diagnosis.critical_strength`, but that ``flip`` looks at one other
    class only, the strongest without an edit; another may take over before.

    Args:
        tail, contributions, labels: see :func:`first_crossing`. criterion: see :func:`attributions`.

    Returns:
        ``[N]`` float64: 0 for an image that does not have its class without an edit, +inf if the value does not fall.

    Raises:
        UserError: see :func:`attributions`.
    """
    start, channels = (found.double() for found in attributions(tail, labels, criterion))
    fall = (channels * contributions.to(channels).abs()).sum(dim=1)
    root = torch.where(fall > 0, start / torch.where(fall > 0, fall, 1), torch.inf)
    return torch.where(start > 0, root, 0)


def _check(tail: GraphTail, labels: Labels) -> None:
    if not bool(tail.activations.isfinite().all()):
        raise UserError("activations must be finite, but some of their values are NaN or infinite.")
    if len(labels) and int(labels.min()) < 0:
        raise UserError("labels must not be negative.")


def _margins(logits: Float[Tensor, "N C"], labels: Labels) -> Float[Tensor, "2 N"]:
    """What must stay positive for each criterion: the class's logit, and its lead over the strongest other class."""
    if len(labels) and int(labels.max()) >= logits.shape[1]:
        raise UserError(f"labels must lie in 0 … {logits.shape[1] - 1}, the classes of the network.")
    if not bool(logits.isfinite().all()):
        raise UserError(
            "The logits that the network makes of finite activations are NaN or infinite, so that no critical strength "
            "can be found; check its weights."
        )
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return torch.stack([own, own - others])
