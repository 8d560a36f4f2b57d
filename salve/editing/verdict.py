# SPDX-License-Identifier: MIT
"""Whether an edit separates its class from the others, and how certain that is.

An edit *separates* a class if it removes the class and leaves the others as they were. All measures are on images on
which nothing was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

#: Arrays of float, integer or bool, or NumPy scalars.
Numbers: TypeAlias = Any

#: Shares of images differ by much more or not at all. So 0.8 − 0.7 counts as a loss of 10 points, not of more.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """The thresholds of separation, as fractions.

    Attributes:
        accuracy: the edited class must fall to this accuracy or below.
        others_mean_change: the mean absolute change of the other classes' accuracies must be smaller.
        others_worst_loss: no other class may lose more.
    """

    accuracy: float = 0.05
    others_mean_change: float = 0.03
    others_worst_loss: float = 0.10


LIMITS = Limits()
#: Confidence level of every interval.
CONFIDENCE = 0.95
#: Bootstrap samples of the test set, drawn within each class, for the intervals of an edit's cost.
RESAMPLES = 1000


class Effect(NamedTuple):
    """The effect of edits; each field has the leading axes ``[...]`` of the accuracies.

    Attributes:
        before, after: mean accuracy of the edited classes; NaN if none has images.
        mean_change: mean of the other classes' absolute changes. signed_change: their mean change, in which gains
            offset losses. worst_loss: the largest loss of any of them, at least 0.
        worst: index of the class that loses most; −1 if no other class has images, and then all changes are 0.
    """

    before: Numbers
    after: Numbers
    mean_change: Numbers
    signed_change: Numbers
    worst_loss: Numbers
    worst: Numbers

    def at(self, index: int) -> "Effect":
        """The effect of one edit."""
        return Effect(*(np.asarray(field)[index] for field in self))


def effect(before: Numbers, after: Numbers, own: NDArray[np.bool_]) -> Effect:
    """The effect of edits on every class's accuracy.

    Args:
        before, after: accuracies ``[..., C]``; NaN for a class without images.
        own: ``[C]``, which classes are edited; of several the mean counts.
    """
    before, after = np.broadcast_arrays(np.asarray(before, float), np.asarray(after, float))
    known = ~np.isnan(before.reshape(-1, len(own))[0])
    mine, others = own & known, ~own & known
    shape = before.shape[:-1]
    nothing = np.zeros(shape)
    if not mine.any():
        start = end = np.full(shape, np.nan)
    else:
        start, end = before[..., mine].mean(axis=-1), after[..., mine].mean(axis=-1)
    if not others.any():
        return Effect(start, end, nothing, nothing, nothing, np.full(shape, -1))
    change = after[..., others] - before[..., others]
    worst = change.argmin(axis=-1)
    loss = np.maximum(-change.min(axis=-1), 0.0)
    return Effect(start, end, np.abs(change).mean(axis=-1), change.mean(axis=-1), loss, np.flatnonzero(others)[worst])


def takes_away(found: Effect, limits: Limits = LIMITS) -> Numbers:
    """Whether the class falls to the limit; False for a class that is below it without an edit."""
    limit = limits.accuracy + _ROUNDING
    return (found.before > limit) & (found.after <= limit)


def separated(found: Effect, limits: Limits = LIMITS) -> Numbers:
    """Whether the class goes, the others' accuracies change little (mean absolute change), and none loses much."""
    little = found.mean_change < limits.others_mean_change - _ROUNDING
    return takes_away(found, limits) & little & (found.worst_loss <= limits.others_worst_loss + _ROUNDING)


def separated_as_published(found: Effect, limits: Limits = LIMITS) -> Numbers:
    """As in the paper: the class goes, and the others' *mean* accuracy changes little, so that gains offset losses."""
    little = np.abs(found.signed_change) < limits.others_mean_change - _ROUNDING
    return takes_away(found, limits) & little


def wilson(successes: Numbers, count: Numbers, confidence: float = CONFIDENCE) -> tuple[Numbers, Numbers]:
    """Wilson's score interval of a share: ``(low, high)``, NaN where ``count`` is 0.

    Args:
        successes: how many, or their mean over several experiments. count: out of how many. Arrays broadcast.
    """
    n = np.where(np.asarray(count, float) > 0, count, np.nan)
    share, z = np.asarray(successes, float) / n, stats.norm.ppf((1 + confidence) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding leaves a trace of what is 0 and 1 there.
    low, high = np.where(share == 0, 0.0, centre - half), np.where(share == 1, 1.0, centre + half)
    return np.where(np.isnan(share), np.nan, low), np.where(np.isnan(share), np.nan, high)


def resampled_effects(
    labels: NDArray[np.int64],
    right_before: NDArray[np.bool_],
    right_after: NDArray[np.bool_],
    own: NDArray[np.bool_],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Effect:
    """Effects on bootstrap samples of the test set: images are drawn with replacement within each class.

    All edits share the same samples, because they were measured on the same images.

    Args:
        labels: ``[N]`` of the test images. right_before: ``[N]``, which of them the original network classifies right.
        right_after: ``[T, N]``, which of them each edited network classifies right.
        own: ``[T, C]``, which classes each edit is for. resamples: ``B``. seed: of the samples.

    Returns:
        Fields ``[T, B]``.
    """
    rng = np.random.default_rng(seed)
    classes = own.shape[1]
    counts = np.bincount(labels, minlength=classes)[:classes]
    drawn = np.zeros((resamples, len(labels)), np.float32)  # how often each image is drawn
    for k in np.flatnonzero(counts):
        drawn[:, labels == k] = rng.multinomial(counts[k], np.full(counts[k], 1 / counts[k]), size=resamples)
    with np.errstate(invalid="ignore"):
        before = _by_class(drawn, right_before.astype(np.float32), labels, classes) / counts  # [B, C]
    known = counts > 0
    found = []
    for target, right in zip(own, right_after, strict=True):
        # Few images change, so the work for an edit is linear in their number.
        changed = np.flatnonzero(right != right_before)
        touched = np.unique(labels[changed])
        change = np.zeros((resamples, 0))
        if len(changed):
            sign = np.where(right[changed], 1.0, -1.0).astype(np.float32)
            position = np.searchsorted(touched, labels[changed])
            change = _by_class(drawn[:, changed], sign, position, len(touched)) / counts[touched]  # [B, touched]
        mine, others = target & known, ~target & known
        start = before[:, mine].mean(axis=1) if mine.any() else np.full(resamples, np.nan)
        own_change = change[:, target[touched]].sum(axis=1) / max(1, mine.sum())
        rest = change[:, ~target[touched]]
        worst = np.full(resamples, np.flatnonzero(others)[0] if others.any() else -1)
        loss = np.zeros(resamples)
        if rest.shape[1]:
            loss = np.maximum(-rest.min(axis=1), 0.0)
            worst = touched[~target[touched]][rest.argmin(axis=1)]
        size = max(1, int(others.sum()))
        found.append((start, start + own_change, np.abs(rest).sum(axis=1) / size, rest.sum(axis=1) / size, loss, worst))
    return Effect(*(np.stack(field) for field in zip(*found, strict=True)))


def _by_class(
    drawn: NDArray[np.float32], values: NDArray[np.float32], group: NDArray[np.int64], groups: int
) -> Numbers:
    """``Σ drawn · values`` over the images of each group: ``[B, n]``, ``[n]``, ``[n]`` → ``[B, groups]``."""
    order = np.argsort(group, kind="stable")
    sums = np.zeros((len(drawn), groups))
    present, starts = np.unique(group[order], return_index=True)
    if len(present):
        sums[:, present] = np.add.reduceat((drawn * values)[:, order], starts, axis=1, dtype=np.float64)
    return sums


def percentile_interval(values: Numbers, measured: Numbers, confidence: float = CONFIDENCE) -> tuple[Numbers, Numbers]:
    """The percentile interval of resampled values ``[..., B]``: ``(low, high)``, each ``[...]``.

    It is widened to contain the measured value, because resampled absolute values are larger on average.
    """
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail], axis=-1)
    return np.minimum(low, measured), np.maximum(high, measured)


@dataclass(frozen=True)
class Verdict:
    """How many of the edits separate their class.

    Attributes:
        judged: edits of a class. separates: how many of them separate it; low, high: the interval of that.
        published: how many separate it in the published sense.

    Raises:
        ValueError: the numbers contradict each other.
    """

    judged: int
    separates: int
    low: int
    high: int
    published: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.separates <= self.high <= self.judged or not self.published <= self.judged:
            raise ValueError(f"This verdict contradicts itself: {self}.")


def verdict(found: Effect, resampled: Effect, of_class: Sequence[bool], reached: Sequence[bool]) -> Verdict:
    """Count the edits that separate a class.

    Args:
        found: fields ``[T]``. resampled: fields ``[T, B]``. of_class: ``[T]``, which edits are for one class.
        reached: ``[T]``, for which edits a strength could be chosen; the others separate nothing.
    """
    judged = np.asarray(of_class, bool)
    chosen = judged & np.asarray(reached, bool)
    clean, published = separated(found)[chosen], separated_as_published(found)[chosen]
    count = int(clean.sum())
    low, high = percentile_interval(separated(resampled)[chosen].sum(axis=0), count)
    return Verdict(int(judged.sum()), count, int(np.floor(low)), int(np.ceil(high)), int(published.sum()))
