"""The smallest norm that breaks an image: the search against a known threshold, the attack against a linear network."""

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from salve.diagnosis.adversarial import Attack, smallest_norms
from salve.types import UserError

installed = pytest.mark.skipif(
    not find_spec("art"), reason="adversarial-robustness-toolbox is not installed (salve[robustness])"
)


def test_the_search_finds_each_images_own_threshold() -> None:
    thresholds = torch.tensor([0.011, 0.3, 0.9, 0.0, 5.0], dtype=torch.float64)
    asked: list[int] = []

    def breaks(rows: Tensor, norms: Tensor) -> Tensor:
        asked.append(len(rows))
        return norms >= thresholds[rows]

    found = smallest_norms(breaks, 5, 0.01, 1.0, halvings=6)
    assert found[4] == torch.inf
    factor = 100 ** (1 / 2**6)
    assert (found[:3] >= thresholds[:3]).all()
    assert (found[:3] <= thresholds[:3] * factor * (1 + 1e-9)).all()
    assert found[3] <= 0.01 * factor * (1 + 1e-9)  # as small as the search goes
    assert asked == [5] + [4] * 6
    with pytest.raises(UserError, match="rise from above 0"):
        smallest_norms(breaks, 5, 0.0, 1.0, 1)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "art", None)
    for name in [name for name in sys.modules if name.startswith("art.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"pip install 'salve\[robustness\]'"):
        Attack(lambda images: images, torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.long), 2)


@installed
def test_of_a_linear_network_the_smallest_norm_is_margin_over_the_weights_one_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = 0.3 + 0.4 * torch.rand(6, 3, 4, 4, generator=generator)  # no norm below 0.3 leaves 0 … 1
    weight = torch.randn(2, 48, generator=generator)

    def logits(images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ weight.T

    margin = logits(pixels)
    labels = margin.argmax(dim=1)
    gap = (margin[:, 0] - margin[:, 1]).abs()
    exact = gap / (weight[0] - weight[1]).abs().sum()
    assert exact.max() < 0.3
    attack = Attack(logits, pixels, labels, 2, steps=4, restarts=2, batch_size=4)
    found = smallest_norms(attack, 6, float(exact.min()) / 2, 0.3, halvings=7)
    assert (found >= exact * (1 - 1e-4)).all()
    assert (found <= exact * 1.05).all()
    torch.testing.assert_close(smallest_norms(attack, 6, float(exact.min()) / 2, 0.3, halvings=7), found)
