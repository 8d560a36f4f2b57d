# SPDX-License-Identifier: MIT
"""What a change of a network gains and loses, by groups of few images, and how much of that may be chance."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.editing.recalibrate import group_accuracies


def gains_worst_group(
    before: Bool[Tensor, " N"], after: Bool[Tensor, " N"], groups: Int[Tensor, " N"], objects: Int[Tensor, " N"]
) -> bool:
    """Whether the accuracy of the worst group rises by more than its standard error: on few images less is chance.

    The error is that of a share of as many images as the group has objects, since images of one object are one piece of
    evidence.

    Args:
        before, after: which images are right. groups, objects: of each image.
    """
    count = int(groups.max()) + 1
    was, found = (group_accuracies(right, groups, count).nan_to_num(torch.inf) for right in (before, after))
    worst, at = found.min(dim=0)
    error = (worst * (1 - worst) / len(objects[groups == at].unique())).sqrt()
    return bool(worst > was.min() + error)


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
