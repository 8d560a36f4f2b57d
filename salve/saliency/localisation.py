# SPDX-License-Identifier: MIT
"""Scores for saliency maps: do they lie on the object, and does the latent depend on the pixels that they mark?

Compare each score with a control: the score of a random latent's map, or of a random map.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from salve.types import UserError


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> Float[Tensor, " N"]:
    """Whether the maximum of each map lies on the object: 1 for a hit, 0 for a miss (Zhang et al. 2018).

    Maps that are enlarged from a coarse grid have plateaus, mainly along the border. If several pixels share the
    maximum, the score is the share of them in the mask: the expected score of choosing one of them at random. A
    constant map is a miss.

    Args:
        maps: ``[N, H, W]``.
        masks: boolean ``[N, H, W]``, True on the object.
        tolerance: pixels by which the object is widened in all directions; 0 for an exact hit.

    Returns:
        ``[N]`` in 0..1; NaN for an empty mask.

    Raises:
        UserError: shapes differ, a map is not finite, or the tolerance is negative.
    """
    _check_maps(maps, masks)
    if tolerance < 0:
        raise UserError(f"tolerance={tolerance} must be at least 0 pixels.")
    wide = F.max_pool2d(masks.to(maps.dtype).unsqueeze(1), 2 * tolerance + 1, stride=1, padding=tolerance).squeeze(1)
    high, low = maps.amax(dim=(1, 2)), maps.amin(dim=(1, 2))
    # Equal pixels of a plateau may differ by rounding.
    slack = 8 * torch.finfo(maps.dtype).eps * high.abs()
    tied = (maps >= (high - slack)[:, None, None]).to(maps.dtype)
    score = (tied * wide).sum(dim=(1, 2)) / tied.sum(dim=(1, 2))
    score = torch.where(high - low > slack, score, 0)
    return torch.where(masks.any(dim=2).any(dim=1), score, torch.nan)


def iou(maps: Tensor, masks: Tensor, fraction: float = 0.5) -> Float[Tensor, " N"]:
    """Intersection over union of each object with the part of its map that reaches ``fraction`` of the maximum.

    Args:
        maps: ``[N, H, W]``, ≥ 0, as :func:`salve.saliency.grad_fam` gives them.
        masks: boolean ``[N, H, W]``, True on the object.
        fraction: of each map's own maximum, in (0, 1].

    Returns:
        ``[N]`` in 0..1; 0 for a blank map; NaN for an empty mask.

    Raises:
        UserError: shapes differ, a map has negative values or is not finite, or the fraction is out of range.
    """
    _check_maps(maps, masks)
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction} must lie in (0, 1].")
    _refuse_negative(maps, "maximum")
    high = maps.amax(dim=(1, 2), keepdim=True)
    marked = (maps >= fraction * high) & (high > 0)
    union = (marked | masks).sum(dim=(1, 2))
    # An empty union, which needs an empty mask, gives 0/0 = NaN too.
    score = (marked & masks).sum(dim=(1, 2)).to(maps.dtype) / union.to(maps.dtype)
    return torch.where(masks.any(dim=2).any(dim=1), score, torch.nan)


def relevance_mass(maps: Tensor, masks: Tensor) -> Float[Tensor, " N"]:
    """Share of each map's sum that lies on the object.

    Args:
        maps: ``[N, H, W]``, ≥ 0. masks: boolean ``[N, H, W]``, True on the object.

    Returns:
        ``[N]`` in 0..1; 0 for a blank map; NaN for an empty mask.

    Raises:
        UserError: shapes differ, or a map has negative values or is not finite.

    Source: Arras et al. 2022 (CLEVR-XAI).
    """
    _check_maps(maps, masks)
    _refuse_negative(maps, "sum")
    total = maps.sum(dim=(1, 2))
    share = (maps * masks).sum(dim=(1, 2)) / torch.where(total > 0, total, 1)
    return torch.where(masks.any(dim=2).any(dim=1), share, torch.nan)


def relevance_rank(maps: Tensor, masks: Tensor) -> Float[Tensor, " N"]:
    """Share of the K most salient pixels that lie on the object, where K is the object's size.

    Pixels that share the value at which the K-th lies count with the share of them on the object: the expected score of
    choosing among them at random.

    Args:
        maps: ``[N, H, W]``. masks: boolean ``[N, H, W]``, True on the object.

    Returns:
        ``[N]`` in 0..1; of a constant map, the share of the image that the object covers; NaN for an empty mask.

    Raises:
        UserError: shapes differ, or a map is not finite.

    Source: Arras et al. 2022 (CLEVR-XAI).
    """
    _check_maps(maps, masks)
    flat, on = maps.flatten(1), masks.flatten(1)
    size = on.sum(dim=1, keepdim=True)  # [N, 1]
    last = flat.sort(dim=1, descending=True).values.gather(1, (size - 1).clamp(min=0))
    above, tied = flat > last, flat == last
    of_ties = (size - above.sum(dim=1, keepdim=True)) / tied.sum(dim=1, keepdim=True)
    score = ((above & on).sum(dim=1) + of_ties[:, 0] * (tied & on).sum(dim=1)) / size[:, 0]
    return torch.where(size[:, 0] > 0, score, torch.nan).to(maps.dtype)


def map_correlation(maps: Tensor, others: Tensor) -> Float[Tensor, " N"]:
    """Spearman's rank correlation of two maps of each image, over its pixels; ties share their mean rank.

    Args:
        maps, others: ``[N, H, W]``.

    Returns:
        ``[N]`` in −1..1, float64; NaN where a map is constant.

    Raises:
        UserError: shapes differ, or a map is not finite.
    """
    if maps.ndim != 3 or maps.shape != others.shape:
        raise UserError(f"Both maps must be [N, H, W], not {list(maps.shape)} and {list(others.shape)}.")
    if not (maps.isfinite().all() and others.isfinite().all()):
        raise UserError("maps must be finite, but some of their values are NaN or infinite.")
    ranks = [torch.from_numpy(stats.rankdata(one.flatten(1).cpu().numpy(), axis=1)) for one in (maps, others)]
    first, second = (one - one.mean(dim=1, keepdim=True) for one in ranks)
    norms = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(norms > 0, (first * second).sum(dim=1) / norms, torch.nan)


class InsertionDeletion(NamedTuple):
    """Areas under the insertion and the deletion curve, ``[N]`` each, in the unit of the score."""

    insertion: Float[Tensor, " N"]
    deletion: Float[Tensor, " N"]


@torch.no_grad()
def insertion_deletion_auc(
    score_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    baseline: Tensor | Callable[[Tensor, Tensor], Tensor],
    steps: int = 32,
    seed: int = 0,
) -> InsertionDeletion:
    """How fast a score falls as the most salient pixels are removed, and rises as they are inserted.

    With pixels in falling order of saliency, ``x_t`` replaces the first ``t`` of them by the baseline (deletion), or
    all but the first ``t`` (insertion). The area under ``score(x_t)`` over the fraction ``t/(HW)`` in 0..1 is computed
    by the trapezoid rule at ``steps + 1`` even fractions. It is a mean score and not normalised: compare it with that
    of a random map. A faithful map has a high insertion area and a low deletion area.

    Args:
        score_fn: images ``[n, 3, H, W]`` → scores ``[n]``, such as the value of a latent; called once for each image,
            with ``2 (steps + 1)`` variants of it.
        images: ``[N, 3, H, W]``.
        maps: ``[N, H, W]``; equal pixels (such as the zeros of a Grad-FAM map) come in random order.
        baseline: the values of removed pixels, broadcast to the images: zeros (the mean colour of normalised images),
            or a blurred copy of the images. Or a function that fills them in: image ``[3, H, W]`` and boolean
            ``[H, W]``, True where a pixel is removed → image (:func:`salve.saliency.imputed`, as in ROAD).
        steps: intervals of each curve.
        seed: of the random order of equal pixels.

    Raises:
        UserError: shapes do not match, a map is not finite, or steps is below 1.

    Source: Petsiuk et al. 2018 (RISE).
    """
    if images.ndim != 4 or maps.shape != (len(images), *images.shape[2:]):
        raise UserError(f"maps {list(maps.shape)} must be [N, H, W] for images [N, 3, H, W], not {list(images.shape)}.")
    if not maps.isfinite().all():
        raise UserError("maps must be finite, but some of their values are NaN or infinite.")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1.")
    fill = baseline if callable(baseline) else None
    blanks = images if callable(baseline) else _expanded(baseline, images)
    pixels = maps[0].numel()
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(0, pixels, steps + 1, dtype=torch.float64, device=images.device).round()
    areas = []
    for image, saliency, blank in zip(images, maps, blanks, strict=True):
        shuffled = torch.randperm(pixels, generator=generator).to(images.device)
        order = shuffled[saliency.flatten()[shuffled].argsort(descending=True, stable=True)]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(pixels, device=images.device))
        first = (rank[None] < counts[:, None]).view(steps + 1, 1, *saliency.shape)  # the t most salient pixels
        removed = torch.cat([~first, first])  # for insertion, then for deletion
        if fill is None:
            variants = torch.where(removed, blank, image)
        else:
            variants = torch.stack([fill(image, one[0]) for one in removed])
        scores = score_fn(variants).view(2, steps + 1)
        areas.append(torch.trapezoid(scores, (counts / pixels).to(scores.dtype), dim=1))
    insertion, deletion = torch.stack(areas, dim=1)
    return InsertionDeletion(insertion, deletion)


def _expanded(baseline: Tensor, images: Tensor) -> Tensor:
    try:
        return baseline.to(images).expand_as(images)
    except RuntimeError as error:
        raise UserError(f"baseline {list(baseline.shape)} does not fit images {list(images.shape)}.") from error


def _refuse_negative(maps: Tensor, what: str) -> None:
    if bool((maps < 0).any()):
        raise UserError(f"maps must not be negative, because a share of their {what} would then have no meaning.")


def _check_maps(maps: Tensor, masks: Tensor) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != torch.bool:
        raise UserError(
            f"maps and boolean masks must both be [N, H, W], not {list(maps.shape)} and {list(masks.shape)} "
            f"of {masks.dtype}."
        )
    if not maps.isfinite().all():
        raise UserError("maps must be finite, but some of their values are NaN or infinite.")
