# SPDX-License-Identifier: MIT
"""MaxBoxAccV2: whether boxes around the salient parts of maps are those that people drew around the object."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from salve.types import UserError

#: IoU that a box must reach, as MaxBoxAccV2 has them.
OVERLAPS = (0.3, 0.5, 0.7)
#: Thresholds that are tried, as shares of each map's range.
THRESHOLDS = tuple(step / 50 for step in range(50))
#: Pixels that touch at an edge or at a corner are one part.
_TOUCHING = np.ones((3, 3), dtype=int)


def box_hits(
    maps: Float[Tensor, "N H W"],
    boxes: Sequence[Float[Tensor, "B 4"]],
    thresholds: Sequence[float] = THRESHOLDS,
    overlaps: Sequence[float] = OVERLAPS,
) -> Bool[Tensor, "N T D"]:
    """Whether a box is found in each image, by threshold and IoU.

    A map is scaled to 0..1. Around each connected part that reaches the threshold lies a box. It is a hit if the
    best IoU of any of these boxes with any true one is at least the overlap. A constant map has no box.

    Args:
        maps: ``[N, H, W]``. boxes: of each image at least one, ``x0, y0, x1, y1`` in pixels of the map; a pixel with
            the number x covers x to x + 1.
        thresholds: ``T``, in 0..1. overlaps: ``D``.

    Raises:
        UserError: there are no images, not as many lists of boxes as maps, an empty list, or a map that is not finite.

    Source: Choe et al. 2020, *Evaluating weakly supervised object localization methods right* (their code also draws
    boxes around holes).
    """
    if maps.ndim != 3 or not len(maps) or len(maps) != len(boxes) or not all(len(one) for one in boxes):
        raise UserError(
            f"maps {list(maps.shape)} must be [N, H, W] with at least one image, and each of them needs a box; there "
            f"are boxes of {sum(len(one) > 0 for one in boxes)} images."
        )
    if not maps.isfinite().all():
        raise UserError("maps must be finite, but some of their values are NaN or infinite.")
    hits = np.zeros((len(maps), len(thresholds), len(overlaps)), dtype=bool)
    for hit, saliency, true in zip(hits, maps.double().cpu().numpy(), boxes, strict=True):
        low, high = saliency.min(), saliency.max()
        if high <= low:
            continue
        scaled, drawn = (saliency - low) / (high - low), true.double().cpu().numpy()
        best = [_best_overlap(scaled >= threshold, drawn) for threshold in thresholds]
        hit[:] = np.array(best)[:, None] >= np.array(overlaps)
    return torch.from_numpy(hits)


def box_accuracy(
    maps: Float[Tensor, "N H W"],
    boxes: Sequence[Float[Tensor, "B 4"]],
    thresholds: Sequence[float] = THRESHOLDS,
    overlaps: Sequence[float] = OVERLAPS,
) -> Float[Tensor, "T D"]:
    """Share of the images in which a box is found, by threshold and IoU: the mean of :func:`box_hits`.

    Returns:
        ``[T, D]`` in 0..1, float64.
    """
    return box_hits(maps, boxes, thresholds, overlaps).double().mean(dim=0)


def max_box_acc_v2(chosen_on: Float[Tensor, "T D"], reported_on: Float[Tensor, "T D"]) -> float:
    """MaxBoxAccV2: the mean over overlaps of the accuracy at the best threshold of each.

    The threshold is chosen on some images and the accuracy is that of others, so that it is not flattered. With the
    same images for both it is the score as published.

    Args:
        chosen_on, reported_on: of :func:`box_accuracy`.
    """
    if chosen_on.shape != reported_on.shape:
        raise UserError(f"Accuracies {list(chosen_on.shape)} and {list(reported_on.shape)} must have the same shape.")
    return float(reported_on.gather(0, chosen_on.argmax(dim=0)[None]).mean())


def _best_overlap(marked: NDArray[np.bool_], true: NDArray[np.float64]) -> float:
    """The largest IoU of a box around a connected part with a true box."""
    parts = ndimage.find_objects(ndimage.label(marked, _TOUCHING)[0])
    found = np.array([[x.start, y.start, x.stop, y.stop] for y, x in parts], dtype=float)
    low = np.maximum(found[:, None, :2], true[None, :, :2])
    high = np.minimum(found[:, None, 2:], true[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=-1)  # [parts, boxes]
    area = [np.clip(one[:, 2:] - one[:, :2], 0, None).prod(axis=-1) for one in (found, true)]
    return float((common / (area[0][:, None] + area[1][None] - common)).max())
