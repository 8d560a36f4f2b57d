"""Boxes around maps, mass and rank by hand and by slow references, and imputation by its own equations."""

import numpy as np
import pytest
import torch
from torch import Tensor

from salve.saliency import (
    box_accuracy,
    imputed,
    insertion_deletion_auc,
    max_box_acc_v2,
    relevance_mass,
    relevance_rank,
)
from salve.types import UserError

SIZE = 12


def blocks(*parts: tuple[int, int, int, int, float]) -> Tensor:
    """One map with rectangles x0, y0, x1, y1 of a value."""
    saliency = torch.zeros(1, SIZE, SIZE)
    for x0, y0, x1, y1, value in parts:
        saliency[0, y0:y1, x0:x1] = value
    return saliency


def boxes(*one: tuple[float, float, float, float]) -> list[Tensor]:
    return [torch.tensor(one, dtype=torch.float64)]


@pytest.mark.parametrize(
    ("saliency", "true", "overlap"),
    [
        (blocks((2, 3, 6, 7, 1.0)), boxes((2, 3, 6, 7)), 1.0),
        (blocks((2, 3, 6, 7, 1.0)), boxes((4, 3, 8, 7)), 8 / 24),
        (blocks((2, 3, 6, 7, 1.0), (8, 8, 12, 12, 1.0)), boxes((8, 8, 12, 12)), 1.0),  # any part
        (blocks((2, 3, 6, 7, 1.0)), boxes((9, 9, 12, 12), (2, 3, 6, 5)), 0.5),  # any true box
        (blocks((2, 2, 4, 4, 1.0), (4, 4, 6, 6, 1.0)), boxes((2, 2, 6, 6)), 1.0),  # corners touch: one part
        (blocks((2, 2, 4, 4, 1.0)), boxes((8, 8, 9, 9)), 0.0),
    ],
)
def test_the_best_box_counts(saliency: Tensor, true: list[Tensor], overlap: float) -> None:
    near = [max(0.0, overlap - 1e-6), overlap + 1e-6]
    assert box_accuracy(saliency, true, [0.5], near).tolist() == [[1.0, 0.0]]


def test_thresholds_are_shares_of_the_maps_own_range() -> None:
    saliency = 5 + 3 * blocks((2, 2, 10, 10, 0.4), (4, 4, 6, 6, 1.0))
    found = box_accuracy(torch.cat([saliency, saliency / 100]), 2 * boxes((4, 4, 6, 6)), [0.3, 0.41], [0.9])
    assert found.tolist() == [[0.0], [1.0]]


def test_a_constant_map_finds_nothing() -> None:
    assert box_accuracy(torch.ones(1, SIZE, SIZE), boxes((0, 0, SIZE, SIZE)), [0.0, 0.5], [0.1]).sum() == 0


def test_box_accuracy_like_one_image_at_a_time_with_masks() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = torch.nn.functional.interpolate(torch.rand(20, 1, 4, 4, generator=draw), size=(SIZE, SIZE))[:, 0]
    true = [torch.tensor([[1.0, 2.0, 7.0, 9.0]])] * 20
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[2:9, 1:7] = True
    hits = 0
    for saliency in maps.numpy():
        wanted, best = (saliency - saliency.min()) / (saliency.max() - saliency.min()) >= 0.6, 0.0
        seen = np.zeros_like(wanted)
        for start in np.argwhere(wanted):  # flood each part by hand
            if seen[tuple(start)]:
                continue
            part, waiting = [], [tuple(start)]
            while waiting:
                y, x = waiting.pop()
                if 0 <= y < SIZE and 0 <= x < SIZE and wanted[y, x] and not seen[y, x]:
                    seen[y, x] = True
                    part.append((y, x))
                    waiting += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            rows, columns = zip(*part, strict=True)
            box = np.zeros_like(mask)
            box[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
            best = max(best, (box & mask).sum() / (box | mask).sum())
        hits += best >= 0.3
    assert box_accuracy(maps, true, [0.6], [0.3]).item() == hits / 20
    assert 0 < hits < 20


def test_the_threshold_is_chosen_on_other_images() -> None:
    chosen_on = torch.tensor([[0.2, 0.9], [0.6, 0.1]])
    reported_on = torch.tensor([[0.5, 0.4], [0.3, 0.8]])
    assert max_box_acc_v2(chosen_on, reported_on) == pytest.approx((0.3 + 0.4) / 2)
    assert max_box_acc_v2(reported_on, reported_on) == pytest.approx((0.5 + 0.8) / 2)


@pytest.mark.parametrize("bad", ["no boxes", "too few", "nan"])
def test_what_cannot_be_scored_is_refused(bad: str) -> None:
    maps = blocks((2, 2, 4, 4, float("nan") if bad == "nan" else 1.0))
    true = {"no boxes": [torch.zeros(0, 4)], "too few": [], "nan": boxes((1, 1, 2, 2))}[bad]
    with pytest.raises(UserError, match="finite" if bad == "nan" else "needs a box"):
        box_accuracy(maps, true)


def test_mass_and_rank_by_hand() -> None:
    maps = torch.cat([blocks((0, 0, 2, 2, 3.0), (4, 4, 6, 6, 1.0)), torch.zeros(1, SIZE, SIZE), blocks()])
    masks = torch.zeros(3, SIZE, SIZE, dtype=torch.bool)
    masks[:2, :2, :4] = True  # 8 pixels, of which the map marks 4 most
    mass, rank = relevance_mass(maps, masks), relevance_rank(maps, masks)
    assert mass[:2].tolist() == [0.75, 0.0]
    # The next four of the eight are those of value 1, off the object. A blank map scores by chance: 8 of 144.
    assert rank[:2].tolist() == pytest.approx([0.5, 8 / SIZE**2])
    assert mass[2].isnan()
    assert rank[2].isnan()


def test_rank_is_the_mean_over_orders_of_ties() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (1, 6, 6), generator=draw).float()
    masks = torch.rand(1, 6, 6, generator=draw) < 0.4
    scores = []
    for _ in range(4000):
        order = torch.randperm(36, generator=draw)
        best = order[maps.flatten()[order].argsort(descending=True, stable=True)][: int(masks.sum())]
        scores.append(masks.flatten()[best].double().mean())
    assert relevance_rank(maps, masks).item() == pytest.approx(torch.stack(scores).mean().item(), abs=0.01)


def test_a_removed_pixel_is_the_weighted_mean_of_its_neighbours() -> None:
    draw = torch.Generator().manual_seed(0)
    image, removed = torch.rand(3, 7, 9, generator=draw, dtype=torch.float64), torch.rand(7, 9, generator=draw) < 0.6
    filled = imputed(image, removed, noise=0)
    assert torch.equal(filled[:, ~removed], image[:, ~removed])
    for y, x in removed.nonzero().tolist():
        total, weights = torch.zeros(3, dtype=torch.float64), 0.0
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if (i or j) and 0 <= y + i < 7 and 0 <= x + j < 9:
                    weight = 1 / 12 if i and j else 1 / 6
                    total, weights = total + weight * filled[:, y + i, x + j], weights + weight
        torch.testing.assert_close(filled[:, y, x], total / weights)


def test_a_flat_image_stays_flat_whatever_is_removed_and_noise_has_its_size() -> None:
    image, removed = torch.full((3, 20, 20), 2.5), torch.rand(20, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    torch.testing.assert_close(imputed(image, removed, noise=0), image)
    noisy = imputed(image, removed, noise=0.1) - image
    assert noisy[:, removed].std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy[:, ~removed], torch.zeros_like(noisy[:, ~removed]))
    assert torch.equal(imputed(image, torch.ones(20, 20, dtype=torch.bool), noise=0), torch.zeros_like(image))
    assert torch.equal(imputed(image, torch.zeros(20, 20, dtype=torch.bool)), image)


def test_insertion_and_deletion_with_imputed_pixels_hide_nothing_of_a_flat_image() -> None:
    images = torch.full((1, 3, 8, 8), 3.0)

    def fill(image: Tensor, removed: Tensor) -> Tensor:
        return image if removed.all() else imputed(image, removed, noise=0)

    maps = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    areas = insertion_deletion_auc(lambda batch: batch.mean(dim=(1, 2, 3)), images, maps, fill, steps=4)
    torch.testing.assert_close(torch.stack(areas), torch.full((2, 1), 3.0))
