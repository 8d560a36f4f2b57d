"""Curves over a grid of strengths, by plain loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from salve.backbones.tail import LinearTail
from salve.editing import edit_curves, edited_logits, strength_curves


def case() -> tuple[LinearTail, Tensor, Tensor]:
    """A head, activations that are not centred, and labels; class 3 has no images."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    activations = torch.randn(30, 6, generator=generator, dtype=torch.float64) + 1
    return LinearTail(weight, bias), activations, (torch.arange(30) % 4).clamp_max(2)


def test_curves_of_any_edit_equal_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tail, activations, labels = case()
    direction = torch.randn(6, dtype=torch.float64)
    strengths = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)

    def steered(block: Tensor, at: Tensor) -> Tensor:
        return torch.stack([tail(block - strength * direction) for strength in at])

    found = strength_curves(tail, activations, labels, steered, strengths)
    for s, strength in enumerate(strengths.tolist()):
        for k in range(3):
            right, drift, count = 0.0, 0.0, 0
            for a, label in zip(activations, labels, strict=True):
                if label == k:
                    before = F.linear(a, tail.weight, tail.bias)
                    after = F.linear(a - strength * direction, tail.weight, tail.bias)
                    right += float(after.argmax() == k)
                    drift += float(F.kl_div(after.log_softmax(0), before.softmax(0), reduction="sum"))
                    count += 1
            assert float(found[0][s, k]) == pytest.approx(right / count)
            assert float(found[1][s, k]) == pytest.approx(drift / count, abs=1e-12)
        assert math.isnan(float(found[0][s, 3]))
    monkeypatch.setattr("salve.editing.curves._BLOCK", 30)
    again = strength_curves(tail, activations, labels, steered, strengths)
    torch.testing.assert_close(again, found, equal_nan=True)


def test_the_gates_curves_are_those_of_its_logits() -> None:
    tail, activations, labels = case()
    column, alphas = tail.weight[0], torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)
    expected = strength_curves(
        tail, activations, labels, lambda a, s: edited_logits(tail, a, column, s, "enhance"), alphas
    )
    found = edit_curves(tail, activations, labels, column, alphas, "enhance")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
