# SPDX-License-Identifier: MIT
"""Capacity: how many classes can be edited one after the other, told from the gates alone (docs/method.md, Capacity).

The gates of several edits multiply, so that closed channels only add up. A class that no edit names loses its channels
to the others' edits all the same.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salve.types import UserError


def closed_shares(gates: Float[Tensor, "C M"], order: Sequence[int]) -> Float[Tensor, "steps C"]:
    """How much of each class's channels the edits of other classes have closed: 1 is as much as its own edit closes.

    With ``w_i = 1 − s_i``, what class i's own edit closes, and ``S_E = Π_{k∈E} s_k``, the gate of edits ``E``, it is
    ``⟨w_i, 1 − S_E⟩ / ⟨w_i, w_i⟩``.

    Args:
        gates: ``[C, M]`` in 0 … 1, the gate of each class's own edit.
        order: ``K`` different classes, in the order in which they are edited.

    Returns:
        Row k is after the first k edits. NaN for a class whose own edit closes nothing.

    Raises:
        UserError: a gate below 0 or above 1: it enhances.
    """
    if bool(((gates < 0) | (gates > 1)).any()):
        raise UserError("A capacity is that of edits that suppress, whose gates lie between 0 and 1.")
    closes = 1 - gates  # [C, M]
    together = torch.cat([torch.ones_like(gates[:1]), gates[list(order)].cumprod(dim=0)])  # [K + 1, M]
    return (1 - together) @ closes.T / closes.square().sum(dim=1)


def kept_by_gates(gates: Float[Tensor, "C M"], order: Sequence[int]) -> Bool[Tensor, "steps C"]:
    """Whether the gates say that a class is kept, edit after edit: less of its channels is closed than its own edit
    would close; see :func:`closed_shares`."""
    return ~(closed_shares(gates, order) >= 1)


def untouched(count: int, order: Sequence[int]) -> Bool[Tensor, "steps C"]:
    """Which of ``count`` classes are not edited yet, after each edit of an order."""
    found = torch.ones(len(order) + 1, count, dtype=torch.bool)
    for step, edited in enumerate(order, start=1):
        found[step:, edited] = False
    return found


def capacity(kept: Bool[Tensor, "steps C"], order: Sequence[int]) -> int:
    """The largest number of edits up to which at least half of the classes not edited are kept, all along the way.

    Args:
        kept: whether a class is kept, edit after edit. order: the classes edited.

    Returns:
        0 … K. It is K, too, where no class is left that is not edited.
    """
    others = untouched(kept.shape[1], order)
    holds = (kept & others).sum(dim=1) * 2 >= others.sum(dim=1)
    return int(holds.int().cumprod(dim=0).sum()) - 1
