"""New biases, compared with a search that tries everything; and what suspects are ranked by, with plain loops."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from salve.editing import recalibrate
from salve.editing.recalibrate import (
    fairest_shift,
    group_accuracies,
    group_weights,
    likeliest_shift,
    recalibrated,
    with_shifted_bias,
)
from salve.features.suspects import false_positive_lift, nearest, pulls, separation


def example(seed: int, rounded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and groups, some of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(4, 40, (), generator=generator))
    logits = 2 * torch.randn(count, 4, generator=generator)
    labels = torch.randint(0, 4, (count,), generator=generator)
    groups = torch.randint(-1, 6, (count,), generator=generator).index_fill(0, torch.tensor([0]), 5)
    return logits.round() if rounded else logits, labels, groups


def shifted(logits: Tensor, label: int, shift: float) -> Tensor:
    found = logits.double().clone()
    found[:, label] += shift
    return found


def fairness(logits: Tensor, labels: Tensor, groups: Tensor) -> tuple[float, float]:
    right = logits.argmax(dim=1) == labels
    shares = [float(right[groups == g].double().mean()) for g in range(6) if bool((groups == g).any())]
    return round(min(shares), 9), round(sum(shares) / len(shares), 9)


def likelihood(logits: Tensor, labels: Tensor, groups: Tensor) -> float:
    logs = logits.log_softmax(dim=1)[torch.arange(len(labels)), labels].tolist()
    by_group = {g: [log for log, of in zip(logs, groups.tolist(), strict=True) if of == g] for g in range(6)}
    means = [sum(own) / len(own) for own in by_group.values() if own]
    return sum(means) / len(means)


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_no_shift_is_fairer_than_the_one_found(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibrate, "_AT_ONCE", block)
    for seed in range(4):
        logits, labels, groups = example(seed, rounded=seed % 2 == 0)
        found = fairest_shift(logits, labels, groups, 1)
        tried = [shifted(logits, 1, step / 8 + 0.003) for step in range(-60, 61)]
        best = max(fairness(one, labels, groups) for one in tried)
        assert fairness(shifted(logits, 1, found), labels, groups) >= best


def test_no_shift_is_likelier_than_the_one_found() -> None:
    for seed in range(8):
        logits, labels, groups = example(seed)
        labels[0] = 2
        found = likeliest_shift(logits, labels, groups, 2)
        best = likelihood(shifted(logits, 2, found), labels, groups)
        for step in (-2, -0.1, -0.01, 0.01, 0.1, 2):
            assert best >= likelihood(shifted(logits, 2, found + step), labels, groups) - 1e-9
        assert float(group_weights(groups).sum()) == pytest.approx(1)


@pytest.mark.parametrize("shift", [likeliest_shift, fairest_shift])
def test_several_biases_are_set_until_none_moves(shift: Callable[..., float]) -> None:
    logits, labels, groups = example(3)
    found = recalibrated(logits, labels, groups, [0, 2], shift)
    assert found[[1, 3]].tolist() == [0, 0]
    after = group_accuracies((logits + found).argmax(dim=1) == labels, groups, 6)
    before = group_accuracies(logits.argmax(dim=1) == labels, groups, 6)
    if shift is fairest_shift:
        assert after[~after.isnan()].min() >= before[~before.isnan()].min()
    else:
        assert all(abs(likeliest_shift(logits + found, labels, groups, k)) < 0.01 for k in (0, 2))
    by_hand = float((logits.argmax(dim=1) == labels)[groups == 5].double().mean())
    assert float(before[5]) == pytest.approx(by_hand)


def test_shifts_of_the_logits_are_shifts_of_the_bias() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 5))
    order, shifts = torch.tensor([3, 1, 0, 2, 4]), torch.tensor([0.5, 0.0, -2.0, 0.0, 0.0], dtype=torch.float64)
    images = torch.randn(3, 3, 2, 2)
    changed = with_shifted_bias(model, order, shifts, {})
    assert set(changed) == {"2.bias"}
    new = torch.func.functional_call(model, changed, (images,))[:, order]
    assert torch.allclose(new, model(images)[:, order] + shifts.float(), atol=1e-6)


def test_suspects_are_ranked_by_what_loops_say() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(40, 3, generator=generator)
    labels, present = torch.arange(40) % 4, torch.rand(40, generator=generator) < 0.5
    present[labels == 3] = True  # one class lacks images without the attribute
    found = separation(latents, labels, present)
    for j in range(3):
        values = latents[:, j].double()
        parts = [(values[(labels == k) & present], values[(labels == k) & ~present]) for k in range(3)]
        mean = sum(float(a.mean() - b.mean()) for a, b in parts) / 3
        squares = sum(float(((one - one.mean()) ** 2).sum()) for pair in parts for one in pair)
        count = sum(len(one) - 1 for pair in parts for one in pair)
        assert float(found[j]) == pytest.approx(mean / math.sqrt(squares / count))
    active = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    taken = torch.tensor([True, False, False, False])
    assert false_positive_lift(active, taken, prior=0).tolist()[0] == pytest.approx(2)
    assert false_positive_lift(active, taken, prior=1e9).tolist() == pytest.approx([1, 1])
    logits = torch.tensor([[3.0, 0, 0], [0, 2, 1], [0, 2, 1.5], [0, 0, 9]])
    assert nearest(logits, torch.tensor([0, 1, 1, 2]), 2, 2).tolist() == [2, 1]
    chances, value = torch.rand(8, 2, generator=generator), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    own = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    pull = pulls(chances, own, value, 2)
    by_hand = (chances[[5, 7], 0].mean() - chances[[4, 6], 0].mean()).item()  # of class 1's images towards class 0
    assert pull[0].tolist() == pytest.approx([-by_hand, by_hand], rel=1e-5)
