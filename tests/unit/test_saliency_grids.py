"""Where elements lie in the image, against images whose values say where they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from salve.saliency.grids import PositionTracker, grid_of

HEIGHT, WIDTH = 4, 6


def coordinates() -> Tensor:
    """An image ``[1, 3, 4, 6]`` whose first two channels are the row and the column of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([rows, columns, torch.zeros(HEIGHT, WIDTH, dtype=torch.long)]).float()[None]


def windows(x: Tensor) -> Tensor:
    """Windows of 2 × 3 pixels, after a shift: ``[4, 6, 3]``."""
    x = x.permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
    return x.view(1, 2, 2, 2, 3, 3).permute(0, 1, 3, 2, 4, 5).reshape(4, 6, 3)


#: Rearrangements to ``[…, 3]``, so that the first two channels say where a position lies.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "shifted windows": windows,
    "flipped": lambda x: x.flip(2).movedim(1, -1),
    "part": lambda x: x[:, :, 1:3, ::2].permute(0, 2, 3, 1),
    "joined": lambda x: torch.cat([x[:, :, 2:], x[:, :, :2]], dim=2).movedim(1, -1),
    "split": lambda x: torch.stack(x.flatten(2).transpose(1, 2).chunk(3, dim=1), dim=1),
    "indexed": lambda x: x.flatten(2).transpose(1, 2)[:, torch.tensor([5, 3, 11, 0])],
    "one of two": lambda x: torch.stack([x, -x], 1).select(1, 0).movedim(1, -1),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_rearranges_elements_rearranges_their_places(move: Callable[[Tensor], Tensor]) -> None:
    images = coordinates()
    with torch.no_grad(), PositionTracker(images) as tracker:
        moved = move(images)
    where = tracker.of(moved)
    assert where is not None
    for axis in (0, 1):
        assert torch.equal(where[axis].mean(-1).float(), moved[..., axis])


def test_padding_has_no_place_and_a_token_that_is_put_in_front_none_either() -> None:
    images = coordinates()
    with torch.no_grad(), PositionTracker(images) as tracker:
        padded = F.pad(images, (1, 0, 0, 2)).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones(1, 1, 3), padded], dim=1)
    where = tracker.of(tokens)
    assert where is not None
    found = grid_of(*(one[0].mean(1) for one in where))
    assert found is not None
    assert found.shape == (HEIGHT, WIDTH)
    maps = found.maps(tokens)
    assert torch.equal(maps, images)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_gives_each_token_the_place_of_its_query(heads: int) -> None:
    images = coordinates()
    with torch.no_grad(), PositionTracker(images) as tracker:
        tokens = images.flatten(2).transpose(1, 2)
        q, k, v = (tokens @ torch.randn(3, 6) for _ in range(3))
        q, k, v = (one.view(1, 24, heads, -1).transpose(1, 2) for one in (q, k.flip(1), v.flip(1)))
        weights = (q @ k.transpose(2, 3)).softmax(3)
        by_hand, fused = weights @ v, F.scaled_dot_product_attention(q, k, v)
    for one in (by_hand, fused):
        where = tracker.of(one)
        assert where is not None
        for axis in (0, 1):
            assert torch.equal(where[axis][0, 0, :, 0].float(), tokens[0, :, axis])


def test_merged_patches_lie_in_the_middle_and_a_mean_over_positions_nowhere() -> None:
    images = coordinates()
    with torch.no_grad(), PositionTracker(images) as tracker:
        x = images.permute(0, 2, 3, 1)
        merged = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)
        reduced = F.linear(F.layer_norm(merged, (12,)), torch.randn(5, 12))
        mean = images.mean((2, 3))
        mixed = images.flatten(2) @ torch.randn(24, 7)  # over tokens
        channels = images.mean(1)
    where = tracker.of(reduced)
    assert where is not None
    assert torch.equal(where[0][0, :, 0, 0], torch.tensor([0.5, 2.5]).double())
    assert torch.equal(where[1][0, 0, :, 0], torch.tensor([0.5, 2.5, 4.5]).double())
    assert tracker.of(mean) is None
    assert tracker.of(mixed) is None
    kept = tracker.of(channels)
    assert kept is not None
    assert torch.equal(kept[0][0].float(), images[0, 0])


def test_a_convolution_on_windows_has_no_known_places() -> None:
    images = coordinates()
    with torch.no_grad(), PositionTracker(images) as tracker:
        plain = F.conv2d(images, torch.randn(2, 3, 2, 2), stride=2)
        x = images.view(1, 3, 2, 2, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(4, 3, 2, 3)
        in_windows = F.conv2d(x, torch.randn(2, 3, 2, 3))
    where = tracker.of(plain)
    assert where is not None
    assert torch.equal(where[1][0, 0, 0], torch.arange(3).double())
    assert tracker.of(in_windows) is None


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([0.0], [0.0]),  # one cell
        ([torch.nan, torch.nan], [torch.nan, torch.nan]),  # prefix tokens only
        ([0.0, 0.0, 1.0], [0.0, 1.0, 0.0]),  # a cell is missing
        ([0.0, 0.0, 0.0], [0.0, 1.0, 1.0]),  # two positions in one cell
    ],
)
def test_what_fills_no_grid_is_none(rows: list[float], columns: list[float]) -> None:
    assert grid_of(torch.tensor(rows), torch.tensor(columns)) is None


def test_a_grid_may_be_one_row() -> None:
    found = grid_of(torch.tensor([2.0, torch.nan, 2.0]), torch.tensor([7.0, torch.nan, 3.0]))
    assert found is not None
    assert found.shape == (1, 2)
    assert found.order.tolist() == [2, 0]
