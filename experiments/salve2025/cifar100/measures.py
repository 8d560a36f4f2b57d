"""How much classes share: latents, and the harm that one class's edit does to others. Pure functions on arrays.

None of these measures grows with the number of classes by itself. A share of the sum over all classes would: the small
means of a hundred classes add up to more than those of ten.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

#: A class is a companion on another's latent if its mean there is at least this part of that class's.
COMPANION = 0.5
#: A class falls with an edited one if it loses at least this part of its accuracy.
FALLS = 0.5


def companions(means: Float[ndarray, "C d"], latents: Int[ndarray, " C"]) -> Bool[ndarray, "C C"]:
    """Who shares the latent through which a class is edited: entry ``(k, m)`` is ``|μ_ml| ≥ COMPANION · |μ_kl|``,
    ``m ≠ k``, for the latent ``l`` of class ``k``.

    Args:
        means: ``μ``; NaN for a class without images. latents: of each class; −1 for one without, which has none.
    """
    size = np.abs(np.nan_to_num(means))[:, latents].T  # [C edited, C]
    own = np.diagonal(size)[:, None]
    return (size >= COMPANION * own) & (own > 0) & (latents >= 0)[:, None] & ~np.eye(len(means), dtype=bool)


def chosen_by(latents: Int[ndarray, " C"]) -> Int[ndarray, " C"]:
    """How many classes are edited through the latent of each class: 1 where it is its own alone; 0 for −1."""
    return (latents[:, None] == latents[None]).sum(axis=1) * (latents >= 0)


def jaccard(has: Bool[ndarray, "C d"]) -> Float[ndarray, "C C"]:
    """``|a ∩ b| / |a ∪ b|`` of the sets of two classes, such as their dominant latents; NaN where both are empty."""
    sets = has.astype(float)
    both, count = sets @ sets.T, sets.sum(axis=1)
    either = count[:, None] + count[None] - both
    return np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)


def falling(change: Float[ndarray, "C C"], before: Float[ndarray, " C"]) -> Bool[ndarray, "C C"]:
    """Who falls with whom: entry ``(k, m)`` says that editing ``k`` takes ``FALLS`` of the accuracy that ``m`` had.

    Args:
        change: row ``k`` is that of every class's accuracy when ``k`` is edited. before: accuracy without an edit.
    """
    lost = np.nan_to_num(-change) >= FALLS * before[None]
    return lost & (before > 0)[None] & ~np.eye(len(change), dtype=bool)


def loses_most(change: Float[ndarray, "C C"]) -> Bool[ndarray, "C C"]:
    """For each edited class (row) the other classes that lose most: several if they lose the same, none if nothing
    is lost."""
    others = np.where(np.eye(len(change), dtype=bool) | np.isnan(change), 0.0, change)
    least = others.min(axis=1, keepdims=True)
    return (others == least) & (least < 0)


def siblings(groups: list[str]) -> Bool[ndarray, "C C"]:
    """Which pairs of different classes are of the same superclass."""
    names = np.array(groups)
    return (names[:, None] == names[None]) & ~np.eye(len(names), dtype=bool)


class Kinship(NamedTuple):
    """Do edits harm a class's siblings?

    Attributes:
        edits: those that take something from another class. share: of them, where the class that loses most is a
            sibling; an edit under which several lose the same counts in part. chance: that share if any other class
            were as likely; both NaN without edits.
    """

    edits: int
    share: float
    chance: float


def kinship(most: Bool[ndarray, "C C"], kin: Bool[ndarray, "C C"]) -> Kinship:
    """See :class:`Kinship`; ``most`` is :func:`loses_most`, ``kin`` is :func:`siblings`."""
    edited = np.flatnonzero(most.any(axis=1))
    if not len(edited):
        return Kinship(0, np.nan, np.nan)
    chance = kin[edited].sum(axis=1) / (len(kin) - 1)
    share = (most & kin)[edited].sum(axis=1) / most[edited].sum(axis=1)
    return Kinship(len(edited), float(share.mean()), float(chance.mean()))
