"""Localisation scores on cases worked out by hand, and scores whose area under the curve is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from salve.saliency import insertion_deletion_auc, iou, pointing_game
from salve.types import UserError


def box(rows: slice, columns: slice, size: int = 8) -> Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, rows, columns] = True
    return mask


def peak(*places: tuple[int, int], size: int = 8) -> Tensor:
    saliency = torch.zeros(1, size, size)
    for row, column in places:
        saliency[0, row, column] = 2.0
    return saliency


@pytest.mark.parametrize(
    ("saliency", "tolerance", "expected"),
    [
        (peak((3, 3)), 0, 1.0),
        (peak((1, 3)), 0, 0.0),
        (peak((1, 3)), 1, 1.0),  # one row above the object
        (peak((1, 1)), 1, 1.0),  # diagonally
        (peak((0, 3)), 1, 0.0),
        (peak((3, 3), (7, 7)), 0, 0.5),
        (peak((3, 3), (2, 4), (7, 7), (0, 0)), 0, 0.5),
        (torch.zeros(1, 8, 8), 0, 0.0),
        (torch.ones(1, 8, 8), 0, 0.0),
        (-peak((3, 3)), 0, 8 / 63),  # every pixel but one is a maximum
    ],
)
def test_pointing_game_by_hand(saliency: Tensor, tolerance: int, expected: float) -> None:
    mask = box(slice(2, 5), slice(2, 5))
    torch.testing.assert_close(pointing_game(saliency, mask, tolerance), torch.tensor([expected]))


def test_pointing_game_on_the_plateau_of_an_enlarged_map() -> None:
    # A coarse maximum in the corner becomes a plateau in the corner: 2 × 2 pixels here, half of them on the object.
    coarse = torch.zeros(1, 1, 2, 2)
    coarse[..., 0, 0] = 0.3
    saliency = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)[0]
    assert pointing_game(saliency, box(slice(0, 1), slice(0, 8))).item() == pytest.approx(0.5)


def test_pointing_game_of_random_maps_hits_as_often_as_the_object_is_large() -> None:
    maps = torch.rand(4000, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = box(slice(0, 4), slice(0, 4)).expand(4000, 8, 8)
    # 16 of 64 pixels; three standard errors of 4000 draws are 0.02.
    assert pointing_game(maps, masks).mean().item() == pytest.approx(0.25, abs=0.021)


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        (box(slice(2, 6), slice(2, 6)), 1.0),
        (box(slice(2, 4), slice(2, 6)), 0.5),
        (box(slice(4, 8), slice(2, 6)), 8 / 24),
        (box(slice(0, 1), slice(0, 8)), 0.0),
        (box(slice(0, 8), slice(0, 8)), 16 / 64),
        (box(slice(0, 0), slice(0, 0)), 0.0),
    ],
)
def test_iou_by_hand(marked: Tensor, expected: float) -> None:
    mask = box(slice(2, 6), slice(2, 6))
    # Half of the maximum, 3, is just enough. Without a marked pixel the map is blank.
    saliency = torch.where(marked, 1.5, 1.4 * marked.any())
    saliency.flatten()[marked.flatten().nonzero()[:1]] = 3.0
    torch.testing.assert_close(iou(saliency, mask), torch.tensor([expected]))


def test_scores_keep_images_apart_and_have_no_value_without_an_object() -> None:
    maps = torch.cat([peak((3, 3)), peak((7, 7)), peak((3, 3))]).double()
    masks = torch.cat([box(slice(3, 4), slice(3, 4)), box(slice(3, 4), slice(3, 4)), box(slice(0, 0), slice(0, 0))])
    for score in (pointing_game(maps, masks), iou(maps, masks)):
        assert score.dtype == torch.float64
        assert score[:2].tolist() == [1.0, 0.0]
        assert score[2].isnan()


def mean_of_first_channel(images: Tensor) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def test_insertion_and_deletion_of_an_even_image_are_straight_lines() -> None:
    # Every pixel adds the same, so score = kept share: both areas are (image + baseline) / 2 whatever the map.
    images, maps = torch.full((2, 3, 8, 8), 3.0), torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    result = insertion_deletion_auc(mean_of_first_channel, images, maps, torch.full((3, 1, 1), 1.0), steps=16)
    torch.testing.assert_close(result.insertion, torch.full((2,), 2.0))
    torch.testing.assert_close(result.deletion, torch.full((2,), 2.0))


def test_insertion_and_deletion_of_one_bright_quarter() -> None:
    # All of the score, 1, sits in a quarter q of the pixels. Found first, it is inserted along a line from 0 to 1 over
    # [0, q], and then stays: 1 − q/2. Deleted first, it is the other way round: q/2. Found last, they change places.
    image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    image[:, :, :4, :4] = 4.0
    right, wrong = image[:, 0], 4 - image[:, 0]
    zero = torch.zeros(1, 3, 1, 1)
    good = insertion_deletion_auc(mean_of_first_channel, image, right, zero, steps=16)
    bad = insertion_deletion_auc(mean_of_first_channel, image, wrong, zero, steps=16)
    assert good.insertion.dtype == torch.float64
    assert (good.insertion.item(), good.deletion.item()) == pytest.approx((0.875, 0.125))
    assert (bad.insertion.item(), bad.deletion.item()) == pytest.approx((0.125, 0.875))


def test_ties_are_taken_in_random_order_which_the_seed_determines() -> None:
    # In row-major order, a blank map would delete the bright upper half first and look faithful.
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, :16] = 2.0
    blank, zero = torch.zeros(1, 32, 32), torch.zeros(1)
    deletion = insertion_deletion_auc(mean_of_first_channel, image, blank, zero, steps=32).deletion
    again = insertion_deletion_auc(mean_of_first_channel, image, blank, zero, steps=32).deletion
    other = insertion_deletion_auc(mean_of_first_channel, image, blank, zero, steps=32, seed=1).deletion
    assert deletion.item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(deletion, again)
    assert not torch.equal(deletion, other)


@pytest.mark.parametrize("score", [pointing_game, iou])
def test_bad_maps_are_refused(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    mask = box(slice(0, 2), slice(0, 2))
    with pytest.raises(UserError, match=r"must both be \[N, H, W\]"):
        score(torch.zeros(2, 8, 8), mask)
    with pytest.raises(UserError, match="boolean masks"):
        score(torch.zeros(1, 8, 8), mask.float())
    with pytest.raises(UserError, match="NaN"):
        score(torch.full((1, 8, 8), torch.nan), mask)


def test_other_bad_arguments_are_refused() -> None:
    maps, mask, images = peak((1, 1)), box(slice(0, 2), slice(0, 2)), torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="tolerance=-1"):
        pointing_game(maps, mask, -1)
    with pytest.raises(UserError, match="fraction=0"):
        iou(maps, mask, 0.0)
    with pytest.raises(UserError, match="negative"):
        iou(-maps, mask)
    with pytest.raises(UserError, match="steps=0"):
        insertion_deletion_auc(mean_of_first_channel, images, maps, torch.zeros(1), steps=0)
    with pytest.raises(UserError, match="baseline"):
        insertion_deletion_auc(mean_of_first_channel, images, maps, torch.zeros(2))
    with pytest.raises(UserError, match=r"\[N, H, W\]"):
        insertion_deletion_auc(mean_of_first_channel, images, peak((1, 1), size=4), torch.zeros(1))
