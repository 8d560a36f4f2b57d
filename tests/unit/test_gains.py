"""What a change gains and loses by groups: against sums that are written out."""

import math

import pytest
import torch

from salve.editing.gains import average_loss, gains_worst_group

# Two groups: 4 images and 9 images.
GROUPS = torch.tensor([0] * 4 + [1] * 9)
OBJECTS = torch.arange(13)


def right(first: int, second: int) -> torch.Tensor:
    """So many right images in each group, the first ones."""
    return torch.tensor([at < first for at in range(4)] + [at < second for at in range(9)])


def test_the_loss_of_the_average_weighs_groups_and_leaves_a_standard_error_to_chance() -> None:
    # Of the first group one image of four is lost, of the second three of nine; the shares are 3 to 1.
    before, after = right(4, 9), right(3, 6)
    mean = 0.75 * 1 / 4 + 0.25 * 3 / 9
    error = math.sqrt(0.75**2 * (1 / 4 - 1 / 16) / 4 + 0.25**2 * (1 / 3 - 1 / 9) / 9)
    assert average_loss(before, after, GROUPS, torch.tensor([30.0, 10.0])) == pytest.approx(mean - error)


def test_gains_and_losses_of_a_group_are_paired() -> None:
    before, after = right(2, 9), right(2, 9)
    after[:4] = torch.tensor([False, True, True, False])  # one lost, one gained
    assert average_loss(before, after, GROUPS, torch.tensor([1.0, 0.0])) == pytest.approx(-math.sqrt(0.5 / 4))
    assert average_loss(before, before, GROUPS, torch.tensor([1.0, 1.0])) == 0.0


def test_a_loss_of_all_images_is_certain_and_a_group_without_images_has_no_weight() -> None:
    nothing = torch.zeros(13, dtype=torch.bool)
    assert average_loss(~nothing, nothing, GROUPS, torch.tensor([1.0, 2.0])) == pytest.approx(1)
    assert average_loss(~nothing, nothing, GROUPS, torch.tensor([1.0, 2.0, 97.0])) == pytest.approx(1)


def gain_and_error(right_before: int, right_after: int, count: int) -> tuple[float, float]:
    """The gain of a group, and its error, written out."""
    shares = [(right + 0.5) / (count + 1) for right in (right_before, right_after)]
    return (right_after - right_before) / count, math.sqrt(sum(p * (1 - p) / count for p in shares))


def test_the_worst_group_must_gain_more_than_twice_the_error_of_that_gain() -> None:
    gains = [gains_worst_group(right(4, 1), right(4, number), GROUPS, OBJECTS) for number in range(10)]
    assert gains == [gain > 2 * error for gain, error in (gain_and_error(1, number, 9) for number in range(10))]
    assert gains.index(True) == 5
    assert not gains_worst_group(right(4, 4), right(4, 4), GROUPS, OBJECTS)


def test_of_four_groups_the_gain_is_that_of_the_worst_before_and_after() -> None:
    count, before = 20, {0: 6, 1: 20, 2: 18, 3: 15}
    groups = torch.arange(4).repeat_interleave(count)

    def of(right: dict[int, int]) -> torch.Tensor:
        return torch.cat([torch.arange(count) < right[group] for group in range(4)])

    said = set()
    for number in range(21):
        after = {**before, 0: number}
        gain, error = gain_and_error(6, min(after.values()), count)
        gains = gains_worst_group(of(before), of(after), groups, torch.arange(80))
        assert gains == (gain > 2 * error), number
        said.add(gains)
    assert said == {True, False}


def test_a_group_of_one_image_shows_nothing_and_one_of_three_that_are_all_gained_something() -> None:
    for count, shown in ((1, False), (2, True), (3, True)):
        nothing = torch.zeros(count, dtype=torch.bool)
        groups = torch.zeros(count, dtype=torch.long)
        assert gains_worst_group(nothing, ~nothing, groups, torch.arange(count)) == shown


def test_a_network_that_is_no_better_seldom_seems_to_gain() -> None:
    draw = torch.Generator().manual_seed(0)
    groups, objects = torch.zeros(25, dtype=torch.long), torch.arange(25)
    for share in (0.2, 0.5, 0.8):
        seem = sum(
            gains_worst_group(*(torch.rand(2, 25, generator=draw) < share), groups, objects) for _ in range(2000)
        )
        assert 0.001 < seem / 2000 < 0.04, share  # one side of a 95 % interval


def test_images_of_one_object_are_one_piece_of_evidence() -> None:
    objects = OBJECTS.clone()
    objects[4:] = 99  # all nine images of the second group
    assert gains_worst_group(right(4, 1), right(4, 7), GROUPS, OBJECTS)
    assert not gains_worst_group(right(4, 1), right(4, 7), GROUPS, objects)
