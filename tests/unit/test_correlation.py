"""Partial rank correlation, against scipy and the closed form."""

import math

import numpy as np
import pytest
from scipy import stats

from salve.metrics.correlation import partial_spearman, partial_spearman_interval


def cases(count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y depend on the same two measures, and ties and an infinity are among them."""
    generator = np.random.default_rng(0)
    given = generator.normal(size=(count, 2)).round(1)
    x = given[:, 0] + 0.5 * given[:, 1] + generator.normal(size=count)
    y = given[:, 0] - given[:, 1] + 0.3 * x + generator.normal(size=count)
    x[3] = np.inf
    return x, y.round(1), given


def test_without_others_it_is_spearmans() -> None:
    x, y, _ = cases()
    finite = np.where(np.isinf(x), 1e9, x)
    assert partial_spearman(x, y) == pytest.approx(stats.spearmanr(finite, y).statistic, abs=1e-12)


def test_one_measure_held_fixed_is_the_closed_form() -> None:
    x, y, given = cases()
    z = given[:, 0]
    finite = np.where(np.isinf(x), 1e9, x)
    xy, xz, yz = (stats.spearmanr(one, other).statistic for one, other in ((finite, y), (finite, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_spearman(x, y, given[:, :1]) == pytest.approx(expected, abs=1e-12)


def test_several_measures_held_fixed_are_the_inverse_of_the_rank_correlations() -> None:
    """As pingouin defines it, through the precision matrix."""
    x, y, given = cases()
    columns = np.column_stack([np.where(np.isinf(x), 1e9, x), y, given])
    inverse = np.linalg.inv(stats.spearmanr(columns).statistic)
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    assert partial_spearman(x, y, given) == pytest.approx(expected, abs=1e-12)
    # A column that the others determine changes nothing, as with one column of 0 and 1 for each class.
    again = np.column_stack([given, 2 * given[:, 0]])
    assert partial_spearman(x, y, again) == pytest.approx(expected, abs=1e-12)


def test_a_common_cause_is_taken_out() -> None:
    generator = np.random.default_rng(1)
    cause = generator.normal(size=800)
    x, y = cause + generator.normal(size=800), cause + generator.normal(size=800)
    assert partial_spearman(x, y) > 0.4
    found = partial_spearman_interval(x, y, cause[:, None], draws=200)
    assert found.low < 0 < found.high
    assert found.n == 800
    # The normal approximation of a null's interval, 1.96 / √n.
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(800), rel=0.2)


def test_what_the_others_explain_wholly_leaves_nothing() -> None:
    x, y, given = cases()
    assert math.isnan(partial_spearman(given[:, 0], y, given))
    assert math.isnan(partial_spearman(np.ones(60), y))
    assert math.isnan(partial_spearman(x[:2], y[:2]))
    few = partial_spearman_interval(x[:2], y[:2])
    assert [math.isnan(value) for value in few[:3]] == [True] * 3


def test_several_raters_are_averaged() -> None:
    x, y, given = cases()
    other = given[:, 1]
    found = partial_spearman_interval(np.stack([x, other]), y, draws=50)
    assert found.rho == pytest.approx((partial_spearman(x, y) + partial_spearman(other, y)) / 2)
    assert found.low < found.rho < found.high
