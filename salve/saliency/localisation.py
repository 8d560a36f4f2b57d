"""Numbers for a saliency map: does it lie on the object, and does the latent depend on the pixels it marks?

Each is worth reading only beside its control: the same score for a random latent's map, or for a random map.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from matplotlib import colormaps
from torch import Tensor
from torch.nn import functional as F

from salve.types import Images, UserError


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> Float[Tensor, " N"]:
    """Whether the maximum of each map lies on the object: 1 for a hit, 0 for a miss (Zhang et al. 2018).

    Maps that were enlarged from a coarse grid have plateaus, above all along the border. When several pixels share
    the maximum, the score is the share of them that lies in the mask: the expected score of pointing at one of them at
    random. A constant map points nowhere and is a miss.

    Args:
        maps: ``[N, H, W]``.
        masks: boolean ``[N, H, W]``, True on the object.
        tolerance: pixels by which the object is widened, to all sides and diagonally; 0 for an exact hit.

    Returns:
        ``[N]`` in 0..1; NaN where the mask is empty, since there is nothing to point at.

    Raises:
        UserError: shapes differ, a map is not finite, or a negative tolerance.
    """
    _check_maps(maps, masks)
    if tolerance < 0:
        raise UserError(f"tolerance={tolerance} must be at least 0 pixels.")
    wide = F.max_pool2d(masks.to(maps.dtype).unsqueeze(1), 2 * tolerance + 1, stride=1, padding=tolerance).squeeze(1)
    high, low = maps.amax(dim=(1, 2)), maps.amin(dim=(1, 2))
    # Pixels that interpolation made equal may still differ by rounding.
    slack = 8 * torch.finfo(maps.dtype).eps * high.abs()
    tied = (maps >= (high - slack)[:, None, None]).to(maps.dtype)
    score = (tied * wide).sum(dim=(1, 2)) / tied.sum(dim=(1, 2))
    score = torch.where(high - low > slack, score, 0)
    return torch.where(masks.any(dim=2).any(dim=1), score, torch.nan)


def iou(maps: Tensor, masks: Tensor, fraction: float = 0.5) -> Float[Tensor, " N"]:
    """Intersection over union of each object with the part of its map that reaches ``fraction`` of the maximum.

    Args:
        maps: ``[N, H, W]``, ≥ 0, as ``grad_fam`` gives them.
        masks: boolean ``[N, H, W]``, True on the object.
        fraction: of each map's own maximum, in (0, 1].

    Returns:
        ``[N]`` in 0..1; 0 for a blank map; NaN where the mask is empty.

    Raises:
        UserError: shapes differ, a map is negative somewhere or not finite, or the fraction is out of range.
    """
    _check_maps(maps, masks)
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction} must lie in (0, 1].")
    if bool((maps < 0).any()):
        raise UserError("maps must not be negative, since a share of the maximum would then mean nothing.")
    high = maps.amax(dim=(1, 2), keepdim=True)
    marked = (maps >= fraction * high) & (high > 0)
    union = (marked | masks).sum(dim=(1, 2))
    # An empty union, possible only with an empty mask, gives 0/0 = NaN as well.
    score = (marked & masks).sum(dim=(1, 2)).to(maps.dtype) / union.to(maps.dtype)
    return torch.where(masks.any(dim=2).any(dim=1), score, torch.nan)


class InsertionDeletion(NamedTuple):
    """Areas under the two curves, ``[N]`` each, in the unit of the score."""

    insertion: Float[Tensor, " N"]
    deletion: Float[Tensor, " N"]


@torch.no_grad()
def insertion_deletion_auc(
    score_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    baseline: Tensor,
    steps: int = 32,
    seed: int = 0,
) -> InsertionDeletion:
    """How fast a score falls as the most salient pixels are taken away, and rises as they are put in.

    With the pixels in falling order of saliency, ``x_t`` replaces the first ``t`` of them by the baseline (deletion),
    or replaces all but the first ``t`` (insertion). The area under ``score(x_t)`` over the fraction ``t/(HW)`` in 0..1
    is taken by the trapezoid rule at ``steps + 1`` even fractions. It is a mean score, not scaled to the score's
    range: compare it with that of a random map. A faithful map has a high insertion and a low deletion area.

    Args:
        score_fn: images ``[n, 3, H, W]`` → scores ``[n]``, such as the value of a latent; called once for each image,
            with ``2 (steps + 1)`` variants of it.
        images: ``[N, 3, H, W]``.
        maps: ``[N, H, W]``. Tied pixels (such as the zeros of a Grad-FAM map) are taken in random order.
        baseline: what removed pixels become; anything that broadcasts to the images: zeros (the mean colour of
            normalised images), or a blurred copy of the images.
        steps: parts that each curve is cut into.
        seed: of the random order of tied pixels.

    Raises:
        UserError: shapes that do not match, a map that is not finite, steps < 1.

    Source: Petsiuk et al. 2018 (RISE).
    """
    if images.ndim != 4 or maps.shape != (len(images), *images.shape[2:]):
        raise UserError(f"maps {list(maps.shape)} must be [N, H, W] for images [N, 3, H, W], not {list(images.shape)}.")
    if not maps.isfinite().all():
        raise UserError("maps must be finite, but some of their values are NaN or infinite.")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1.")
    try:
        baseline = baseline.to(images).expand_as(images)
    except RuntimeError as error:
        raise UserError(f"baseline {list(baseline.shape)} does not fit images {list(images.shape)}.") from error
    pixels = maps[0].numel()
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(0, pixels, steps + 1, dtype=torch.float64, device=images.device).round()
    areas = []
    for image, saliency, blank in zip(images, maps, baseline, strict=True):
        shuffled = torch.randperm(pixels, generator=generator).to(images.device)
        order = shuffled[saliency.flatten()[shuffled].argsort(descending=True, stable=True)]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(pixels, device=images.device))
        first = (rank[None] < counts[:, None]).view(steps + 1, 1, *saliency.shape)  # the t most salient pixels
        variants = torch.cat([torch.where(first, image, blank), torch.where(first, blank, image)])
        scores = score_fn(variants).view(2, steps + 1)
        areas.append(torch.trapezoid(scores, (counts / pixels).to(scores.dtype), dim=1))
    insertion, deletion = torch.stack(areas, dim=1)
    return InsertionDeletion(insertion, deletion)


def overlay(images: Tensor, maps: Tensor, opacity: float = 0.7, colormap: str = "inferno") -> Images:
    """Maps drawn over their images, for people to look at.

    Each map is scaled to 0..1 by its own minimum and maximum; a pixel of scaled saliency ``s`` shows
    ``(1 − opacity·s)·image + opacity·s·colour(s)``, so the image stays as it is where nothing is salient, and whole
    under a constant map.

    Args:
        images: ``[N, 3, H, W]`` in 0..1.
        maps: ``[N, H, W]``.
        opacity: of the colour at the maximum, in 0..1.
        colormap: name of a matplotlib colour map.

    Returns:
        ``[N, 3, H, W]`` in 0..1.

    Raises:
        UserError: images outside 0..1, or shapes that do not match.
    """
    if images.ndim != 4 or maps.shape != (len(images), *images.shape[2:]):
        raise UserError(f"maps {list(maps.shape)} must be [N, H, W] for images [N, 3, H, W], not {list(images.shape)}.")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise UserError("images must lie in 0..1 to be drawn on; undo their normalisation first.")
    low = maps.amin(dim=(1, 2), keepdim=True)
    scaled = (maps - low) / (maps.amax(dim=(1, 2), keepdim=True) - low).clamp_min(torch.finfo(maps.dtype).tiny)
    palette = torch.tensor(colormaps[colormap](range(256))[:, :3], dtype=images.dtype, device=images.device)  # [256, 3]
    colour = palette[(scaled * 255).round().long()].permute(0, 3, 1, 2)
    weight = (opacity * scaled).to(images.dtype).unsqueeze(1)
    return (1 - weight) * images + weight * colour


def _check_maps(maps: Tensor, masks: Tensor) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != torch.bool:
        raise UserError(
            f"maps and boolean masks must both be [N, H, W], not {list(maps.shape)} and {list(masks.shape)} "
            f"of {masks.dtype}."
        )
    if not maps.isfinite().all():
        raise UserError("maps must be finite, but some of their values are NaN or infinite.")
