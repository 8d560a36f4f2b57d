"""Compare edits at a matched effect: pure functions on tables.

Strengths α of different SAEs, backbones and methods have no common unit. So edits are compared where the edited class
has fallen to the same accuracy. The select split says at which strength that is; the test split says what the edit
takes and costs there. Measured on the images that chose it, a strength would look better than it is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from salve.backbones.tail import LinearTail
from salve.editing.verdict import CONFIDENCE, LIMITS, effect
from salve.report.intervals import t_interval
from salve.report.text import MISSING, is_missing, points_and_half
from salve.types import Activations, Labels

#: Accuracy to which an edit has to take its class.
LEVEL = LIMITS.accuracy
#: The limits of an edit that separates, for captions and claims.
LEVEL_TEXT = f"{100 * LEVEL:g} %"
WORDS = {
    "level": LEVEL_TEXT,
    "mean": f"{100 * LIMITS.others_mean_change:g} points",
    "loss": f"{100 * LIMITS.others_worst_loss:g}",
}


class Reader(NamedTuple):
    """All that an edit of the last site needs of a classifier.

    Attributes:
        tail: the head. train, select, test: activations ``[N, M]`` with labels ``[N]``. train fits
            an edit, select chooses its strength, test says what it does.
    """

    tail: LinearTail
    train: tuple[Activations, Labels]
    select: tuple[Activations, Labels]
    test: tuple[Activations, Labels]


class MatchedEdit(NamedTuple):
    """One class's edit, measured on one split at the strength that another split chose.

    Attributes:
        reached: some strength takes the class to ``LEVEL`` on the images that choose. alpha: the smallest such
            strength (inf if there is none).
        before, after: the class's accuracy without the edit and with it; ``after`` is ``LEVEL`` only about, and NaN if
            not reached.
        drop: ``before − after``. drift: mean absolute change of the other classes' accuracy; NaN if not reached.
            worst_loss: the largest loss of one of them, at least 0; NaN if not reached.
        selectivity: ``drop − drift``; 0 if not reached: an edit that does not exist takes and harms nothing. NaN for a
            class that has no images on one of the splits, or is at ``LEVEL`` there without an edit.
    """

    reached: bool
    alpha: float
    before: float
    after: float
    drop: float
    drift: float
    worst_loss: float
    selectivity: float


def strength_to(alphas: Float[np.ndarray, " K"], accuracy: Float[np.ndarray, " K"], level: float = LEVEL) -> float:
    """The smallest strength at which a class's accuracy is at most a level, linear between strengths of the grid.

    Args:
        alphas: strengths, increasing from 0. accuracy: of the class at each, on the images that choose.

    Returns:
        ``inf`` if there is none; NaN for a class that is at the level without an edit, or that has no images.
    """
    if not accuracy[0] > level:
        return math.nan
    below = np.flatnonzero(accuracy <= level)
    if not len(below):
        return math.inf
    at = int(below[0])
    share = (accuracy[at - 1] - level) / (accuracy[at - 1] - accuracy[at])
    return float(alphas[at - 1] + share * (alphas[at] - alphas[at - 1]))


def accuracy_at(
    alphas: Float[np.ndarray, " K"], accuracy: Float[np.ndarray, "K C"], alpha: float
) -> Float[np.ndarray, " C"]:
    """Accuracy of every class at a strength, linear between strengths of the grid."""
    return np.array([np.interp(alpha, alphas, column) for column in accuracy.T])


def edit_at(alphas: Float[np.ndarray, " K"], accuracy: Float[np.ndarray, "K C"], own: int, alpha: float) -> MatchedEdit:
    """The edit of class ``own`` at a strength, on the images that report.

    Args:
        alphas: strengths, increasing from 0. accuracy: of every class at each; NaN for a class without images.
        own: the class that is edited. alpha: from :func:`strength_to` on other images.
    """
    before = float(accuracy[0, own])
    if math.isnan(alpha) or not before > LEVEL:
        return MatchedEdit(False, math.inf, before, *[math.nan] * 5)
    if math.isinf(alpha):
        return MatchedEdit(False, math.inf, before, math.nan, 0.0, math.nan, math.nan, 0.0)
    found = effect(accuracy[0], accuracy_at(alphas, accuracy, alpha), np.arange(accuracy.shape[1]) == own)
    drop, drift = before - float(found.after), float(found.mean_change)
    return MatchedEdit(True, alpha, before, float(found.after), drop, drift, float(found.worst_loss), drop - drift)


def matched_edit(
    alphas: Float[np.ndarray, " K"], select: Float[np.ndarray, "K C"], test: Float[np.ndarray, "K C"], own: int
) -> MatchedEdit:
    """The edit of class ``own`` on test, at the first strength where the class is at ``LEVEL`` on select.

    Args:
        alphas: strengths, increasing from 0. select, test: accuracy of every class at each, by split.
    """
    return edit_at(alphas, test, own, strength_to(alphas, select[:, own]))


def margins(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """By how much each image's own class leads, ``y_own − max_{m≠own} y_m``: positive where the prediction is right."""
    rest = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return logits.gather(1, labels[:, None])[:, 0] - rest


def random_directions(classes: int, width: int, seed: int) -> Float[Tensor, "C M"]:
    """Directions drawn evenly from the unit sphere ``[C, M]``, the norm of a decoder's columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(classes, width, generator=generator), dim=1)


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's, where +inf is the largest; NaN where either is constant."""
    ranks = np.stack([stats.rankdata(one), stats.rankdata(other)])
    if ranks.shape[1] < 2 or (ranks == ranks[:, :1]).all(axis=1).any():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def intervals(values: Mapping[str, Sequence[float]], comparisons: int = 1) -> dict[str, float]:
    """:func:`t_interval` of each measure: ``<measure>`` is the mean, ``<measure>_half`` half the interval's width.

    Of several ``comparisons`` all intervals hold together with ``CONFIDENCE`` (Bonferroni).
    """
    found = {}
    for name, each in values.items():
        found[name], found[f"{name}_half"], _ = t_interval(each, 1 - (1 - CONFIDENCE) / comparisons)
    return found


def with_half(record: Mapping[Any, Any], name: str, digits: int | None = None, signed: bool = False) -> str:
    """A mean, and half its interval (``<name>_half``) where there is one; in points where no digits are given."""
    mean, half = record[name], record[f"{name}_half"]
    if digits is None:
        return points_and_half(mean, half, signed)
    if is_missing(mean):
        return MISSING
    return f"{mean:.{digits}f}".replace("-", "−") + ("" if is_missing(half) else f" ± {half:.{digits}f}")
