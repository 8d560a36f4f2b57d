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


def test_the_worst_group_must_gain_more_than_its_standard_error() -> None:
    # With a share p right of n images the error is √(p (1 − p) / n): 1 of 9 is 0.111 against 0.105.
    assert gains_worst_group(right(4, 0), right(4, 1), GROUPS, OBJECTS)
    assert not gains_worst_group(right(4, 4), right(4, 5), GROUPS, OBJECTS)  # 0.111 against 0.166
    assert gains_worst_group(right(0, 9), right(1, 9), GROUPS, OBJECTS)
    assert not gains_worst_group(right(4, 4), right(4, 4), GROUPS, OBJECTS)


def test_of_four_groups_the_gain_is_that_of_the_worst_before_and_after() -> None:
    count, before = 20, {0: 10, 1: 20, 2: 18, 3: 15}
    groups = torch.arange(4).repeat_interleave(count)

    def of(right: dict[int, int]) -> torch.Tensor:
        return torch.cat([torch.arange(count) < right[group] for group in range(4)])

    for number in range(21):
        after = {**before, 0: number}
        worst = min(after.values()) / count
        error = math.sqrt(worst * (1 - worst) / count)
        gains = gains_worst_group(of(before), of(after), groups, torch.arange(80))
        assert gains == (worst - 0.5 > error), number


def test_images_of_one_object_are_one_piece_of_evidence() -> None:
    objects = OBJECTS.clone()
    objects[4:] = 99  # all nine images of the second group
    assert gains_worst_group(right(4, 1), right(4, 4), GROUPS, OBJECTS)
    assert not gains_worst_group(right(4, 1), right(4, 4), GROUPS, objects)
