# SPDX-License-Identifier: MIT
"""What a change of a network gains and loses, by groups of few images, and how much of that may be chance."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.editing.recalibrate import group_accuracies

#: How many of its standard errors a gain must exceed: as many as half of a 95 % interval has.
ERRORS = 2.0


def gains_worst_group(
    before: Bool[Tensor, " N"], after: Bool[Tensor, " N"], groups: Int[Tensor, " N"], objects: Int[Tensor, " N"]
) -> bool:
    """Whether the accuracy of the worst group rises by more than twice its standard error: less may be chance.

    Of ``k`` right images among ``n``, as many as the group has objects, since images of one object are one piece of
    evidence, let ``p = (k + ½) / (n + 1)``. The error of the gain is the root of the sum, over the worst group before
    and the worst one after, of ``p (1 − p) / n``. That ``p`` is never 0 or 1, so that a group of one image, which is
    always quite wrong or quite right, shows nothing. Images are not taken as pairs, which is on the safe side.

    Args:
        before, after: which images are right. groups, objects: of each image.
    """
    count = int(groups.max()) + 1
    worst, variance = [], 0.0
    for right in (before, after):
        share, at = group_accuracies(right, groups, count).nan_to_num(torch.inf).min(dim=0)
        few = len(objects[groups == at].unique())
        mean = (float(share) * few + 0.5) / (few + 1)
        variance += mean * (1 - mean) / few
        worst.append(float(share))
    return worst[1] - worst[0] > ERRORS * math.sqrt(variance)


def average_loss(
    before: Bool[Tensor, " N"], after: Bool[Tensor, " N"], groups: Int[Tensor, " N"], shares: Float[Tensor, " G"]
) -> float:
    """What the average over groups loses at least: its loss, paired by image, less its standard error.

    With the mean ``m_g`` and the variance ``v_g`` over the ``n_g`` images of a group of what each loses (1, 0 or −1),
    and the group's share ``s_g``, it is ``Σ_g s_g m_g − √(Σ_g s_g² v_g / n_g)``.

    Args:
        before, after: which images are right. groups: of each image.
        shares: of the groups, of any sum above 0; groups without images are left out.

    Returns:
        A share, negative where the average may have gained.
    """
    lost = before.double() - after.double()
    counts = torch.bincount(groups, minlength=len(shares))
    share = shares.double() * (counts > 0)
    share = share / share.sum()
    few = counts.clamp_min(1)
    mean = torch.bincount(groups, lost, len(shares)) / few
    variance = torch.bincount(groups, lost.square(), len(shares)) / few - mean.square()
    return float(share @ mean - (share.square() @ (variance.clamp_min(0) / few)).sqrt())
