"""The gate's rivals: hooks and modified weights, constrained least squares by its KKT system, and plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve.backbones.tail import LinearTail
from salve.editing import (
    ablated_logits,
    edit_curves,
    edited_logits,
    rank_one_logits,
    rank_one_rows,
    rank_one_weight,
    steered_logits,
    strength_curves,
)
from salve.types import UserError

STRENGTHS = (0.0, 0.3, 1.0, 7.0, -2.0)


def case(
    images: int = 30, width: int = 6, classes: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head, activations that are not centred, and labels; all from one seed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, width, generator=generator, dtype=dtype)
    bias = torch.randn(classes, generator=generator, dtype=dtype)
    activations = torch.randn(images, width, generator=generator, dtype=dtype) + 1
    return weight, bias, activations, torch.arange(images) % classes


def network() -> nn.Sequential:
    """Images ``[N, 3, 8, 8]`` → site of 6 channels (the input of layer 4) → 4 classes."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return layers.double()


@pytest.mark.parametrize("method", [steered_logits, ablated_logits])
def test_steering_and_ablation_equal_a_hook_in_the_network(method: object) -> None:
    model, images = network(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    direction = torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        tail = LinearTail(model.get_parameter("4.weight"), model.get_parameter("4.bias"))
        found = method(tail, model[:4](images), direction, STRENGTHS)  # type: ignore[operator]
    unit = direction / math.sqrt(sum(x * x for x in direction.tolist()))
    for strength, logits in zip(STRENGTHS, found, strict=True):

        def change(_: nn.Module, inputs: tuple[Tensor], strength: float = strength) -> tuple[Tensor]:
            a = inputs[0]
            if method is steered_logits:
                return (a - strength * direction,)
            return (torch.stack([row - strength * torch.outer(unit, unit) @ row for row in a]),)

        hook = model[4].register_forward_pre_hook(change)
        with torch.no_grad():
            torch.testing.assert_close(logits, model(images), rtol=1e-12, atol=1e-12)
        hook.remove()
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_steering_is_a_change_of_the_bias_alone() -> None:
    weight, bias, activations, _ = case()
    direction = torch.randn(6, dtype=torch.float64)
    found = steered_logits(LinearTail(weight, bias), activations, direction, [1.5])[0]
    moved = bias - 1.5 * weight @ direction
    torch.testing.assert_close(found, F.linear(activations, weight, moved), rtol=1e-12, atol=1e-12)


def test_ablation_at_one_leaves_nothing_of_the_direction_and_is_a_permanent_edit() -> None:
    weight, bias, activations, _ = case()
    direction = 3 * torch.randn(6, dtype=torch.float64)
    # A reader along the direction reads nothing any more, whatever the length and sign of the direction.
    along = ablated_logits(LinearTail(torch.stack([direction] * 4), bias), activations, -2 * direction, [1.0])[0]
    torch.testing.assert_close(along, bias.expand(30, 4), rtol=1e-12, atol=1e-12)
    projector = torch.eye(6).double() - 0.4 * torch.outer(direction, direction) / (direction @ direction)
    found = ablated_logits(LinearTail(weight, bias), activations, direction, [0.4])[0]
    torch.testing.assert_close(found, F.linear(activations, weight @ projector, bias), rtol=1e-12, atol=1e-12)
    nothing = ablated_logits(LinearTail(weight, bias), activations, torch.zeros(6, dtype=torch.float64), [5.0])[0]
    assert torch.equal(nothing, activations @ weight.T + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strength_zero_is_the_original_to_the_bit(dtype: torch.dtype) -> None:
    weight, bias, activations, labels = case(dtype=dtype)
    original, direction = activations @ weight.T + bias, torch.randn(6, dtype=dtype)
    row = rank_one_rows(activations, labels, 4)[1]
    for found in (
        steered_logits(LinearTail(weight, bias), activations, direction, [0.0, 2.0]),
        ablated_logits(LinearTail(weight, bias), activations, direction, [0.0, 2.0]),
        rank_one_logits(LinearTail(weight, bias), activations, row, 1, [0.0, 2.0]),
    ):
        assert found.dtype == dtype
        assert torch.equal(found[0], original)
        assert not torch.equal(found[1], original)
    edited = rank_one_weight(weight, row, 1, 0.0)
    assert torch.equal(edited, weight)
    assert edited.data_ptr() != weight.data_ptr()


def kkt(weight: np.ndarray, key: np.ndarray, value: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """``argmin tr (X − W) C (X − W)ᵀ`` subject to ``X k = v``: row by row, with a Lagrange multiplier each."""
    width = len(key)
    system = np.block([[2 * moment, key[:, None]], [key[None], np.zeros((1, 1))]])
    rows = []
    for row, wanted in zip(weight, value, strict=True):
        right = np.append(2 * moment @ row, wanted)
        rows.append(np.linalg.solve(system, right)[:width])
    return np.array(rows)


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
@pytest.mark.parametrize("images", [30, 4])  # 4 images of 6 channels: the second moment is singular
def test_the_rank_one_edit_solves_the_constrained_least_squares_problem(images: int, ridge: float) -> None:
    weight, bias, activations, labels = case(images)
    rows = rank_one_rows(activations, labels, 4, ridge)
    moment = np.zeros((6, 6))
    for a in activations.numpy():
        for i in range(6):
            for j in range(6):
                moment[i, j] += a[i] * a[j] / images
    moment += ridge * np.mean([moment[i, i] for i in range(6)]) * np.eye(6)
    for k in range(4):
        key = activations[labels == k].mean(dim=0)
        wanted = weight @ key
        wanted[k] -= 2.5
        edited = rank_one_weight(weight, rows[k], k, 2.5)
        expected = kkt(weight.numpy(), key.numpy(), wanted.numpy(), moment)
        np.testing.assert_allclose(edited.numpy(), expected, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(edited @ key, wanted, rtol=1e-10, atol=1e-10)  # W' k* = v*
        logits = rank_one_logits(LinearTail(weight, bias), activations, rows[k], k, [0.0, 2.5])[1]
        torch.testing.assert_close(logits, F.linear(activations, edited, bias), rtol=1e-10, atol=1e-10)


def test_no_other_edit_that_stores_the_pair_changes_the_outputs_less() -> None:
    _, _, activations, labels = case()
    row = rank_one_rows(activations, labels, 4, 1e-9)[2]
    key = activations[labels == 2].mean(dim=0)
    least = (activations @ row).square().mean()
    for _ in range(20):
        aside = torch.randn(6, dtype=torch.float64)
        other = row + 0.1 * (aside - (aside @ key) / (key @ key) * key)  # it, too, maps the key to 1
        assert float(other @ key) == pytest.approx(1)
        assert (activations @ other).square().mean() > least


def test_a_class_without_images_or_with_a_zero_key_has_no_rank_one_edit() -> None:
    _, _, activations, labels = case()
    labels = torch.where(labels == 3, 0, labels)
    activations[labels == 1] = 0
    found = rank_one_rows(activations, labels, 4)
    assert found.isnan().all(dim=1).tolist() == [False, True, False, True]
    assert found[[0, 2]].isfinite().all()
    alone = rank_one_rows(torch.zeros(3, 6), torch.zeros(3, dtype=torch.long), 2)  # nothing at all is known
    assert alone.isnan().all()


def test_float32_activations_give_the_row_of_float64() -> None:
    _, _, activations, labels = case(images=4)  # singular: what single precision would lose
    exact = rank_one_rows(activations.float().double(), labels, 4)
    found = rank_one_rows(activations.float(), labels, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_impossible_strengths_and_ridges_are_refused() -> None:
    weight, bias, activations, labels = case()
    for strength in (math.inf, math.nan):
        with pytest.raises(UserError, match="must be finite"):
            steered_logits(LinearTail(weight, bias), activations, weight[0], [1.0, strength])
    for ridge in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="of a rank-one edit must be above 0"):
            rank_one_rows(activations, labels, 4, ridge)


def test_curves_of_any_method_equal_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, activations, labels = case()
    labels = labels.clamp_max(2)  # class 3 has no images
    direction, strengths = torch.randn(6, dtype=torch.float64), torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)

    def steered(block: Tensor, at: Tensor) -> Tensor:
        return steered_logits(LinearTail(weight, bias), block, direction, at)

    found = strength_curves(LinearTail(weight, bias), activations, labels, steered, strengths)
    for s, strength in enumerate(strengths.tolist()):
        for k in range(3):
            right, drift, count = 0.0, 0.0, 0
            for a, label in zip(activations, labels, strict=True):
                if label == k:
                    before, after = F.linear(a, weight, bias), F.linear(a - strength * direction, weight, bias)
                    right += float(after.argmax() == k)
                    drift += float(F.kl_div(after.log_softmax(0), before.softmax(0), reduction="sum"))
                    count += 1
            assert float(found[0][s, k]) == pytest.approx(right / count)
            assert float(found[1][s, k]) == pytest.approx(drift / count, abs=1e-12)
        assert math.isnan(float(found[0][s, 3]))
    monkeypatch.setattr("salve.editing.curves._BLOCK", 30)
    again = strength_curves(LinearTail(weight, bias), activations, labels, steered, strengths)
    torch.testing.assert_close(again, found, equal_nan=True)


def test_the_gates_curves_are_those_of_its_logits() -> None:
    weight, bias, activations, labels = case()
    alphas = torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)
    expected = strength_curves(
        LinearTail(weight, bias),
        activations,
        labels,
        lambda a, s: edited_logits(LinearTail(weight, bias), a, weight[0], s, "enhance"),
        alphas,
    )
    found = edit_curves(LinearTail(weight, bias), activations, labels, weight[0], alphas, "enhance")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
