"""The strength of a given effect, found with few measurements."""

import math

import pytest

from salve.editing.matched import LEVEL, TOLERANCE, strength_to


class Curve:
    """An accuracy that falls in steps, and how often it was asked for."""

    def __init__(self, gone: float, before: float = 0.9) -> None:
        self.gone, self.before, self.asked = gone, before, list[float]()

    def __call__(self, alpha: float) -> float:
        self.asked.append(alpha)
        return self.before if alpha < self.gone else 0.0


@pytest.mark.parametrize("gone", [0.005, 0.03, 1 / 16, 0.3, 1.0, 7.7, 64.0, 99.9])
def test_the_strength_found_takes_the_class_and_a_little_less_does_not(gone: float) -> None:
    curve = Curve(gone)
    found = strength_to(curve, 100.0)
    assert gone <= found <= gone * (1 + TOLERANCE)
    assert len(curve.asked) <= 20
    assert max(curve.asked) <= 100.0


@pytest.mark.parametrize("strongest", [1.0, 0.01, 100.0])
def test_no_strength_beyond_the_strongest_is_tried(strongest: float) -> None:
    curve = Curve(strongest * 1.01)
    assert strength_to(curve, strongest) == math.inf
    assert max(curve.asked) == strongest
    assert strength_to(Curve(strongest), strongest) == pytest.approx(strongest, rel=TOLERANCE)


def test_strengths_of_one_step_are_measured_once() -> None:
    once, often = Curve(8), Curve(8)
    found = strength_to(lambda alpha: once(math.ceil(alpha)), 100.0, steps=math.ceil)
    assert found == strength_to(lambda alpha: often(math.ceil(alpha)), 100.0)
    assert sorted(once.asked) == sorted(set(often.asked))
    assert len(once.asked) < len(often.asked)


@pytest.mark.parametrize("before", [0.0, LEVEL, math.nan])
def test_a_class_that_is_there_without_an_edit_has_no_strength(before: float) -> None:
    curve = Curve(1.0, before)
    assert math.isnan(strength_to(curve, 100.0))
    assert curve.asked == [0.0]


def test_a_strength_far_below_the_first_one_is_given_as_a_sixteenth_of_it_at_least() -> None:
    found = strength_to(Curve(1e-6), 100.0)
    assert 0 < found <= (1 / 16) / 16 * (1 + TOLERANCE)
