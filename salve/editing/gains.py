# SPDX-License-Identifier: MIT
"""What a change of a network gains and loses, by groups of few images, and how much of that may be chance."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.editing.recalibrate import group_accuracies

#: How many of its standard errors a gain must exceed: as many as half of a 95 % interval has.
ERRORS = 2.0


def gains_by_groups(
    before: Bool[Tensor, " N"], after: Bool[Tensor, " N"], groups: Int[Tensor, " N"], objects: Int[Tensor, " N"]
) -> bool:
    """Whether the worst group gains, and the mean over groups gains more than twice its standard error.

    The worst group alone has too few images to tell a gain from chance; the mean over groups, in which small groups
    count as much as large ones, has all of them. With what each image gains, ``d_i`` (1, 0 or −1), the number ``n_g``
    of images of its group and the number ``G`` of groups, the gain is the sum of ``d_i / (G n_g)``. Its error is the
    root of the sum over objects of the squares of what each adds to it: images of one object are one piece of evidence,
    and where nothing is gained, either sign is as likely for each. Of one group, this is McNemar's test.

    Args:
        before, after: which images are right. groups, objects: of each image.
    """
    counts = torch.bincount(groups)
    worst_before, worst_after = (
        group_accuracies(right, groups, len(counts)).nan_to_num(torch.inf).min() for right in (before, after)
    )
    gained = (after.double() - before.double()) / (counts[groups] * int((counts > 0).sum()))
    kinds, of_object = objects.unique(return_inverse=True)
    by_object = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, of_object, gained)
    return bool(worst_after > worst_before and gained.sum() > ERRORS * by_object.norm() + 1e-9)


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
