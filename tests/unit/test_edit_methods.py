"""Edit methods: both forms of a change do the same, and each is what its equation says."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from salve.editing.methods import METHODS, Affine, Change, FittedEdit, Fitting, Method, Target, key_of, make_method
from salve.editing.methods.base import logits_at_head
from salve.editing.methods.change import changed_state
from salve.editing.methods.pruning import Pruning
from salve.types import UserError
from tests.unit.methods import ORDER, TARGET, Drawn, Plain, cut_at, fitting_at, network
from tests.unit.test_graph import SIZE, Net

SITES = ("second", "hidden", "last")
AT_THE_SITE = ("gate", "steering", "ablation", "inlp", "leace", "latent_eraser", "pruning")
ALONG_A_DIRECTION = ("gate", "steering", "ablation")
ALPHAS = (0.0, 0.4, 1.0, 2.5)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module", params=SITES)
def fitting(request: pytest.FixtureRequest, model: nn.Module) -> Fitting:
    return fitting_at(model, request.param)


def by_activations(fitting: Fitting, change: Change, images: Tensor) -> Tensor:
    """The logits with the site's activations changed, by the tail."""
    assert change.activations is not None
    if fitting.cut.linear is not None:
        return fitting.cut.linear(change.activations(fitting.cut.read(images)))
    tail = fitting.cut.tail(images)
    return tail(change.activations(tail.activations))


def by_weights(fitting: Fitting, change: Change, images: Tensor) -> Tensor:
    """The logits of the network with the changed weights, by the network itself."""
    assert change.weights is not None
    model = fitting.cut.model
    logits: Tensor = functional_call(model, changed_state(model, change.weights()), (images,))
    return logits[:, ORDER]


@pytest.mark.parametrize("name", AT_THE_SITE)
@torch.no_grad()
def test_both_forms_of_a_change_give_the_same_logits(fitting: Fitting, name: str) -> None:
    edit = make_method(name).fit(fitting, TARGET)
    images = Drawn(fitting.cut.model).all[:12]
    original = fitting.cut.model(images)[:, ORDER]
    for alpha in ALPHAS:
        change = edit.at(alpha)
        assert change.permanent
        changed = by_weights(fitting, change, images)
        torch.testing.assert_close(by_activations(fitting, change, images), changed, rtol=1e-12, atol=1e-12)
        assert ((changed - original).abs().max() > 1e-6) == (alpha > 0)


def short(name: str, fitting: Fitting, folder: Path) -> Method:
    """A method that trains for a few steps at most, with the file that it needs."""
    before = folder / "before.safetensors"
    save_file({key: tensor + 1 for key, tensor in fitting.cut.model.state_dict().items()}, before)
    settings: dict[str, dict[str, Any]] = {
        "class_vector": {"before": str(before)},
        "mapped_class_vector": {"before": str(before), "steps": 2},
        "forget": {"steps": 2},
        "task_arithmetic": {"steps": 2},
    }
    return make_method(name, settings.get(name))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("reconstruction",)])
@torch.no_grad()
def test_at_strength_0_nothing_changes(fitting: Fitting, name: str, tmp_path: Path) -> None:
    change = short(name, fitting, tmp_path).fit(fitting, TARGET).at(0.0)
    if change.activations is not None:
        rows = fitting.cut.read(torch.randn(2, 3, SIZE, SIZE).double())
        assert torch.equal(change.activations(rows), rows)
    if change.weights is not None:
        state = fitting.cut.model.state_dict()
        assert all(torch.equal(tensor, state[tensor_name]) for tensor_name, tensor in change.weights().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_given_network_is_never_changed(fitting: Fitting, name: str, tmp_path: Path) -> None:
    model = fitting.cut.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    change = short(name, fitting, tmp_path).fit(fitting, TARGET).at(1.0)
    if change.weights is not None:
        changed = change.weights()
        assert all(not torch.equal(tensor, before[key]) for key, tensor in changed.items())
        assert not any(tensor.data_ptr() == model.state_dict()[key].data_ptr() for key, tensor in changed.items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


class Spied(Drawn):
    """Train images of which some are NaN."""

    def __init__(self, images: Drawn, spoilt: list[int]) -> None:
        self.all, self.labels = images.all.clone(), images.labels
        self.all[spoilt] = torch.nan


def with_others(fitting: Fitting, spoilt: list[int], unknown: list[int]) -> Fitting:
    """What a fit is given, with some images spoilt, and labels of others unknown."""
    images, labels = fitting.images, fitting.per_image.clone()
    assert isinstance(images, Drawn)
    labels[unknown] = -1
    positions = len(fitting.rows) // len(labels)
    rows = fitting.rows.clone().unflatten(0, (len(labels), positions))
    rows[spoilt] = torch.nan
    spied = Spied(images, spoilt)
    spied.labels = labels
    every = labels.repeat_interleave(positions)
    return Fitting(fitting.cut, rows.flatten(0, 1), every, fitting.classes, fitting.sae, labels, spied)


def found_with(method: Method, fitting: Fitting) -> Tensor | None:
    """All numbers of an edit at full size; None where there is no such edit."""
    try:
        if isinstance(method, Pruning):  # of which the edit shows only the order
            return None if bool((scores := method.scores(fitting, TARGET)).isnan().any()) else scores
        change = method.fit(fitting, TARGET).at(1.0)
    except (UserError, RuntimeError, IndexError):
        return None
    if change.weights is not None:
        numbers = torch.cat([tensor.flatten().double() for _, tensor in sorted(change.weights().items())])
    else:
        assert change.activations is not None
        numbers = change.activations(torch.linspace(-1, 3, 40 * fitting.cut.site.width).double().view(40, 1, -1))
    return None if bool(numbers.isnan().any()) else numbers


def means_of_known(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    return torch.stack([rows[labels == label].mean(dim=0) for label in range(classes)])


USES: dict[str, dict[str, Any]] = {
    "rank_one": {"images": 4},
    "null_space": {"images": 4, "threshold": 1.0},
    "memit": {"images": 4},
}


@pytest.fixture(scope="module")
def fittings(model: nn.Module) -> dict[str, Fitting]:
    return {layer: fitting_at(model, layer) for layer in ("hidden", "last")}


@pytest.mark.parametrize(
    ("name", "layer"),
    [*((name, "last") for name in METHODS), *((name, "hidden") for name in ("pruning", "head_bias", *USES))],
)
def test_images_and_labels_that_a_fit_does_not_count_cannot_change_the_edit_and_the_others_do(
    fittings: dict[str, Fitting], name: str, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salve.editing.methods.fitting.SAMPLED", 4)
    monkeypatch.setattr("salve.editing.methods.fitting.ATTRIBUTED", 4)
    monkeypatch.setattr("salve.editing.methods.fitting.means_by_class", means_of_known)
    fitting = fittings[layer]
    method = make_method(name, USES[name]) if name in USES else short(name, fitting, tmp_path)
    spied = with_others(fitting, [], [])
    count, usual = len(fitting.per_image), found_with(method, spied)
    assert usual is not None
    images, labels = sorted(spied.used.images), sorted(spied.used.labels)
    assert set(labels) <= set(images)
    if method.needs_sae:  # what the SAE was trained on, and what its latent was chosen by
        assert (len(images), len(labels)) == (count, 0 if name == "reconstruction" else count)
        return
    idle = ([n for n in range(count) if n not in used] for used in (images, labels))
    same = found_with(method, with_others(fitting, *idle))
    assert same is not None
    torch.testing.assert_close(same, usual, rtol=1e-9, atol=1e-11)
    for numbers, spoil in ((images, True), (labels, False)):
        for number in numbers[-1:]:
            one = found_with(method, with_others(fitting, *(([number], []) if spoil else ([], [number]))))
            assert one is None or one.shape != usual.shape or (one - usual).abs().max() > 1e-9, (number, spoil)
    if name == "head_row":
        assert not images


@torch.no_grad()
def test_at_the_last_site_methods_are_what_their_closed_forms_say(model: nn.Module) -> None:
    fitting = fitting_at(model, "last")
    tail, rows = fitting.cut.linear, fitting.rows
    assert tail is not None
    assert fitting.sae is not None
    column = fitting.sae.decoder[:, TARGET.latents[0]]
    unit = F.normalize(column, dim=0)  # to float64; the column has unit norm in float32
    own = rows[fitting.labels == 1].mean(dim=0)
    moment = rows.T @ rows / len(rows)
    moment = moment + 1e-4 * moment.diagonal().mean() * torch.eye(7).double()
    solved = torch.linalg.solve(moment, own)
    lead = fitting.lead(TARGET)
    for alpha in ALPHAS:
        found = {name: logits_at_head(fitting.cut, rows, make_method(name).fit(fitting, TARGET).at(alpha))
                 for name in ("gate", "steering", "ablation", "rank_one", "head_bias", "head_row")}  # fmt: skip
        stored, bias, row = tail(rows), tail(rows), tail(rows)
        stored[:, 1] -= alpha * lead * (rows @ solved) / (own @ solved)
        bias[:, 1] -= alpha * lead
        row[:, 1] = (1 - alpha) * (row[:, 1] - tail.bias[1]) + tail.bias[1]
        expected = {
            "gate": F.linear(rows * (1 - alpha * column.abs()).clamp_min(0), tail.weight, tail.bias),
            "steering": F.linear(rows - alpha * (own @ column) * column, tail.weight, tail.bias),
            "ablation": F.linear(rows - alpha * torch.outer(rows @ unit, unit), tail.weight, tail.bias),
            "rank_one": stored,
            "head_bias": bias,
            "head_row": row,
        }
        for name, logits in expected.items():
            assert (found[name] - logits).abs().max() < 1e-9, name


@torch.no_grad()
def test_the_gates_fast_path_gives_the_logits_of_its_changes(model: nn.Module) -> None:
    fitting = fitting_at(model, "last")
    edit = make_method("gate").fit(fitting, TARGET)
    fast = dict(edit.logits_by_strength(fitting.cut, fitting.rows, ALPHAS))
    slow = dict(FittedEdit.logits_by_strength(edit, fitting.cut, fitting.rows, ALPHAS))
    assert fast.keys() == slow.keys() == set(range(len(ALPHAS)))
    for at in fast:
        torch.testing.assert_close(fast[at], slow[at], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_lowering_the_bias_by_the_lead_ends_the_lead(model: nn.Module) -> None:
    fitting = fitting_at(model, "hidden")
    weights = make_method("head_bias").fit(fitting, TARGET).at(1.0).weights
    assert weights is not None
    images = Drawn(model)
    own = images.all[images.labels == 1][:32]  # as many as the lead is measured on
    logits = functional_call(model, changed_state(model, weights()), (own,))[:, ORDER]
    leads = logits[:, 1] - logits[:, [0, 2, 3, 4]].amax(dim=1)
    torch.testing.assert_close(leads.mean(), torch.tensor(0.0).double(), rtol=0, atol=1e-9)


@torch.no_grad()
def test_at_full_size_latents_are_muted_or_clamped(model: nn.Module) -> None:
    for layer in SITES:
        fitting = fitting_at(model, layer)
        rows, sae = fitting.rows[:, None], fitting.sae
        assert sae is not None
        at, column = TARGET.latents[0], sae.decoder[:, TARGET.latents[0]]
        latents = sae.encode(rows[:, 0])[:, at]
        assert (latents > 0).any()
        muted = make_method("mute").fit(fitting, TARGET).at(1.0).activations
        clamped = make_method("clamp").fit(fitting, TARGET).at(1.0).activations
        assert muted is not None
        assert clamped is not None
        torch.testing.assert_close(rows - muted(rows), (latents[:, None] * column)[:, None])
        own = sae.encode(fitting.rows[fitting.labels == 1])[:, at]
        level = own[own != 0].mean() if (own != 0).any() else torch.tensor(0.0).double()
        moved = torch.where(latents != 0, latents + level, 0)
        torch.testing.assert_close(rows - clamped(rows), (moved[:, None] * column)[:, None])


@torch.no_grad()
def test_reconstruction_is_the_saes(model: nn.Module) -> None:
    fitting = fitting_at(model, "second")
    edit = make_method("reconstruction").fit(fitting, TARGET)
    activations = edit.at(edit.strongest).activations
    assert activations is not None
    assert fitting.sae is not None
    rows = fitting.cut.read(torch.randn(2, 3, SIZE, SIZE).double())
    torch.testing.assert_close(activations(rows), fitting.sae(rows.flatten(0, 1))[0].view_as(rows))
    assert not edit.at(1.0).permanent


@torch.no_grad()
def test_a_shift_cannot_be_held_by_a_convolution_that_pads_or_has_no_bias() -> None:
    model = network(Net)
    shift = torch.ones(6).double()
    for layer, says in (("second", "pads its input with zeros"), ("last", "")):
        cut = cut_at(model, layer)
        affine = Affine(shift=shift[: cut.site.width] if layer != "last" else torch.ones(cut.site.width).double())
        assert says in affine.obstacle(model, cut.site)
        assert affine.change(model, cut.site).permanent == (not says)
        if says:
            with pytest.raises(UserError, match=f"At the site {layer} this edit has no permanent form: {layer} {says}"):
                affine.weights(model, cut.site)

    class Bordered(Plain):
        def __init__(self, padding: int, mode: str = "zeros") -> None:
            super().__init__()
            self.second = nn.Conv2d(6, 8, 1, padding=padding, padding_mode=mode)  # type: ignore[arg-type]

    for padding, mode, held in ((1, "zeros", False), (0, "zeros", True), (1, "circular", True)):
        padded = network(partial(Bordered, padding, mode))  # type: ignore[arg-type]
        assert (not Affine(shift=shift).obstacle(padded, cut_at(padded, "second").site)) == held

    class NoBias(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(6, 8, 3, bias=False)

    bare = network(NoBias)
    assert "second has no bias" in Affine(shift=shift).obstacle(bare, cut_at(bare, "second").site)


@torch.no_grad()
def test_channels_of_a_grouped_convolution_are_gated_but_not_mixed() -> None:
    class Grouped(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(6, 8, 3, groups=2)

    model = network(Grouped)
    fitting = fitting_at(model, "second")
    images = torch.randn(3, 3, SIZE, SIZE).double()
    for name in ("gate", "steering"):
        change = make_method(name).fit(fitting, TARGET).at(0.7)
        both = by_activations(fitting, change, images), by_weights(fitting, change, images)
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    assert "2 groups" in make_method("ablation").fit(fitting, TARGET).at(0.7).why_not_permanent


@pytest.mark.parametrize("name", ALONG_A_DIRECTION)
@torch.no_grad()
def test_random_controls_follow_the_seed_and_neither_latent_nor_class(model: nn.Module, name: str) -> None:
    one, again, other = (fitting_at(model, "hidden") for _ in range(3))
    object.__setattr__(other, "seed", 1)
    rows = one.rows[:5, None]

    def moved(fitting: Fitting, direction: str, target: Target = TARGET) -> Tensor:
        activations = make_method(name, {"direction": direction}).fit(fitting, target).at(1.0).activations
        assert activations is not None
        return activations(rows)

    for direction in ("random", "random_latent"):
        assert torch.equal(moved(one, direction), moved(again, direction))
        assert not torch.equal(moved(one, direction), moved(one, "latent"))
    assert not torch.equal(moved(one, "random"), moved(other, "random"))
    assert not torch.equal(moved(one, "random"), moved(one, "random", TARGET._replace(classes=(2,))))


@torch.no_grad()
def test_other_weights_are_used_wherever_they_are(model: nn.Module) -> None:
    images = torch.randn(3, 3, SIZE, SIZE).double()
    tail = cut_at(model, "second").tail(images)
    state = model.state_dict()
    for names in (["first.weight"], ["second.weight"], ["head.bias"], ["first.bias", "hidden.weight"], list(state)):
        changed = {name: state[name] + torch.randn_like(state[name]) for name in names}
        expected = functional_call(model, {**state, **changed}, (images,))[:, ORDER]
        torch.testing.assert_close(tail.with_weights(changed), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tail.with_weights({}), model(images)[:, ORDER], rtol=1e-12, atol=1e-12)


class Own(Method):
    """A user's own method."""

    source = full_size = ""

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        raise NotImplementedError


def test_a_method_of_ones_own_is_another_one_when_its_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from dataclasses import dataclass\nfrom tests.unit.test_edit_methods import Own\n\n"
    code += "@dataclass(frozen=True)\nclass Mine(Own):\n    size: float = 1.0\n"
    keys = []
    for more in ("", "# changed\n"):
        (tmp_path / "my_methods.py").write_text(code + more)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_methods", raising=False)
        keys.append(key_of(make_method("my_methods.Mine", {"size": 2.0})))
    assert keys[0] != keys[1]
    assert {**keys[0], "code": ""} == {**keys[1], "code": ""}
    assert "code" not in key_of(make_method("gate"))


def test_methods_are_named_and_their_settings_checked() -> None:
    for name in METHODS:
        assert make_method(name).source
        assert make_method(name).full_size
    with pytest.raises(
        UserError, match=r"edit.method=steerin is no edit method; did you mean steering\? Choose gate, "
    ):
        make_method("steerin")
    with pytest.raises(UserError, match=r"edit.method=gate has no setting alpha; it has direction, scale, channels\."):
        make_method("gate", {"alpha": 1})
    with pytest.raises(UserError, match="direction=up is unknown; choose latent, class_mean, random, random_latent"):
        make_method("steering", {"direction": "up"})
    with pytest.raises(UserError, match=r"is no subclass of salve\.editing\.methods\.Method"):
        make_method("torch.nn.Linear")


def test_a_class_without_images_and_a_missing_sae_are_refused(model: nn.Module) -> None:
    fitting = fitting_at(model, "hidden")
    absent = TARGET._replace(name="none", classes=(4,))
    there, images = fitting.labels != 4, fitting.image_labels
    assert images is not None
    without = Fitting(
        fitting.cut, fitting.rows[there], fitting.labels[there], 5, None, images.where(images != 4, -1), fitting.images
    )
    with pytest.raises(UserError, match="none has no train images"):
        make_method("steering", {"direction": "class_mean"}).fit(without, absent)
    for name in ("inlp", "leace", "rank_one", "null_space", "memit", "pruning", "head_bias"):
        with pytest.raises(UserError, match="none has no train images"):
            make_method(name).fit(without, absent)
    with pytest.raises(UserError, match="The edit method mute needs an SAE of the site hidden"):
        make_method("mute").fit(without, TARGET)
