# SPDX-License-Identifier: MIT
"""The strength at which an edit has a given effect, found with few measurements."""

import math
from collections.abc import Callable

from salve.editing.verdict import LIMITS

#: Accuracy to which an edit has to take its class, where methods are compared.
LEVEL = LIMITS.accuracy
#: The strength that is tried first, and the factor from one to the next.
FIRST, STEP = 1 / 16, 2.0
#: By how much a strength that is found may lie above the smallest one, as a share of it.
TOLERANCE = 0.03


def strength_to(
    accuracy: Callable[[float], float],
    strongest: float,
    level: float = LEVEL,
    tolerance: float = TOLERANCE,
    steps: Callable[[float], float] = float,
) -> float:
    """A strength that takes a class to a level, while one a little weaker does not.

    Strengths grow by :data:`STEP` until the class is at the level; between the last two, bisection follows in the
    logarithm. An accuracy that falls, rises and falls again may have several such strengths, and this finds one.

    Args:
        accuracy: of the class at a strength. strongest: the largest strength to try, above 0.
        level: the accuracy wanted, or below. tolerance: by how much the strength may be too large, as a share.
        steps: has one value for all strengths of the same edit; only the first of them is measured.

    Returns:
        ``inf`` if no strength tried takes the class there; NaN if the class is there without an edit, or has no images.
    """
    known: dict[float, float] = {}

    def found(alpha: float) -> float:
        if (step := steps(alpha)) not in known:
            known[step] = accuracy(alpha)
        return known[step]

    if not found(0.0) > level:
        return math.nan
    low, high = 0.0, min(FIRST, strongest)
    while found(high) > level:
        if high >= strongest:
            return math.inf
        low, high = high, min(high * STEP, strongest)
    low = max(low, high / STEP**4)  # below the strength tried first, four more halvings
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if found(middle) > level else (low, middle)
    return high
