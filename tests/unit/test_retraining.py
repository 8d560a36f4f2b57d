"""Rivals that train the network again, against hand-written loops, and where plain training is known to fail."""

import math
from collections import Counter
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salve.backbones.classifier import Classifier
from salve.backbones.robust import RobustClassifier, raised
from salve.data import ConceptsData, Preprocess
from salve.data.marked import MarkedData
from salve.data.scenes import SPURIOUS_BASE_RATE
from salve.data_settings import MarkSettings
from salve.stages.finetune import _Chosen
from salve.stages.retraining import repeated
from salve.stages.weighting import Weighting

AnyClassifier = TypeVar("AnyClassifier", bound=Classifier)


def small(**changes: float) -> ConceptsData:
    data = ConceptsData(10, image_size=32, train_per_class=6, select_per_class=2, test_per_class=2, **changes)  # type: ignore[arg-type]
    data.bind(Preprocess(32, None))
    return data


def silent(module: AnyClassifier) -> AnyClassifier:
    """Without a Trainer there is nothing to log to."""
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def test_group_weights_rise_as_a_loop_says() -> None:
    weights, losses = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 2.0, 7.0])
    present = torch.tensor([True, True, False])
    by_hand = [0.5 * math.exp(0.4 * 0.1), 0.3 * math.exp(0.4 * 2.0), 0.2]
    expected = [one / sum(by_hand) for one in by_hand]
    assert raised(weights, losses, present, 0.4).tolist() == pytest.approx(expected)


def test_group_dro_takes_the_steps_of_a_hand_written_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    step, smoothing = 0.5, 0.1
    module = silent(
        RobustClassifier(nn.Linear(4, 3), torch.tensor([0, 1, 2]), 0.1, 0.0, smoothing, values=2, step=step)
    )
    weight, bias = (one.detach().clone().requires_grad_() for one in module.model.parameters())
    q = [1 / 6] * 6
    for _ in range(4):
        rows, groups = torch.randn(12, 4, generator=generator), torch.randint(0, 5, (12,), generator=generator)
        loss = module.training_step((rows, groups), 0)
        logits = rows @ weight.T + bias
        by_group: dict[int, list[Tensor]] = {}
        for row, group in zip(logits, groups.tolist(), strict=True):
            logs, label = row.log_softmax(dim=0), group // 2
            one = -(1 - smoothing) * logs[label] - smoothing * logs.mean()
            by_group.setdefault(group, []).append(one)
        means = {group: torch.stack(own).mean() for group, own in by_group.items()}
        q = [old * math.exp(step * float(means[g].detach())) if g in means else old for g, old in enumerate(q)]
        q = [one / sum(q) for one in q]
        expected = sum((q[g] * mean for g, mean in means.items()), torch.zeros(()))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        mine = torch.autograd.grad(loss, list(module.model.parameters()))
        for one, other in zip(mine, torch.autograd.grad(expected, [weight, bias]), strict=True):
            torch.testing.assert_close(one, other)
        assert module.group_weights.tolist() == pytest.approx(q, rel=1e-5)


def shortcut() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of which the first number tells the class a little, and the second, in 19 of 20, by far better."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(1000) % 2
    aligned = torch.rand(1000, generator=generator) < 0.95
    value = torch.where(aligned, labels, 1 - labels)
    rows = torch.randn(1000, 2, generator=generator)
    rows[:, 0] = 0.7 * rows[:, 0] + 2.0 * labels - 1
    rows[:, 1] = 0.3 * rows[:, 1] + 2.0 * value - 1
    return rows, labels, 2 * labels + value


def worst(model: nn.Module, rows: Tensor, labels: Tensor, groups: Tensor) -> float:
    right = (model(rows).argmax(dim=1) == labels).double()
    return min(float(right[groups == group].mean()) for group in range(4))


def trained(module: Classifier, rows: Tensor, targets: Tensor) -> nn.Module:
    optimiser = torch.optim.SGD(module.model.parameters(), lr=0.5)
    for _ in range(300):
        optimiser.zero_grad()
        module.training_step((rows, targets), 0).backward()
        optimiser.step()
    return module.model


def test_both_rivals_help_the_worst_group_where_plain_training_fails() -> None:
    rows, labels, groups = shortcut()
    torch.manual_seed(0)

    def plain(numbers: Tensor) -> nn.Module:
        module = silent(Classifier(nn.Linear(2, 2), torch.arange(2), 0.1, 0.0, 0.0))
        return trained(module, rows[numbers], labels[numbers])

    every = torch.arange(len(rows))
    first = plain(every)
    before = worst(first, rows, labels, groups)
    assert before < 0.65
    times = repeated(first(rows).argmax(dim=1), labels, 20)
    assert worst(plain(every.repeat_interleave(times)), rows, labels, groups) > before + 0.15
    robust = silent(RobustClassifier(nn.Linear(2, 2), torch.arange(2), 0.1, 0.0, 0.0, values=2, step=0.1))
    assert worst(trained(robust, rows, groups), rows, labels, groups) > before + 0.15


def test_repeating_the_mistakes_weighs_their_losses() -> None:
    rows, labels, _ = shortcut()
    predictions = torch.where(rows[:, 1] > 0, 1, 0)
    times = repeated(predictions, labels, 7)
    assert set(times[predictions == labels].tolist()) == {1}
    assert set(times[predictions != labels].tolist()) == {7}
    logits = rows @ torch.tensor([[0.3, -1.0], [0.2, 0.5]])
    losses = F.cross_entropy(logits, labels, reduction="none")
    again = torch.arange(len(rows)).repeat_interleave(times)
    mean = F.cross_entropy(logits[again], labels[again])
    assert float(mean) == pytest.approx(float((times * losses).sum() / times.sum()), rel=1e-5)


def test_images_are_drawn_as_often_as_they_count_in_epochs_of_the_same_length() -> None:
    data = small()
    times = torch.tensor([1, 0, 3] * 20)
    torch.manual_seed(0)
    loader = _Chosen(data, [4], Weighting(times)).train_dataloader()
    shown, labels = loader.dataset._items.indices, data.labels("train").tolist()
    assert shown == [i for i in range(60) if times[i] and labels[i] != 4]
    seen, epochs = Counter[int](), 200
    for _ in range(epochs):
        seen.update(int(times[shown[index]]) for batch in loader.batch_sampler for index, _ in batch)
    assert sum(seen.values()) == epochs * (len(shown) // 10 * 10)  # an incomplete last batch is dropped
    ones = sum(int(times[i]) == 1 for i in shown)
    expected = ones / (ones + 3 * (len(shown) - ones))
    assert abs(seen[1] / sum(seen.values()) - expected) < 0.03  # 5 standard errors
    alike = Weighting(torch.ones(60, dtype=torch.long)).drawn_by(torch.arange(60))
    assert alike is None


def test_group_dro_draws_all_groups_alike_and_gives_their_numbers() -> None:
    data = small()
    groups = torch.tensor([0] * 50 + [3] * 5 + [-1] * 5)
    torch.manual_seed(0)
    chosen = _Chosen(data, [], Weighting((groups >= 0).long(), groups, 2, 0.1))
    seen = Counter[int]()
    loader = chosen.train_dataloader()
    for _ in range(20):
        for _, numbers in loader:
            seen.update(numbers.tolist())
    assert set(seen) == {0, 3}
    assert abs(seen[0] / sum(seen.values()) - 0.5) < 0.06  # 5 standard errors of 1,000 draws are 0.08
    assert len(loader.batch_sampler) == 5


def test_data_without_the_shortcut_have_it_as_often_in_all_classes() -> None:
    data = small(spurious_correlation=1.0, defining_rate=0.5, min_crop_scale=1.0)
    other = data.without_shortcut()
    assert other.spurious_correlation == SPURIOUS_BASE_RATE
    alike = ConceptsData(
        *(10, 0, 0, 32, 6, 2, 2),
        spurious_correlation=SPURIOUS_BASE_RATE,
        defining_rate=0.5,
        min_crop_scale=1.0,
    )
    assert other.fingerprint() == alike.fingerprint()
    marked = MarkedData(small(), MarkSettings(kind="logo", rates={"clinic": 1.0}, rate=0.1))
    assert marked.without_shortcut().rates("train").tolist() == [0.1] * 10
    assert marked.without_shortcut().rates("test").tolist() == marked.rates("test").tolist()
