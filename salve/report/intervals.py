# SPDX-License-Identifier: MIT
"""Student's interval of a mean."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from salve.editing.verdict import CONFIDENCE


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
