"""One held-out set divided in two."""

import numpy as np
import pytest

from salve.data.splits import divide
from salve.types import UserError

NAMES = ("ant", "bee", "cow")
LABELS = np.asarray([0] * 10 + [1] * 7 + [2] * 2)[np.random.default_rng(3).permutation(19)]


def per_class(indices: np.ndarray) -> list[int]:
    return np.bincount(LABELS[indices], minlength=3).tolist()


def test_every_image_is_in_one_part_and_every_class_in_both() -> None:
    select, test = divide(LABELS, NAMES, 0.5, 0)
    assert sorted([*select, *test]) == list(range(19))
    assert select.tolist() == sorted(select)
    assert test.tolist() == sorted(test)
    assert per_class(select) == [5, 4, 1]  # 3.5 is rounded to an even number, as everywhere in Python
    assert per_class(test) == [5, 3, 1]


@pytest.mark.parametrize(("share", "expected"), [(0.01, [1, 1, 1]), (0.2, [2, 1, 1]), (0.99, [9, 6, 1])])
def test_the_share_is_kept_as_far_as_both_parts_have_an_image(share: float, expected: list[int]) -> None:
    assert per_class(divide(LABELS, NAMES, share, 0)[0]) == expected


def test_the_seed_alone_draws() -> None:
    first, again, other = (divide(LABELS, NAMES, 0.5, seed)[0].tolist() for seed in (4, 4, 5))
    np.random.seed(1)  # noqa: NPY002
    assert divide(LABELS, NAMES, 0.5, 4)[0].tolist() == first == again != other


def test_a_class_is_divided_alike_whatever_the_others_have() -> None:
    """Adding images to one class moves no image of another."""
    alone = np.flatnonzero(LABELS == 1)
    fewer = np.concatenate([np.flatnonzero(LABELS == 0)[:2], alone, np.flatnonzero(LABELS == 2)])
    select, _ = divide(LABELS[fewer], NAMES, 0.5, 0)
    whole, _ = divide(LABELS, NAMES, 0.5, 0)
    assert set(fewer[select]) & set(alone) == set(whole) & set(alone)


def test_all_images_are_as_likely_to_select() -> None:
    labels = np.zeros(10, dtype=np.int64)
    counts = np.zeros(10)
    for seed in range(600):
        counts[divide(labels, ("ant",), 0.3, seed)[0]] += 1
    # 600 draws of 3 in 10: 180 each, with a standard deviation of 11.
    assert np.abs(counts - 180).max() < 45


def test_classes_with_a_single_image_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"too few held-out images of 'bee', 'cow'; .* at least two"):
        divide(np.asarray([0, 0, 1], dtype=np.int64), NAMES, 0.5, 0)


@pytest.mark.parametrize(("share", "seed", "key"), [(0.0, 0, "share"), (1.0, 0, "share"), (0.5, -1, "seed")])
def test_values_out_of_range_are_refused(share: float, seed: int, key: str) -> None:
    with pytest.raises(UserError, match=key):
        divide(LABELS, NAMES, share, seed)
