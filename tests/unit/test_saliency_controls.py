"""Controls of maps: a Gaussian, networks whose weights are shuffled, and the rank correlation of maps."""

import pytest
import torch
from scipy import stats
from torch import nn

from salve.saliency import box_accuracy, box_hits, centred_gaussian, map_correlation, randomised
from salve.types import UserError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_gaussian_is_highest_in_the_middle_and_falls_as_its_width_says() -> None:
    found = centred_gaussian(9, width=1 / 9)
    assert (found.argmax().item(), found[4, 4].item()) == (40, 1.0)
    torch.testing.assert_close(found[4, 5], torch.tensor(-0.5).exp())
    torch.testing.assert_close(found[5, 5], torch.tensor(-1.0).exp())
    assert torch.equal(found, found.T)
    assert torch.equal(found, found.flip(0))


def test_the_last_layers_forget_first_and_nothing_else_changes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 6)
    )
    for number, tensor in enumerate(model.parameters()):
        tensor.data = drawn(*tensor.shape, seed=number)
    model[1].running_var = torch.arange(1.0, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = []
    for share in (0, 0.5, 0.75, 1):  # of four modules with weights
        now = randomised(model, share, seed=3).state_dict()
        changed.append({name.partition(".")[0] for name in now if not torch.equal(now[name], before[name])})
        assert all(torch.equal(now[name].flatten().sort().values, before[name].flatten().sort().values) for name in now)
    assert changed == [{"5"}, {"3", "5"}, {"1", "3", "5"}, {"0", "1", "3", "5"}]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    half, whole = (randomised(model, share, seed=3).state_dict() for share in (0.5, 1))
    assert torch.equal(half["3.weight"], whole["3.weight"])
    with pytest.raises(UserError, match="must lie in 0 to 1"):
        randomised(model, 1.5)


def test_maps_are_correlated_by_rank_with_ties() -> None:
    maps, others = drawn(4, 5, 6).relu(), drawn(4, 5, 6, seed=1).relu()
    others[1], others[2], others[3] = maps[1] ** 3 + 1, -maps[2], 2.0
    found = map_correlation(maps, others)
    wanted = stats.spearmanr(maps[0].flatten(), others[0].flatten()).statistic
    assert found[:3].tolist() == pytest.approx([wanted, 1, -1])
    assert found[3].isnan()
    with pytest.raises(UserError, match=r"must be \[N, H, W\]"):
        map_correlation(maps, others[:2])
    with pytest.raises(UserError, match="finite"):
        map_correlation(maps, others / 0)


def test_hits_of_single_images_are_the_accuracy() -> None:
    maps, boxes = drawn(6, 8, 8), [torch.tensor([[1.0, 2, 6, 7]])] * 6
    one_by_one = torch.stack([box_accuracy(maps[i : i + 1], boxes[:1]) for i in range(6)])
    assert torch.equal(box_hits(maps, boxes).double(), one_by_one)
    assert 0 < one_by_one.mean() < 1
