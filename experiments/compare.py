"""Edits at a matched effect, and how sure a comparison is: pure functions on tables.

Strengths α have no unit in common between SAEs, backbones or methods. So edits are compared where the edited class has
fallen to the same accuracy.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats  # type: ignore[import-untyped]

#: Accuracy to which an edit has to take its class.
LEVEL = 0.05
#: Confidence of all intervals.
CONFIDENCE = 0.95


class MatchedEdit(NamedTuple):
    """One class's edit at the strength that takes the class to ``LEVEL``.

    Attributes:
        reached: some strength does. alpha: the smallest that does (inf if none).
        drop: accuracy that the class loses. drift: mean absolute change of the other classes' accuracy; NaN if not
            reached. worst: the largest absolute change of one of them; NaN if not reached.
        selectivity: ``drop − drift``; 0 if not reached, since an edit that cannot be had takes and harms nothing. NaN
            for a class that has no images or is at ``LEVEL`` without an edit.
    """

    reached: bool
    alpha: float
    drop: float
    drift: float
    worst: float
    selectivity: float


def matched_edit(alphas: Float[ndarray, " K"], accuracy: Float[ndarray, "K C"], own: int) -> MatchedEdit:
    """The edit at the first strength where class ``own`` is at ``LEVEL``, linear between the strengths of the grid.

    Args:
        alphas: strengths, increasing from 0. accuracy: of every class at each; NaN for a class without images.
        own: the class that is edited.
    """
    mine = accuracy[:, own]
    if not mine[0] > LEVEL:
        return MatchedEdit(False, math.inf, math.nan, math.nan, math.nan, math.nan)
    below = np.flatnonzero(mine <= LEVEL)
    if not len(below):
        return MatchedEdit(False, math.inf, 0.0, math.nan, math.nan, 0.0)
    at = int(below[0])
    share = (mine[at - 1] - LEVEL) / (mine[at - 1] - mine[at])
    found = accuracy[at - 1] + share * (accuracy[at] - accuracy[at - 1])
    change = np.abs(np.delete(found - accuracy[0], own))
    change = change[~np.isnan(change)]
    drop = float(mine[0] - LEVEL)
    drift, worst = (float(change.mean()), float(change.max())) if len(change) else (0.0, 0.0)
    alpha = float(alphas[at - 1] + share * (alphas[at] - alphas[at - 1]))
    return MatchedEdit(True, alpha, drop, drift, worst, drop - drift)


class Interval(NamedTuple):
    """A mean, half the width of its confidence interval (NaN for fewer than two values), and how many values ``n``."""

    mean: float
    half: float
    n: int


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's interval for the mean, of the values that are not NaN: ``mean ± t s / √n``."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    count = len(known)
    if count < 2:
        return Interval(float(known[0]) if count else math.nan, math.nan, count)
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Interval(float(known.mean()), quantile * float(known.std(ddof=1)) / math.sqrt(count), count)
