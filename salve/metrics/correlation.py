# SPDX-License-Identifier: MIT
"""Rank correlation of two measures, with others held fixed."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]


class Correlation(NamedTuple):
    """A rank correlation, the ends of its interval, and the number ``n`` of cases."""

    rho: float
    low: float
    high: float
    n: int


def partial_spearman(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], given: Float[np.ndarray, "N Q"] | None = None
) -> float:
    """Spearman's correlation of ``x`` and ``y`` with other measures held fixed.

    All columns are ranked (ties share their mean rank, +inf is the largest). Both ranks are regressed on the ranks of
    ``given`` and a constant, and the residuals correlated. For one measure this equals ``(ρ_xy − ρ_xz ρ_yz) / √((1 −
    ρ_xz²)(1 − ρ_yz²))``.

    Args:
        x, y: ``[N]``. given: ``[N, Q]``; a class may be held fixed by a column of 0 and 1 for each. None: Spearman's
            own.

    Returns:
        −1 … 1; NaN where nothing of x or y is left to be explained, or for fewer than 3 cases.
    """
    if len(x) < 3:
        return math.nan
    others = np.ones((len(x), 1)) if given is None else np.column_stack([np.ones(len(x)), _ranks(given)])
    ranks = _ranks(np.column_stack([x, y]))
    basis, sizes, _ = np.linalg.svd(others, full_matrices=False)
    basis = basis[:, sizes > sizes[0] * len(x) * np.finfo(float).eps]
    left = ranks - basis @ (basis.T @ ranks)
    norms, whole = np.linalg.norm(left, axis=0), np.linalg.norm(ranks - ranks.mean(axis=0), axis=0)
    # What rounding leaves of ranks that the others explain wholly is no residual.
    if not (norms > 1e-9 * np.maximum(whole, 1)).all():
        return math.nan
    return float(np.clip(left[:, 0] @ left[:, 1] / norms.prod(), -1, 1))


def partial_spearman_interval(
    x: Float[np.ndarray, "*S N"],
    y: Float[np.ndarray, " N"],
    given: Float[np.ndarray, "N Q"] | None = None,
    *,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Correlation:
    """:func:`partial_spearman` with a bootstrap interval over cases (percentiles).

    Args:
        x: ``[N]``, or ``[S, N]`` of several raters of the same cases, such as SAEs: then the mean over them, for which
            cases are drawn together.
        y, given: see :func:`partial_spearman`.
        confidence: of the interval. draws: of cases with replacement. seed: of the draws.
    """
    raters = np.atleast_2d(x)

    def mean(at: Int[np.ndarray, " N"]) -> float:
        rest = None if given is None else given[at]
        return float(np.mean([partial_spearman(one[at], y[at], rest) for one in raters]))

    count = len(y)
    generator = np.random.default_rng(seed)
    found = np.array([mean(generator.integers(count, size=count)) for _ in range(draws)]) if count > 2 else np.array([])
    found = found[~np.isnan(found)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail]) if len(found) else (math.nan, math.nan)
    return Correlation(mean(np.arange(count)), float(low), float(high), count)


def _ranks(columns: Float[np.ndarray, "N Q"]) -> Values:
    return np.asarray(stats.rankdata(columns, axis=0), dtype=float)
