"""Edits behind a linear head: hooks in a network, closed forms, and constrained least squares by its KKT system."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from salve.editing.methods import FittedEdit, Fitting, Target, make_method
from salve.editing.methods.base import logits_at_head
from salve.editing.methods.change import Change, changed_state
from salve.editing.methods.rank_one import RankOne
from salve.types import UserError
from tests.unit.methods import ORDER, TARGET, Drawn, fitting_at, fitting_of_head, network

#: A negative one goes the opposite way.
STRENGTHS = (0.0, 0.3, 1.0, 7.0, -2.0)
#: Methods whose edits of the head are linear in their strength.
LINEAR = ("steering", "ablation", "rank_one", "head_bias", "head_row")


def case(
    images: int = 30, width: int = 6, classes: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head, activations that are not centred, and labels; all from one seed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, width, generator=generator, dtype=dtype)
    bias = torch.randn(classes, generator=generator, dtype=dtype)
    activations = torch.randn(images, width, generator=generator, dtype=dtype) + 1
    return weight, bias, activations, torch.arange(images) % classes


def target(label: int, sign: int = 1) -> Target:
    return Target("own", (label,), (0,), (sign,), ("class-defining",))


def weights_of(change: Change) -> dict[str, Tensor]:
    assert change.weights is not None
    return change.weights()


def lead_of(logits: Tensor, labels: Tensor, label: int) -> float:
    """By how much a class leads the strongest other on its own images, in the mean; at least a tenth of the spread."""
    mine = logits[labels == label]
    leads = [float(row[label] - max(y for k, y in enumerate(row) if k != label)) for row in mine]
    return max(sum(leads) / len(leads), 0.1 * float(mine.std()))


@pytest.mark.parametrize("name", ["steering", "ablation"])
@torch.no_grad()
def test_steering_and_ablation_equal_a_hook_in_the_network(name: str) -> None:
    model = network()
    fitting, images = fitting_at(model, "last"), Drawn(model).all[:5]
    assert fitting.sae is not None
    column = fitting.sae.decoder[:, TARGET.latents[0]]
    unit = column / math.sqrt(sum(x * x for x in column.tolist()))
    mean = sum(row for row, label in zip(fitting.rows, fitting.labels, strict=True) if label == 1)
    mean = mean / int((fitting.labels == 1).sum())
    edit, found = make_method(name).fit(fitting, TARGET), []
    for strength in STRENGTHS:

        def change(_: nn.Module, inputs: tuple[Tensor], strength: float = strength) -> tuple[Tensor]:
            a = inputs[0]
            if name == "steering":
                return (a - strength * float(column @ mean) * column,)
            return (torch.stack([row - strength * torch.outer(unit, unit) @ row for row in a]),)

        hook = model.get_submodule("head").register_forward_pre_hook(change)
        expected = model(images)
        hook.remove()
        at = edit.at(strength)
        permanent = functional_call(model, changed_state(model, weights_of(at)), (images,))
        torch.testing.assert_close(permanent, expected, rtol=1e-12, atol=1e-12)
        found.append(logits_at_head(fitting.cut, fitting.cut.read(images)[:, 0], at))
        torch.testing.assert_close(found[-1], expected[:, ORDER], rtol=1e-12, atol=1e-12)
    assert (found[1] - found[0]).abs().max() > 1e-3


def test_steering_is_a_change_of_the_bias_alone() -> None:
    weight, bias, activations, labels = case()
    direction = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    for sign in (1, -1):  # of the latent: its class's mean says which way the direction goes
        edit = make_method("steering").fit(
            fitting_of_head(weight, bias, activations, labels, direction), target(1, sign)
        )
        (found,) = weights_of(edit.at(1.5)).items()
        size = activations[labels == 1].mean(dim=0) @ direction
        assert found[0] == "head.bias"
        torch.testing.assert_close(found[1], bias - 1.5 * size * weight @ direction, rtol=1e-12, atol=1e-12)


def test_at_full_size_steering_leaves_nothing_of_the_direction_in_the_class_mean() -> None:
    weight, bias, activations, labels = case()
    direction = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    fitting = fitting_of_head(weight, bias, activations, labels, direction)
    steered = make_method("steering").fit(fitting, target(1)).at(1.0).activations
    assert steered is not None
    moved = steered(activations) - activations
    torch.testing.assert_close(moved, moved[:1].expand(30, 6), rtol=1e-12, atol=1e-12)
    assert abs(float(steered(activations)[labels == 1].mean(dim=0) @ direction)) < 1e-12


def test_ablation_at_one_leaves_nothing_of_the_direction_and_is_a_permanent_edit() -> None:
    weight, bias, activations, labels = case()
    direction = 3 * torch.randn(6, dtype=torch.float64)

    def ablated(weight: Tensor, along: Tensor, alpha: float, sign: int = 1) -> tuple[Tensor, Tensor]:
        """The logits by either form of the edit."""
        fitting = fitting_of_head(weight, bias, activations, labels, along)
        change = make_method("ablation").fit(fitting, target(1, sign)).at(alpha)
        changed = weights_of(change)
        assert changed.keys() == {"head.weight"}
        return logits_at_head(fitting.cut, activations, change), F.linear(activations, changed["head.weight"], bias)

    # A reader along the direction reads nothing any more, whatever the length and sign of the direction.
    for sign in (1, -1):
        for found in ablated(torch.stack([direction] * 4), -2 * direction, 1.0, sign):
            torch.testing.assert_close(found, bias.expand(30, 4), rtol=1e-12, atol=1e-12)
    projector = torch.eye(6).double() - 0.4 * torch.outer(direction, direction) / (direction @ direction)
    for found in ablated(weight, direction, 0.4):
        torch.testing.assert_close(found, F.linear(activations, weight @ projector, bias), rtol=1e-12, atol=1e-12)
    for found in ablated(weight, torch.zeros(6, dtype=torch.float64), 5.0):
        torch.testing.assert_close(found, activations @ weight.T + bias, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gate", *LINEAR])
def test_strength_zero_is_the_original_to_the_bit(name: str, dtype: torch.dtype) -> None:
    weight, bias, activations, labels = case(dtype=dtype)
    fitting = fitting_of_head(weight, bias, activations, labels, F.normalize(torch.randn(6, dtype=dtype), dim=0))
    edit, original = make_method(name).fit(fitting, target(1)), activations @ weight.T + bias
    for alpha in (0.0, 2.0):
        change = edit.at(alpha)
        found, changed = logits_at_head(fitting.cut, activations, change), weights_of(change)
        assert found.dtype == dtype
        assert torch.equal(found, original) == (alpha == 0)
        before = fitting.cut.model.state_dict()
        for key, tensor in changed.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, before[key]) == (alpha == 0)
            assert tensor.data_ptr() != before[key].data_ptr()


@pytest.mark.parametrize("name", LINEAR)
def test_every_logit_moves_along_a_straight_line(name: str) -> None:
    weight, bias, activations, labels = case()
    fitting = fitting_of_head(weight, bias, activations, labels, F.normalize(weight[2], dim=0))
    edit = make_method(name).fit(fitting, target(1))
    level, one, three = (logits_at_head(fitting.cut, activations, edit.at(alpha)) for alpha in (0.0, 1.0, 3.0))
    torch.testing.assert_close(three - level, 3 * (one - level), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LINEAR)
def test_an_images_logits_do_not_depend_on_the_others(name: str) -> None:
    weight, bias, activations, labels = case()
    fitting = fitting_of_head(weight, bias, activations, labels, F.normalize(weight[2], dim=0))
    change = make_method(name).fit(fitting, target(1)).at(0.7)
    together = logits_at_head(fitting.cut, activations, change)
    alone = torch.cat([logits_at_head(fitting.cut, row[None], change) for row in activations])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


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
    fitting = fitting_of_head(weight, bias, activations, labels)
    moment = np.zeros((6, 6))
    for a in activations.numpy():
        for i in range(6):
            for j in range(6):
                moment[i, j] += a[i] * a[j] / images
    moment += ridge * np.mean([moment[i, i] for i in range(6)]) * np.eye(6)
    for k in range(4):
        key = activations[labels == k].mean(dim=0)
        wanted = weight @ key
        wanted[k] -= 2.5 * lead_of(activations @ weight.T + bias, labels, k)
        change = make_method("rank_one", {"ridge": ridge}).fit(fitting, target(k)).at(2.5)
        changed = weights_of(change)
        assert changed.keys() == {"head.weight"}
        edited = changed["head.weight"]
        expected = kkt(weight.numpy(), key.numpy(), wanted.numpy(), moment)
        np.testing.assert_allclose(edited.numpy(), expected, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(edited @ key, wanted, rtol=1e-10, atol=1e-10)  # W' k* = v*
        others = [label for label in range(4) if label != k]
        assert torch.equal(edited[others], weight[others])
        logits = logits_at_head(fitting.cut, activations, change)
        torch.testing.assert_close(logits, F.linear(activations, edited, bias), rtol=1e-10, atol=1e-10)


def test_no_other_edit_that_stores_the_pair_changes_the_outputs_less() -> None:
    weight, bias, activations, labels = case()
    row = RankOne(ridge=1e-9).row(fitting_of_head(weight, bias, activations, labels), target(2))
    key = activations[labels == 2].mean(dim=0)
    assert float(row @ key) == pytest.approx(1)
    least = (activations @ row).square().mean()
    for _ in range(20):
        aside = torch.randn(6, dtype=torch.float64)
        other = row + 0.1 * (aside - (aside @ key) / (key @ key) * key)  # it, too, maps the key to 1
        assert float(other @ key) == pytest.approx(1)
        assert (activations @ other).square().mean() > least


def test_a_class_without_images_or_with_a_zero_key_has_no_rank_one_edit() -> None:
    weight, bias, activations, labels = case()
    labels = torch.where(labels == 3, 0, labels)
    activations[labels == 1] = 0
    nothing = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    some, none = fitting_of_head(weight, bias, activations, labels), fitting_of_head(weight, bias, *nothing)
    for label in (0, 2):
        changed = weights_of(make_method("rank_one").fit(some, target(label)).at(1.0))
        assert changed["head.weight"].isfinite().all()
    refused: list[tuple[Fitting, int, str]] = [
        (some, 1, "the class's mean activation is zero"),
        (some, 3, "own has no train images"),
        (none, 0, "the class's mean activation is zero"),
        (none, 1, "own has no train images"),
    ]
    for fitting, label, says in refused:
        with pytest.raises(UserError, match=says):
            make_method("rank_one").fit(fitting, target(label))


def test_float32_activations_give_the_row_of_float64() -> None:
    weight, bias, activations, labels = case(images=4)  # singular: what single precision would lose
    single = fitting_of_head(weight.float(), bias.float(), activations.float(), labels)
    double = fitting_of_head(weight, bias, activations.float().double(), labels)
    for label in range(4):
        exact, found = (RankOne().row(one, target(label)) for one in (double, single))
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_strengths_that_are_not_finite_are_refused() -> None:
    def at(alpha: float) -> Change:
        return Change(weights=dict)

    weight, bias, activations, labels = case()
    fitting = fitting_of_head(weight, bias, activations, labels, F.normalize(weight[2], dim=0))
    fitted = {name: make_method(name).fit(fitting, target(1)) for name in ("gate", *LINEAR)}
    for edit in (FittedEdit(at), *fitted.values()):
        for strength in (math.inf, -math.inf, math.nan):
            with pytest.raises(UserError, match="The strength of an edit must be a finite number, but is"):
                edit.at(strength)
        assert edit.at(1.0).weights is not None


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan])
def test_impossible_ridges_are_refused(ridge: float) -> None:
    settings: dict[str, Any] = {"ridge": ridge}
    for name in ("rank_one", "memit"):
        with pytest.raises(UserError, match="of a rank-one edit must be above 0"):
            make_method(name, settings)
