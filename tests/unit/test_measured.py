"""Edits through a tail, beside the closed form at the last site and a network with scaled weights elsewhere."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from salve.activations import Captured
from salve.backbones import graph_of, head_site
from salve.backbones.cut import Cut
from salve.edit_settings import EditSettings
from salve.editing import gate
from salve.editing.methods.gate import GateEdit
from salve.metrics import downstream
from salve.sae import make_sae
from salve.stages.measured import LinearMeasures, SampledMeasures
from salve.stages.targets import balanced
from salve.stages.through_tail import Tails, measure_through_tail
from tests.unit.test_graph import SIZE, Net

CLASSES, PER_CLASS = 5, 6
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]


def network() -> Net:
    torch.manual_seed(0)
    model = Net().eval().requires_grad_(False)
    model.head.bias.zero_()
    return model


class Drawn:
    """Images of one colour each, with noise; their classes are what the network says."""

    batch_size = 7

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = {}
        for split in ("select", "test"):
            colours = 2 * torch.randn(60, 3, 1, 1, generator=generator)
            self.images[split] = colours + 0.5 * torch.randn(60, 3, SIZE, SIZE, generator=generator)
        self.of = {split: model(images).argmax(dim=1) for split, images in self.images.items()}

    def labels(self, split: str) -> Tensor:
        return self.of[split]

    def loader(self, split: str, indices: Any = None, batch_size: int | None = None) -> Any:
        order = torch.arange(len(self.of[split])) if indices is None else torch.tensor(indices)
        for part in order.split(batch_size or self.batch_size):
            yield self.images[split][part], self.of[split][part]


def context_of(model: nn.Module) -> Any:
    return SimpleNamespace(data=Drawn(model), classes=tuple("abcde"), device=torch.device("cpu"), on_device=lambda x: x)


def settings(images: int = 99, resolution: int = 99) -> EditSettings:
    return EditSettings(ALPHAS, ["suppress"], "unit", "all", images=images, resolution=resolution)


def cut_at(model: nn.Module, name: str) -> Cut:
    graph = graph_of(model, SIZE)
    return Cut(model, graph.sites[name], torch.arange(CLASSES), graph)


@pytest.mark.parametrize("mode", ["suppress", "enhance"])
def test_at_the_last_site_the_tail_measures_what_the_closed_form_does(mode: str) -> None:
    model = network()
    context = context_of(model)
    head = Cut(model, head_site(model), torch.arange(CLASSES))
    assert head.linear is not None
    splits: Any = {
        split: Captured(head.read(images)[:, 0], context.data.of[split])
        for split, images in context.data.images.items()
    }
    exact = LinearMeasures(head, splits, settings(), CLASSES)
    tail = SampledMeasures(context, cut_at(model, "head"), settings(), None)
    contributions = torch.nn.functional.normalize(torch.rand(2, 6), dim=1)
    own = np.array([True, *[False] * 4])
    ours, theirs = (GateEdit.of(cut, contributions, mode) for cut in (head, cut_at(model, "head")))  # type: ignore[arg-type]
    alphas, expected = exact.accuracies(ours, own)
    found_alphas, found = tail.accuracies(theirs, own)
    assert found_alphas == alphas
    for split in ("select", "test"):
        assert torch.equal(tail.labels(split), exact.labels(split).sort().values)
        torch.testing.assert_close(found[split], expected[split], equal_nan=True)
        assert not torch.equal(expected[split][0], expected[split][-1])
    for alpha in (0.0, 2.0):
        for one, other in zip(tail.outcomes(theirs, alpha), exact.outcomes(ours, alpha), strict=True):
            torch.testing.assert_close(one, other[exact.labels("test").argsort(stable=True)], rtol=1e-3, atol=1e-6)


def test_in_the_middle_it_measures_the_network_with_scaled_weights() -> None:
    model = network()
    context, cut = context_of(model), cut_at(model, "second")
    measures = SampledMeasures(context, cut, settings(), None)
    contributions = torch.nn.functional.normalize(torch.rand(1, 4), dim=1)
    alphas, found = measures.accuracies(GateEdit.of(cut, contributions), np.array([True, *[False] * 4]))
    for k, alpha in enumerate(alphas):
        (reader,) = cut.site.readers
        edited = {reader.weight: reader.scaled(model.get_parameter(reader.weight), gate(contributions, alpha))}
        indices = balanced(context.data.of["test"], 99)
        logits = torch.func.functional_call(model, edited, (context.data.images["test"][indices],))
        right = (logits.argmax(dim=1) == context.data.of["test"][indices]).double()
        for c in range(CLASSES):
            mine = context.data.of["test"][indices] == c
            if mine.any():
                torch.testing.assert_close(found["test"][k, c], right[mine].mean())


def test_the_step_in_which_a_class_goes_is_divided_and_no_other() -> None:
    model = network()
    own = np.array([True, *[False] * 4])
    context = context_of(model)
    # The channels that speak for the first class most close first.
    contributions = (model.head.weight[:1] - model.head.weight.mean(dim=0)).clamp_min(0.0) + 0.01
    cut = cut_at(model, "head")
    edit = GateEdit.of(cut, contributions)
    full = SampledMeasures(context, cut_at(model, "head"), settings(), None).accuracies(edit, own)
    first = next(k for k in range(len(ALPHAS)) if full[1]["select"][k, 0] <= 0.05)
    few = SampledMeasures(context, cut_at(model, "head"), settings(resolution=3), None)
    alphas, found = few.accuracies(edit, own)
    assert ALPHAS[first] in alphas
    assert ALPHAS[first - 1] in alphas
    assert len(alphas) <= 3 + 1 + 2  # of twelve steps three, and two more to divide one of four
    for split in ("select", "test"):
        kept = [ALPHAS.index(alpha) for alpha in alphas]
        torch.testing.assert_close(found[split], full[1][split][kept], rtol=0, atol=0, equal_nan=True)
    assert few.accuracies(GateEdit.of(cut, contributions, "enhance"), own)[0] == [ALPHAS[at] for at in (0, 4, 8, 12)]


def test_images_are_drawn_evenly_and_always_the_same() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [3] * 20)
    drawn = balanced(labels, 5)
    assert drawn == sorted(drawn) == balanced(labels, 5)
    assert torch.bincount(labels[drawn]).tolist() == [5, 3, 0, 5]
    assert set(balanced(labels, 4)) < set(drawn)
    assert drawn[:5] != [0, 1, 2, 3, 4]
    assert balanced(torch.empty(0, dtype=torch.long), 5) == []


def test_tails_that_do_not_fit_are_made_again_and_say_the_same() -> None:
    model = network()
    context, cut = context_of(model), cut_at(model, "second")
    closed = torch.rand(4)
    held, none = (
        Tails(context, cut, "test", balanced(context.data.labels("test"), 9), room=room) for room in (1 << 30, 0)
    )
    assert torch.equal(held.logits(closed), none.logits(closed))
    assert [one is other for one, other in zip(held, held, strict=True)] == [True] * len(list(held))
    assert not any(one is other for one, other in zip(none, none, strict=True))


def test_an_sae_is_measured_with_the_site_replaced_by_its_reconstruction() -> None:
    model = network()
    context, cut = context_of(model), cut_at(model, "second")
    sae = make_sae("relu_l1", 4, 8, torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    mean = torch.rand(4)
    found = measure_through_tail(context, cut, sae, mean)

    def logits(change: Any) -> Tensor:
        hook = model.second.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
        answer: Tensor = model(context.data.images["test"])
        hook.remove()
        return answer

    def reconstructed(x: Tensor) -> Tensor:
        return sae(x.movedim(1, -1).reshape(-1, 4))[0].view(*x.shape[:1], *x.shape[2:], 4).movedim(-1, 1)

    fed = [
        logits(change)
        for change in (lambda x: x, reconstructed, torch.zeros_like, lambda x: x * 0 + mean[:, None, None])
    ]
    expected = downstream(context.data.of["test"], *fed)
    assert found["downstream_images"] == 60
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
