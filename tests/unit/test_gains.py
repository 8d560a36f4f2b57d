"""What a change gains and loses by groups: against sums that are written out."""

import math
from itertools import product

import pytest
import torch

from salve.editing.gains import average_loss, gains_by_groups

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


def test_of_one_group_a_gain_must_pass_mcnemar_s_test() -> None:
    groups, objects = torch.zeros(60, dtype=torch.long), torch.arange(60)
    said = set()
    for won, lost in product(range(0, 30, 3), range(0, 30, 4)):
        before, after = torch.zeros(2, 60, dtype=torch.bool)
        after[:won], before[30 : 30 + lost] = True, True
        statistic = (won - lost) ** 2 / max(won + lost, 1)
        found = gains_by_groups(before, after, groups, objects)
        assert found == (won > lost and statistic > 4), (won, lost)
        said.add(found)
    assert said == {True, False}


def test_small_groups_count_as_much_as_large_ones() -> None:
    """Against the sum over objects that is written out."""
    draw = torch.Generator().manual_seed(0)
    groups = torch.tensor([0] * 40 + [1] * 5 + [3] * 15)  # nothing of the third group
    objects = torch.randint(25, (60,), generator=draw)
    said = set()
    for number in range(200):
        before = torch.rand(60, generator=draw) < 0.5
        after = before ^ (torch.rand(60, generator=draw) < 0.2) | (torch.rand(60, generator=draw) < number / 400)
        adds = {int(one): 0.0 for one in objects}
        for i in range(60):
            size = int((groups == groups[i]).sum())
            adds[int(objects[i])] += (int(after[i]) - int(before[i])) / size / 3
        worst = [min(float(right[groups == g].double().mean()) for g in (0, 1, 3)) for right in (before, after)]
        wanted = worst[1] > worst[0] and sum(adds.values()) > 2 * math.sqrt(sum(one**2 for one in adds.values()))
        assert gains_by_groups(before, after, groups, objects) == wanted
        said.add(wanted)
    assert said == {True, False}


def test_a_mean_that_gains_is_not_enough_where_the_worst_group_does_not() -> None:
    assert gains_by_groups(right(1, 1), right(2, 9), GROUPS, OBJECTS)
    assert not gains_by_groups(right(1, 1), right(4, 1), GROUPS, OBJECTS)
    assert not gains_by_groups(right(4, 4), right(4, 4), GROUPS, OBJECTS)


def test_few_images_show_nothing() -> None:
    for count in (1, 4, 5):
        nothing = torch.zeros(count, dtype=torch.bool)
        groups = torch.zeros(count, dtype=torch.long)
        assert gains_by_groups(nothing, ~nothing, groups, torch.arange(count)) == (count == 5)


def test_a_network_that_is_no_better_seldom_seems_to_gain() -> None:
    draw = torch.Generator().manual_seed(0)
    groups, objects = torch.arange(4).repeat_interleave(25), torch.arange(50).repeat(2)
    for share in (0.2, 0.5, 0.8):
        seem = 0
        for _ in range(2000):
            drawn = torch.rand(2, 100, generator=draw) < share
            seem += gains_by_groups(drawn[0], drawn[1], groups, objects)
        assert 0.003 < seem / 2000 < 0.03, share  # one side of a 95 % interval, and a worst group that gains


def test_images_of_one_object_are_one_piece_of_evidence() -> None:
    assert gains_by_groups(right(0, 0), right(4, 9), GROUPS, OBJECTS)
    assert not gains_by_groups(right(0, 0), right(4, 9), GROUPS, OBJECTS // 5)  # three objects
