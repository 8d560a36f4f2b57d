"""Edits by fine-tuning, and relearning, beside plain training loops; class vectors beside their equations."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from salve.editing.fine_tuning import FineTuning, batches_of, drawn
from salve.editing.methods import Fitting, Target, make_method
from salve.editing.methods.change import Weights, changed_state
from salve.editing.methods.class_vector import MappedClassVector
from salve.editing.methods.forget import _other_labels
from salve.editing.relearning import relearned
from salve.types import Diverged, UserError
from tests.unit.methods import CLASSES, ORDER, TARGET, Drawn, Plain, fitting_at, network

TRAINED = ("task_arithmetic", "forget")
SHORT: dict[str, Any] = {"steps": 4, "batch_size": 6, "learning_rate": 0.01}


class Normed(Plain):
    """With BatchNorm, whose statistics must stay, and with a layer that is used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.hidden_2 = nn.BatchNorm2d(8), nn.Linear(7, 7)
        self.again = self.hidden_2

    def forward(self, images: Tensor) -> Tensor:
        map_ = self.norm(self.second(self.first(images).relu())).relu()
        hidden = self.hidden(map_.mean(dim=(2, 3))).relu()
        return self.head(self.again(self.hidden_2(hidden).relu()).relu())


class Recorded:
    """Train images that remember which were asked for."""

    def __init__(self, images: Drawn) -> None:
        self.images, self.numbers = images, list[int]()

    def __call__(self, numbers: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        self.numbers += [] if numbers is None else numbers
        yield from self.images(numbers)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network(Normed)


def fitting_of(model: nn.Module, layer: str) -> tuple[Fitting, Recorded, Drawn]:
    fitting = fitting_at(model, layer)
    assert isinstance(fitting.images, Drawn)
    recorded = Recorded(fitting.images)
    return replace(fitting, images=recorded), recorded, fitting.images


def behind(layer: str) -> tuple[str, ...]:
    """First parts of the names of the parameters that are trained with ``where=behind``."""
    return {"last": ("head",), "hidden": ("hidden", "hidden_2", "again", "head")}[layer]


def trained_by_hand(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    rate: float,
    optimiser: str = "adam",
    parts: tuple[str, ...] = (),
) -> Iterator[nn.Module]:
    """A copy of the network after each step of a plain loop; ``parts``: what is trained, all if empty."""
    net = copy.deepcopy(model).requires_grad_(True).eval()
    chosen = [one for name, one in net.named_parameters() if not parts or name.split(".")[0] in parts]
    kind = torch.optim.Adam if optimiser == "adam" else torch.optim.SGD
    optimizer = kind(chosen, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, step).backward()
        optimizer.step()
        yield net


def weights_of(fitting: Fitting, name: str, alpha: float, target: Target = TARGET, **settings: Any) -> Weights:
    change = make_method(name, SHORT | settings).fit(fitting, target).at(alpha)
    assert change.activations is None
    assert change.weights is not None
    return change.weights()


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize(("layer", "where"), [("hidden", "all"), ("hidden", "behind"), ("last", "behind")])
def test_task_arithmetic_is_a_plain_training_on_the_class_negated(
    model: nn.Module, layer: str, where: str, optimiser: str
) -> None:
    fitting, recorded, images = fitting_of(model, layer)
    before = copy.deepcopy(model.state_dict())
    found = {
        alpha: weights_of(fitting, "task_arithmetic", alpha, where=where, optimiser=optimiser) for alpha in (0.5, 2)
    }
    numbers = torch.tensor(recorded.numbers[:24]).view(4, 6)
    assert bool((images.labels[numbers] == 1).all())

    def loss(net: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(net(images.all[numbers[step]])[:, ORDER], images.labels[numbers[step]])

    *_, net = trained_by_hand(model, loss, 4, 0.01, optimiser, behind(layer) if where == "behind" else ())
    end = net.state_dict()
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, before[name])}
    assert "head.weight" in moved
    for alpha, weights in found.items():
        assert weights.keys() == moved  # no buffer, and nothing that does not move
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, before[name] - alpha * (end[name] - before[name]), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("labels", ["ascent", "random"])
@pytest.mark.parametrize("layer", ["hidden", "last"])
def test_forgetting_is_a_plain_training_away_from_the_class(model: nn.Module, layer: str, labels: str) -> None:
    fitting, recorded, images = fitting_of(model, layer)
    fitting = replace(fitting, classes=2)  # so that 0 is the only other label
    half, whole = (weights_of(fitting, "forget", alpha, labels=labels, weight=0.7) for alpha in (0.5, 1))
    numbers = torch.tensor(recorded.numbers[:24]).view(4, 6)
    assert ((images.labels[numbers] == 1).sum(dim=1) == 3).all()

    def loss(net: nn.Module, step: int) -> Tensor:
        logits, kinds = net(images.all[numbers[step]])[:, ORDER], images.labels[numbers[step]]
        mine = kinds == 1
        kept = F.cross_entropy(logits[~mine], kinds[~mine])
        if labels == "random":
            return kept + 0.7 * F.cross_entropy(logits[mine], torch.zeros(3, dtype=torch.long))
        return kept - 0.7 * F.cross_entropy(logits[mine], kinds[mine])

    *_, net = trained_by_hand(model, loss, 4, 0.01)
    start, end = model.state_dict(), net.state_dict()
    assert whole.keys() == {name for name in end if not torch.equal(end[name], start[name])}
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, end[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(half[name], (start[name] + end[name]) / 2, rtol=1e-9, atol=1e-12)


def test_other_labels_are_drawn_evenly_and_never_the_targets() -> None:
    labels = _other_labels(Target("two", (1, 3), (), (), ()), CLASSES, 30_000, torch.Generator().manual_seed(0))
    counts = labels.bincount(minlength=CLASSES)
    assert counts[[1, 3]].sum() == 0
    assert ((counts[[0, 2, 4]] - 10_000).abs() < 400).all()


def test_only_salient_weights_move(model: nn.Module) -> None:
    fitting, _, images = fitting_of(model, "hidden")
    settings: dict[str, Any] = {"saliency": 0.25, "batch_size": 64, "labels": "random"}
    weights = weights_of(fitting, "forget", 1, **settings)
    net = copy.deepcopy(model).requires_grad_(True)
    mine = images.labels == 1
    assert mine.sum() <= 64
    F.cross_entropy(net(images.all[mine])[:, ORDER], images.labels[mine]).backward()
    sizes = {name: one.grad.abs() for name, one in net.named_parameters() if one.grad is not None}
    count = sum(size.numel() for size in sizes.values())
    least = torch.cat([size.flatten() for size in sizes.values()]).sort(descending=True).values[round(0.25 * count) - 1]
    state = model.state_dict()
    moved = {name: weights[name] != state[name] for name in sizes if name in weights}
    assert 0.2 * count < sum(int(one.sum()) for one in moved.values()) <= round(0.25 * count)
    for name, one in moved.items():
        assert (sizes[name][one] >= least).all()
    all_move = weights_of(fitting, "forget", 1, **(settings | {"saliency": None}))
    assert sum(int((all_move[name] != state[name]).sum()) for name in sizes) > 0.5 * count


@pytest.mark.parametrize("name", TRAINED)
def test_a_fine_tuned_edit_follows_the_seed_alone(model: nn.Module, name: str) -> None:
    fitting, _, _ = fitting_of(model, "hidden")
    torch.manual_seed(1)
    one = weights_of(fitting, name, 1)
    torch.manual_seed(2)
    again, other = weights_of(fitting, name, 1), weights_of(replace(fitting, seed=5), name, 1)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert make_method(name).draws


@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_fine_tuned_weights_fit_a_plain_state_dict(model: nn.Module, name: str) -> None:
    """Everything else reads them as well; a layer with two names has the same new values under both."""
    fitting, _, images = fitting_of(model, "hidden")
    weights = weights_of(fitting, name, 1)
    assert torch.equal(weights["hidden_2.weight"], weights["again.weight"])
    edited = copy.deepcopy(model)
    edited.load_state_dict(changed_state(model, weights))
    by_graph = fitting.cut.tail(images.all).with_weights(weights)
    torch.testing.assert_close(by_graph, edited(images.all)[:, ORDER], rtol=1e-12, atol=1e-12)
    assert (by_graph - model(images.all)[:, ORDER]).abs().max() > 0.01


def accuracies(model: nn.Module, images: Drawn, weights: Weights) -> tuple[float, float]:
    """Of the target's images, and of all others."""
    right = functional_call(model, weights, (images.all,))[:, ORDER].argmax(dim=1) == images.labels
    mine = images.labels == 1
    return float(right[mine].double().mean()), float(right[~mine].double().mean())


@torch.no_grad()
@pytest.mark.parametrize("labels", ["ascent", "random"])
def test_forgetting_takes_the_class_away_and_keeps_the_others(labels: str) -> None:
    model = network()
    fitting, _, images = fitting_of(model, "hidden")
    settings: dict[str, Any] = {"steps": 30, "batch_size": 32, "learning_rate": 0.003, "labels": labels}
    own, kept = accuracies(model, images, weights_of(fitting, "forget", 1, **settings))
    assert own < 0.1
    assert kept > 0.6
    settings.pop("labels")
    alone = weights_of(fitting, "task_arithmetic", 4, **settings)  # which knows nothing of the others
    assert accuracies(model, images, alone)[0] < 0.1
    assert accuracies(model, images, alone)[1] < kept


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps=0 must be a whole number, at least 1"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate=0 must be above 0"),
        ({"optimiser": "lion"}, "optimiser=lion is unknown; choose adam or sgd"),
        ({"where": "front"}, "where=front is unknown; choose all or behind"),
    ],
)
@pytest.mark.parametrize("name", TRAINED)
def test_wrong_settings_are_refused(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_method(name, settings)


def test_wrong_settings_of_forget_are_refused() -> None:
    for settings, says in (
        ({"batch_size": 1}, "batch_size=1 must be a whole number, at least 2"),
        ({"labels": "none"}, "labels=none is unknown; choose ascent or random"),
        ({"weight": 0.0}, "weight=0 must be above 0"),
        ({"saliency": 0.0}, "saliency=0 must be above 0 and at most 1"),
    ):
        with pytest.raises(UserError, match=says):
            make_method("forget", settings)


def test_what_cannot_be_trained_is_refused(model: nn.Module) -> None:
    fitting, _, images = fitting_of(model, "hidden")
    for name in TRAINED:
        with pytest.raises(UserError, match="none has no train images"):
            make_method(name).fit(fitting, Target("none", (CLASSES,), (), (), ()))
        with pytest.raises(UserError, match=f"The edit method {name} needs the train images"):
            make_method(name).fit(replace(fitting, images=None), TARGET)
        with pytest.raises(Diverged, match="lower its learning_rate=1e\\+200"):
            make_method(name, SHORT | {"learning_rate": 1e200, "optimiser": "sgd"}).fit(fitting, TARGET)
    whole = Target("all", tuple(images.labels.unique().tolist()), (), (), ())
    with pytest.raises(UserError, match="All train images are of all"):
        make_method("forget").fit(fitting, whole)


def test_numbers_are_drawn_in_turn_and_each_once_in_a_pass() -> None:
    pools = [torch.arange(5), torch.arange(100, 103)]
    found = drawn(pools, 30, torch.Generator().manual_seed(0))
    for pool, own in zip(pools, (found[::2], found[1::2]), strict=True):
        for one in own.split(len(pool)):
            assert set(one.tolist()) == set(pool.tolist())
    assert not torch.equal(found[:10:2], found[10:20:2])
    assert torch.equal(drawn(pools, 7, torch.Generator().manual_seed(0)), found[:7])
    assert not torch.equal(drawn(pools, 30, torch.Generator().manual_seed(1)), found)


@pytest.mark.parametrize("size", [3, 16, 40, 100])
def test_batches_have_the_size_asked_for(size: int) -> None:
    images, numbers = Drawn(network()), torch.randint(60, (50,), generator=torch.Generator().manual_seed(0))
    found = list(batches_of(images, numbers, size))
    assert [len(labels) for _, labels in found] == [len(part) for part in numbers.split(size)]
    assert torch.equal(torch.cat([some for some, _ in found]), images.all[numbers])
    assert torch.equal(torch.cat([labels for _, labels in found]), images.labels[numbers])


def edited_head(model: nn.Module) -> Weights:
    """The head with the bias of class 1 lowered so far that it is never predicted."""
    bias = dict(model.state_dict())["head.bias"].clone()
    bias[ORDER[1]] -= 0.3
    return {"head.bias": bias}


def edited_twice(model: nn.Module) -> Weights:
    """The same, and a convolution with another bias."""
    return edited_head(model) | {"first.bias": dict(model.state_dict())["first.bias"] + 0.01}


@pytest.mark.parametrize(
    ("layer", "where", "edit"),
    [
        ("last", "behind", edited_head),  # from stored activations
        ("last", "behind", edited_twice),
        ("last", "all", edited_head),
        ("hidden", "behind", edited_twice),
    ],
)
def test_relearning_is_a_plain_training_on_all_classes(
    layer: str, where: str, edit: Callable[[nn.Module], Weights]
) -> None:
    model = network(Normed)
    fitting, recorded, images = fitting_of(model, layer)
    test, weights = Drawn(model), edit(model)
    before = copy.deepcopy(model.state_dict())
    tuning = FineTuning(10, 0.02, where=where)
    found = relearned(fitting, TARGET, weights, lambda: test(None), (3, 12), tuning)
    if edit is edited_head and where == "behind":
        assert not recorded.numbers
        again = replace(fitting, labels=fitting.labels.flip(0))  # as if some activations were missing
        other = relearned(again, TARGET, weights, lambda: test(None), (3, 12), tuning)
        assert other == pytest.approx(found, abs=1e-12)
    numbers = torch.tensor(recorded.numbers).view(12, 10)
    for label in images.labels.unique():
        assert ((images.labels[numbers] == label).sum(dim=1) - 10 / len(images.labels.unique())).abs().max() < 1

    def loss(net: nn.Module, step: int) -> Tensor:
        return F.cross_entropy(net(images.all[numbers[step]])[:, ORDER], images.labels[numbers[step]])

    def right(net: nn.Module) -> float:
        mine = test.labels == 1
        with torch.no_grad():
            return float((net(test.all[mine])[:, ORDER].argmax(dim=1) == 1).double().mean())

    edited = copy.deepcopy(model)
    edited.load_state_dict(changed_state(model, weights))
    expected = {0: right(edited)}
    parts = behind(layer) if where == "behind" else ()
    for step, net in enumerate(trained_by_hand(edited, loss, 12, 0.02, parts=parts), 1):
        if step in (3, 12):
            expected[step] = right(net)
    assert found == pytest.approx(expected, abs=1e-12)
    assert where == "all" or found[12] > found[0] + 0.2  # the class comes back
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_relearning_does_not_depend_on_how_often_it_is_measured(model: nn.Module) -> None:
    fitting, _, images = fitting_of(model, "last")
    few, many = (
        relearned(fitting, TARGET, edited_head(model), lambda: images(None), steps, FineTuning(8, 0.02, where="behind"))
        for steps in ((4,), (2, 4, 30))
    )
    assert few[4] == many[4]
    assert list(few) == [0, 4]


def test_relearning_needs_images_of_the_class(model: nn.Module) -> None:
    fitting, _, images = fitting_of(model, "last")
    others = (images.labels != 1).nonzero()[:, 0].tolist()
    with pytest.raises(UserError, match="one has no test images"):
        relearned(fitting, TARGET, {}, lambda: images(others), (1,))
    with pytest.raises(UserError, match="Relearning needs the train images"):
        relearned(replace(fitting, images=None), TARGET, {}, lambda: images(None), (1,))
    with pytest.raises(UserError, match="steps=-1 must be a whole number, at least 0"):
        relearned(fitting, TARGET, {}, lambda: images(None), (-1,))


@pytest.fixture
def before(model: nn.Module, tmp_path: Path) -> tuple[nn.Module, Path]:
    """The network before fine-tuning, and the file of its weights, with a head of other classes."""
    torch.manual_seed(3)
    former = copy.deepcopy(model)
    former.load_state_dict({name: one + 0.1 * torch.randn_like(one) if one.is_floating_point() else one
                            for name, one in model.state_dict().items()})  # fmt: skip
    state = {name: one for name, one in former.state_dict().items() if not name.startswith("again")}
    state |= {f"again.{part}": state[f"hidden_2.{part}"] * 1 for part in ("weight", "bias")}
    state |= {"head.weight": torch.zeros(9, 7), "head.bias": torch.zeros(9)}
    path = tmp_path / "before.safetensors"
    save_file({f"module.{name}": one.contiguous() for name, one in state.items()}, path)
    return former, path


@pytest.mark.parametrize("layer", ["second", "hidden", "last"])
@torch.no_grad()
def test_a_class_vector_takes_back_what_fine_tuning_added(
    model: nn.Module, before: tuple[nn.Module, Path], layer: str
) -> None:
    fitting, _, images = fitting_of(model, layer)
    former, path = before
    own = images.all[images.labels == 1]
    reader = {"second": "second", "hidden": "hidden", "last": "head"}[layer]

    def read(net: nn.Module) -> Tensor:
        """What the reader is given, channels last, one row per position."""
        seen: list[Tensor] = []
        handle = net.get_submodule(reader).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        net(own)
        handle.remove()
        return seen[0].movedim(1, -1).flatten(0, -2)

    centre = read(model).mean(dim=0)
    vector = centre - read(former).mean(dim=0)
    rows = torch.cat([fitting.rows[:40], torch.zeros(1, fitting.rows.shape[1])])[:, None]
    cosines = torch.cosine_similarity(rows[:, 0], centre[None], dim=1)
    threshold = float(cosines.median())
    edit = make_method("class_vector", {"before": str(path), "threshold": threshold}).fit(fitting, TARGET)
    assert fitting.used.images == fitting.used.labels == set((images.labels == 1).nonzero()[:, 0].tolist())
    for alpha in (0.5, 2.0):
        change = edit.at(alpha)
        assert change.activations is not None
        assert not change.permanent
        expected = torch.stack(
            [
                row - alpha * vector if cosine > threshold else row
                for row, cosine in zip(rows[:, 0], cosines, strict=True)
            ]
        )
        torch.testing.assert_close(change.activations(rows)[:, 0], expected, rtol=1e-9, atol=1e-9)

    everywhere = make_method("class_vector", {"before": str(path), "threshold": None}).fit(fitting, TARGET).at(1.0)
    assert everywhere.activations is not None
    assert everywhere.weights is not None
    torch.testing.assert_close(everywhere.activations(rows), rows - vector, rtol=1e-9, atol=1e-9)
    if layer != "last":
        tail = fitting.cut.tail(images.all[:5])
        moved = tail(tail.activations - vector)
        torch.testing.assert_close(tail.with_weights(everywhere.weights()), moved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "block", "trained"), [("last", "hidden_2", ("hidden_2", "again")), ("second", "first", ("first",))]
)
def test_a_mapped_class_vector_is_a_training_of_one_block_towards_the_centre_from_before(
    model: nn.Module, before: tuple[nn.Module, Path], layer: str, block: str, trained: tuple[str, ...]
) -> None:
    fitting, recorded, images = fitting_of(model, layer)
    former, path = before
    reader = {"second": "second", "last": "head"}[layer]
    settings = {"before": str(path), "block": block, "references": 4, "steps": 3, "batch_size": 4}

    def means(net: nn.Module, batch: Tensor) -> Tensor:
        """What the reader is given, in the mean over positions."""
        seen: list[Tensor] = []
        handle = net.get_submodule(reader).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        net(batch)
        handle.remove()
        return seen[0].flatten(2).mean(dim=2) if seen[0].ndim > 2 else seen[0]

    own = images.all[images.labels == 1]
    with torch.no_grad():
        vector = means(model, own).mean(dim=0) - means(former, own).mean(dim=0)
        wanted = means(model, own[:4]).mean(dim=0) - vector
    edit = make_method("mapped_class_vector", {**settings, "learning_rate": 0.01}).fit(fitting, TARGET)
    numbers = torch.tensor(recorded.numbers[-12:]).view(3, 4)
    assert fitting.used.images == set((images.labels == 1).nonzero()[:, 0].tolist())

    net = copy.deepcopy(model)
    parameters = [one.requires_grad_() for name, one in net.named_parameters() if name.startswith(trained)]
    optimiser = torch.optim.Adam(parameters, lr=0.01)
    for batch in numbers:
        optimiser.zero_grad()
        distance = (means(net, images.all[batch]) - wanted).square().sum(dim=1).mean()
        distance.backward()
        optimiser.step()
    change = edit.at(1.0)
    assert change.weights is not None
    weights = change.weights()
    state, start = net.state_dict(), model.state_dict()
    assert weights.keys() == {name for name in start if name.startswith(trained)}
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-9, atol=1e-12)
        assert not torch.equal(tensor, start[name])
    with torch.no_grad():
        far, near = ((means(one, own) - wanted).square().sum(dim=1).mean() for one in (model, net))
    assert near < far


def test_the_block_of_a_mapped_class_vector_lies_in_front_of_the_site(model: nn.Module) -> None:
    inner, last = (fitting_of(model, layer)[0].cut for layer in ("second", "last"))
    assert MappedClassVector().parameters(last) == ["hidden_2.weight", "hidden_2.bias"]  # which the network holds twice
    assert MappedClassVector(block="first").parameters(inner) == ["first.weight", "first.bias"]
    with pytest.raises(UserError, match="block=head of mapped_class_vector has no parameters in front of the site"):
        MappedClassVector(block="head").parameters(last)


def test_the_settings_of_a_class_vector_name_what_is_in_the_file(
    before: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    former, path = before
    moved, other = tmp_path / "moved.pt", tmp_path / "other.pt"
    torch.save(load_file(path), moved)
    torch.save(former.state_dict(), other)
    mine, same, unlike = (make_method("class_vector", {"before": str(one)}).settings() for one in (path, moved, other))
    assert mine == same
    assert mine["before"] != unlike["before"]
    assert mine["threshold"] == 0.5


def test_class_vectors_need_the_weights_from_before(
    model: nn.Module, before: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    fitting, _, _ = fitting_of(model, "hidden")
    with pytest.raises(UserError, match="class_vector needs before=FILE"):
        make_method("class_vector").fit(fitting, TARGET)
    with pytest.raises(UserError, match="no file of weights"):
        make_method("class_vector", {"before": str(tmp_path / "none.pt")}).fit(fitting, TARGET)
    with pytest.raises(UserError, match=r"threshold=1 must be a cosine from -1 to below 1"):
        make_method("class_vector", {"threshold": 1.0})
    lacking = {name: one for name, one in model.state_dict().items() if not name.startswith(("second", "again"))}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(UserError, match=r"it lacks second\.bias, second\.weight of its shape"):
        make_method("class_vector", {"before": str(tmp_path / "lacking.safetensors")}).fit(fitting, TARGET)
