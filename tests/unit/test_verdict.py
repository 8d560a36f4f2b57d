"""When an edit separates its class, against numbers worked out by hand, plain loops and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from salve.editing.verdict import (
    LIMITS,
    Effect,
    Limits,
    Verdict,
    effect,
    percentile_interval,
    resampled_effects,
    separated,
    separated_as_published,
    verdict,
    wilson,
)

A = np.array([True, False, False, False])


def separates(before: np.ndarray, after: np.ndarray, own: np.ndarray, limits: Limits = LIMITS) -> bool:
    return bool(separated(effect(before, after, own), limits))


def test_an_effect_is_worked_out_class_by_class() -> None:
    found = effect(np.array([0.9, 0.8, 0.8, 0.8]), np.array([0.05, 0.9, 0.68, 0.8]), A)
    assert (found.before, found.after) == (0.9, 0.05)
    assert found.mean_change == pytest.approx((0.1 + 0.12) / 3)
    assert found.signed_change == pytest.approx((0.1 - 0.12) / 3)
    assert found.worst_loss == pytest.approx(0.12)
    assert found.worst == 2


@pytest.mark.parametrize(
    ("after", "strict", "published"),
    [
        ([0.0, 0.8, 0.8, 0.8], True, True),
        ([0.05, 0.8, 0.8, 0.8], True, True),
        ([0.06, 0.8, 0.8, 0.8], False, False),  # the class is still there
        ([0.0, 0.7, 0.9, 0.8], False, True),  # a gain offsets a loss only in the published sense
        ([0.0, 0.75, 0.77, 0.8], True, True),
        ([0.0, 0.71, 0.8, 0.8], False, False),  # 3 points in the mean
        ([0.0, 0.5, 0.5, 0.5], False, False),
    ],
)
def test_separating_and_its_published_sense(after: list[float], strict: bool, published: bool) -> None:
    before = np.array([0.9, 0.8, 0.8, 0.8])
    assert separates(before, np.array(after), A) is strict
    assert bool(separated_as_published(effect(before, np.array(after), A))) is published


def test_no_single_class_may_lose_much_however_many_there_are() -> None:
    before, own = np.full(100, 0.8), np.arange(100) == 0
    after = before.copy()
    after[0], after[1] = 0.0, 0.65
    assert effect(before, after, own).mean_change < 0.002
    assert not separates(before, after, own)
    assert separated_as_published(effect(before, after, own))
    after[1] = 0.7  # exactly 10 points
    assert separates(before, after, own)
    after[1] = 1.0  # a gain is no loss
    assert effect(before, after, own).worst_loss == 0
    assert separates(before, after, own)


def test_limits_can_be_others() -> None:
    before, after = np.array([0.9, 0.8, 0.8, 0.8]), np.array([0.2, 0.8, 0.8, 0.8])
    assert separates(before, after, A, Limits(accuracy=0.25))


def test_a_class_that_is_lost_without_an_edit_shows_nothing() -> None:
    assert not separates(np.array([0.05, 0.8, 0.8, 0.8]), np.array([0.0, 0.8, 0.8, 0.8]), A)


def test_classes_without_images_count_for_nothing() -> None:
    found = effect(np.array([0.9, math.nan, 0.8, 0.8]), np.array([0.0, math.nan, 0.8, 0.74]), A)
    assert found.mean_change == pytest.approx(0.03)
    assert found.worst == 3
    alone = effect(np.array([0.9, math.nan]), np.array([0.0, math.nan]), np.array([True, False]))
    assert (alone.mean_change, alone.worst_loss, alone.worst) == (0, 0, -1)
    assert separated(alone)
    unseen = effect(np.array([math.nan, 0.8]), np.array([math.nan, 0.8]), np.array([True, False]))
    assert not separated(unseen)


def test_strengths_are_judged_at_once() -> None:
    accuracy = np.array([[0.9, 0.8, 0.8, 0.8], [0.5, 0.8, 0.8, 0.8], [0.0, 0.8, 0.79, 0.8], [0.0, 0.5, 0.5, 0.5]])
    found = effect(accuracy[0], accuracy, A)
    assert separated(found).tolist() == [False, False, True, False]
    assert found.at(2).after == 0


@pytest.mark.parametrize(("successes", "count"), [(0, 20), (1, 20), (13, 50), (50, 50)])
def test_wilson_equals_scipy(successes: int, count: int) -> None:
    expected = stats.binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson(successes, count) == pytest.approx((expected.low, expected.high))


def test_wilson_of_no_image_is_unknown() -> None:
    low, high = wilson(np.array([0.0, 3.0]), np.array([0, 6]))
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    assert low[1] < 0.5 < high[1]


def drawn_data(classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes - 1), [9, 14, 1, 30]))  # the last class has no image
    before = rng.random(len(labels)) < 0.8
    after = np.stack([before ^ (rng.random(len(labels)) < share) for share in (0.2, 0.0, 0.6)])
    own = np.zeros((3, classes), bool)
    own[0, 0] = own[1, 3] = own[2, 1] = own[2, 2] = True
    return labels, before, after, own


def test_resampled_effects_equal_accuracies_of_images_drawn_anew() -> None:
    labels, before, after, own = drawn_data()
    found = resampled_effects(labels, before, after, own, resamples=40, seed=3)
    rng = np.random.default_rng(3)
    times = np.zeros((40, len(labels)), int)
    for k in range(4):
        count = int((labels == k).sum())
        times[:, labels == k] = rng.multinomial(count, np.full(count, 1 / count), size=40)
    for b in range(40):
        images = np.repeat(np.arange(len(labels)), times[b])
        assert np.bincount(labels[images], minlength=5).tolist() == [9, 14, 1, 30, 0]

        def accuracy(right: np.ndarray, images: np.ndarray = images) -> np.ndarray:
            return np.array([right[images[labels[images] == k]].mean() if k < 4 else math.nan for k in range(5)])

        for t in range(3):
            expected = effect(accuracy(before), accuracy(after[t]), own[t])
            for name in ("before", "after", "mean_change", "signed_change", "worst_loss"):
                assert getattr(found, name)[t, b] == pytest.approx(getattr(expected, name)), name


def test_an_edit_that_changes_no_image_has_no_effect_in_any_draw() -> None:
    labels, before, _, own = drawn_data()
    found = resampled_effects(labels, before, before[None], own[:1], resamples=20)
    assert not found.mean_change.any()
    assert not found.worst_loss.any()
    assert np.array_equal(found.before, found.after)


def test_an_interval_of_resampled_values_has_the_coverage_it_claims() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for repeat in range(200):
        labels = np.repeat([0, 1], 60)
        before = np.ones(120, bool)
        after = before & ~((labels == 1) & (rng.random(120) < 0.3))  # class 1 truly loses 30 points
        own = np.array([[True, False]])
        drawn = resampled_effects(labels, before, after[None], own, resamples=300, seed=repeat)
        measured = 1 - after[labels == 1].mean()
        low, high = percentile_interval(drawn.worst_loss[0], measured)
        inside += bool(low <= 0.3 <= high)
    assert 0.89 <= inside / 200 <= 0.99


def test_an_interval_holds_the_measured_value() -> None:
    assert percentile_interval(np.linspace(1, 2, 101), 0.5) == (0.5, pytest.approx(1.975))


def test_a_verdict_counts_classes_and_leaves_sets_out() -> None:
    labels, before, after, own = drawn_data()
    resampled = resampled_effects(labels, before, after, own, resamples=50)
    ones = np.ones(3)
    clean = Effect(0.9 * ones, 0 * ones, 0 * ones, 0 * ones, 0 * ones, np.zeros(3, np.int64))
    unreached = verdict(clean, resampled, [True, True, False], [False, True, True])
    assert (unreached.judged, unreached.separates, unreached.published) == (2, 1, 1)
    said = verdict(clean, resampled, [True, True, False], [True, True, True])
    assert (said.judged, said.separates, said.published) == (2, 2, 2)
    assert 0 <= said.low <= 2 == said.high


def test_a_verdict_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="contradicts itself"):
        Verdict(judged=3, separates=4, low=0, high=4, published=4)
