"""Edits as values: exact apply, bit-exact undo in every dtype, stacking in any order, and refusals."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from salve.backbones import Site, find_site
from salve.backbones.site import Reader
from salve.editing import (
    Edit,
    EditFile,
    GateFile,
    apply_edit_file,
    apply_edit_files,
    gate,
    load_edit_file,
    make_edit_file,
    make_edit_files,
    save_edit_file,
    undo_edit_file,
    undo_edit_files,
)
from salve.sae import SAE, make_sae
from salve.types import UserError

State = dict[str, torch.Tensor]
HALF = (torch.float16, torch.bfloat16)


def network() -> ResNet:
    """A ResNet with few weights, whose states are compared soon: one block, and a convolution that widens."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    model.layer2, model.layer3 = nn.Sequential(), nn.Sequential()
    model.layer4 = nn.Sequential(nn.Conv2d(64, 512, 1), nn.ReLU())
    return model.eval()


@pytest.fixture(scope="module")
def parts() -> tuple[ResNet, Site, SAE]:
    torch.manual_seed(0)
    model = network()
    return model, find_site(model, "avgpool"), make_sae("linear_l1", 512, 16, torch.Generator().manual_seed(0))


def bits(state: State) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def cast(state: State, dtype: torch.dtype) -> State:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def studied(parts: tuple[ResNet, Site, SAE], state: State) -> ResNet:
    """The network that salve would study with these weights: their values in float32."""
    model = network()
    model.load_state_dict(cast(state, torch.float32))
    return model


def test_apply_touches_the_reader_alone_and_undo_restores_every_bit(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    state = model.state_dict()
    before = bits(state)
    edit_file = make_edit_file(model, site, sae, [Edit(3, 9.0), Edit(5, math.inf)], "torchvision/resnet18")
    edited = apply_edit_file(edit_file, state)
    changed = [name for name in before if bits(edited)[name] != before[name]]
    assert changed == ["fc.weight"]
    assert (edited["fc.weight"] == 0).any()  # α = ∞ closed channels, which no arithmetic brings back
    assert bits(undo_edit_file(edit_file, edited)) == before
    assert bits(model.state_dict()) == before


def test_the_exported_state_loads_into_a_fresh_model_with_the_edited_logits(
    parts: tuple[ResNet, Site, SAE], tmp_path: Path
) -> None:
    model, site, sae = parts
    edit_file = make_edit_file(model, site, sae, [Edit(3, 4.0)], "torchvision/resnet18")
    save_file(apply_edit_file(edit_file, model.state_dict()), tmp_path / "edited.safetensors")
    fresh = network()
    fresh.load_state_dict(load_file(tmp_path / "edited.safetensors"), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    # The oracle: the untouched model with a gate on the activation.
    closed = (1 - 4.0 * sae.decoder[:, 3].detach().abs()).clamp_min(0)
    hook = model.fc.register_forward_pre_hook(lambda _, inputs: (inputs[0] * closed,))
    with torch.no_grad():
        expected, found = model(images), fresh(images)
    hook.remove()
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert (found - model(images)).abs().max() > 1e-4


def test_alpha_zero_keeps_every_bit(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    edit_file = make_edit_file(model, site, sae, [Edit(3, 0.0)], "r")
    assert edit_file.before == edit_file.after
    assert bits(apply_edit_file(edit_file, model.state_dict())) == bits(model.state_dict())


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_file_is_edited_in_its_own_dtype_and_gets_its_bits_back(
    parts: tuple[ResNet, Site, SAE], dtype: torch.dtype
) -> None:
    own = cast(parts[0].state_dict(), dtype)
    model = studied(parts, own)
    edit_file = make_edit_file(model, *parts[1:], [Edit(3, 4.0), Edit(5, math.inf)], "r")
    edited = apply_edit_file(edit_file, own)
    assert {name: t.dtype for name, t in edited.items()} == {name: t.dtype for name, t in own.items()}
    # The oracle: the edit of the float32 network, rounded once.
    factor = gate(edit_file.contributions[0], 4.0) * gate(edit_file.contributions[1], math.inf)
    expected = (model.fc.weight.detach() * factor).to(dtype)
    torch.testing.assert_close(edited["fc.weight"], expected, rtol=0, atol=0)
    assert bits(undo_edit_file(edit_file, edited)) == bits(own)
    # The same edit also fits the float32 network that salve kept.
    state = model.state_dict()
    assert bits(undo_edit_file(edit_file, apply_edit_file(edit_file, state))) == bits(state)


def test_a_float64_file_of_float32_values_gets_its_bits_back(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    own = cast(model.state_dict(), torch.float64)
    edit_file = make_edit_file(model, site, sae, [Edit(3, 4.0)], "r")
    edited = apply_edit_file(edit_file, own)
    expected = own["fc.weight"] * gate(edit_file.contributions[0], 4.0).double()
    assert torch.equal(edited["fc.weight"], expected)
    assert bits(undo_edit_file(edit_file, edited)) == bits(own)


def test_digits_that_float32_does_not_hold_are_refused_rather_than_lost(parts: tuple[ResNet, Site, SAE]) -> None:
    own = cast(parts[0].state_dict(), torch.float64)
    own["conv1.weight"] = own["conv1.weight"] * (1 + 1e-12)  # no edit touches it: it is only passed on
    edit_file = make_edit_file(studied(parts, own), *parts[1:], [Edit(3, 4.0)], "r")
    assert bits(undo_edit_file(edit_file, apply_edit_file(edit_file, own))) == bits(own)
    own["fc.weight"] = own["fc.weight"] * (1 + 1e-12)
    with pytest.raises(UserError, match=r"fc\.weight is float64 with digits that float32 cannot hold"):
        apply_edit_file(edit_file, own)
    model = network().double()
    model.load_state_dict(own)
    with pytest.raises(UserError, match="digits that float32 cannot hold"):
        make_edit_file(model, *parts[1:], [Edit(3, 4.0)], "r")


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_the_studied_network_makes_another_one(parts: tuple[ResNet, Site, SAE], dtype: torch.dtype) -> None:
    model, site, sae = parts
    edit_file = make_edit_file(model, site, sae, [Edit(3, 4.0)], "r")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"fc.weight is rounded to {name}; apply the edit to the float32 weights"):
        apply_edit_file(edit_file, cast(model.state_dict(), dtype))


def test_counters_of_batches_may_be_missing_or_others(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    edit_file = make_edit_file(model, site, sae, [Edit(3, 4.0)], "r")
    state = model.state_dict()
    without = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(without) < len(state)
    assert bits(undo_edit_file(edit_file, apply_edit_file(edit_file, without))) == bits(without)
    other = {**state, "bn1.num_batches_tracked": torch.tensor(7)}
    assert bits(undo_edit_file(edit_file, apply_edit_file(edit_file, other))) == bits(other)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@pytest.mark.slow
def test_edits_stack_and_are_undone_apart_in_any_order_to_the_same_bits(
    parts: tuple[ResNet, Site, SAE], dtype: torch.dtype
) -> None:
    own = cast(_coarse(parts[0].state_dict()), dtype)
    model = studied(parts, own)
    several = [[Edit(3, 2.0)], [Edit(7, 1.5, "enhance"), Edit(8, 2.5)], [Edit(5, 30.0)]]
    edit_files = [make_edit_file(model, *parts[1:], edits, "r") for edits in several]
    left: dict[frozenset[str], dict[str, tuple[torch.dtype, bytes]]] = {}
    for order in itertools.permutations(range(3)):
        state, held = own, list[EditFile]()
        for index in order:
            state = apply_edit_file(edit_files[index], state, held)
            held.append(edit_files[index])
            left.setdefault(frozenset(r.key for r in held), bits(state))
            assert bits(state) == left[frozenset(r.key for r in held)]
    assert bits(apply_edit_files(edit_files, own)) == left[frozenset(r.key for r in edit_files)]
    assert len({value["fc.weight"] for value in left.values()}) == 7  # every set of them is another network
    for order in itertools.permutations(range(3)):
        state, held = apply_edit_files(edit_files, own), list(edit_files)
        for index in order:
            held.remove(edit_files[index])
            state = undo_edit_file(edit_files[index], state, held)
            assert bits(state) == (left[frozenset(r.key for r in held)] if held else bits(own))
    assert bits(undo_edit_files(edit_files, apply_edit_files(edit_files, own))) == bits(own)


def _coarse(state: State) -> State:
    """Values that every dtype holds exactly: first bfloat16's few digits, then float16's short range."""
    return cast(cast(cast(state, torch.bfloat16), torch.float16), torch.float32)


def test_stacked_gates_multiply(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    one, two = (make_edit_file(model, site, sae, [edit], "r") for edit in (Edit(3, 2.0), Edit(7, 1.5, "enhance")))
    together = make_edit_file(model, site, sae, [Edit(7, 1.5, "enhance"), Edit(3, 2.0)], "r")
    stacked = apply_edit_file(two, apply_edit_file(one, model.state_dict()), [one])
    c, d = sae.decoder[:, 3].detach().abs(), sae.decoder[:, 7].detach().abs()
    expected = model.fc.weight.detach() * (1 - 2 * c).clamp_min(0) * (1 + 1.5 * d)
    torch.testing.assert_close(stacked["fc.weight"], expected)
    assert bits(stacked) == bits(apply_edit_file(together, model.state_dict()))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)


def test_edits_at_different_sites_stack_too() -> None:
    model = _Two()
    sites = [Site("in", (Reader("first.weight"),), 6), Site("out", (Reader("second.weight"),), 8)]
    one, two = (
        make_edit_file(model, site, make_sae("linear_l1", site.width, 4), [Edit(1, 2.0)], "two") for site in sites
    )
    state = model.state_dict()
    both = apply_edit_file(two, apply_edit_file(one, state), [one])
    assert bits(both) == bits(apply_edit_files([two, one], state))
    assert bits(undo_edit_file(one, both, [two])) == bits(apply_edit_file(two, state))
    assert bits(undo_edit_file(two, undo_edit_file(one, both, [two]))) == bits(state)


@pytest.mark.parametrize("alpha", [2.5, math.inf])
def test_a_saved_edit_file_comes_back_the_same(parts: tuple[ResNet, Site, SAE], tmp_path: Path, alpha: float) -> None:
    model, site, sae = parts
    edit_file = make_edit_file(model, site, sae, [Edit(3, alpha, sign=-1)], "torchvision/resnet18", "tench")
    save_edit_file(edit_file, tmp_path / "r.json")
    loaded = load_edit_file(tmp_path / "r.json")
    for name in ("name", "backbone", "site", "edits", "before", "after", "sae", "readers", "key", "weights"):
        assert getattr(loaded, name) == getattr(edit_file, name)
    assert isinstance(loaded, GateFile)
    assert torch.equal(loaded.contributions, edit_file.contributions)
    assert bits(apply_edit_file(loaded, model.state_dict())) == bits(apply_edit_file(edit_file, model.state_dict()))
    text = (tmp_path / "r.json").read_text()
    assert '"latent": 3' in text
    assert '"site": "avgpool"' in text


def test_another_strength_is_another_edit(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    edit_file = make_edit_file(model, site, sae, [Edit(3, 4.0)], "r")
    stronger = edit_file.at(math.inf)
    assert bits(apply_edit_file(stronger, model.state_dict())) == bits(
        apply_edit_file(make_edit_file(model, site, sae, [Edit(3, math.inf)], "r"), model.state_dict())
    )
    assert stronger.key != edit_file.key
    assert stronger.is_same_but_for_strength(edit_file)
    assert not make_edit_file(model, site, sae, [Edit(4, 4.0)], "r").is_same_but_for_strength(edit_file)
    enhancing = make_edit_file(model, site, sae, [Edit(3, 4.0, "enhance")], "r")
    for bad, alpha, words in (
        (enhancing, math.inf, "infinite only for mode=suppress"),
        (edit_file, -1, "must not be negative"),
    ):
        with pytest.raises(UserError, match=words):
            bad.at(alpha)


def test_many_edit_files_of_one_network_are_those_made_alone_and_share_its_weights(
    parts: tuple[ResNet, Site, SAE],
) -> None:
    model, site, sae = parts
    named = [("tench", [Edit(3, 4.0)]), ("church", [Edit(5, 2.0)])]
    many = make_edit_files(model, site, sae, named, "r")
    assert [r.name for r in many] == ["tench", "church"]
    for edit_file, (name, edits) in zip(many, named, strict=True):
        alone = make_edit_file(model, site, sae, edits, "r", name)
        assert (edit_file.key, edit_file.before, edit_file.after) == (alone.key, alone.before, alone.after)
    assert many[0].originals["fc.weight"] is many[1].originals["fc.weight"]


def test_wrong_weights_twice_applied_and_empty_edits_are_refused(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    state = model.state_dict()
    edit_file, another = (
        make_edit_file(model, site, sae, [Edit(latent, 4.0)], "torchvision/resnet18") for latent in (3, 5)
    )
    trained = {name: t + 1 for name, t in state.items()}
    for other, words in (
        ({**state, "fc.bias": state["fc.bias"] + 1}, "fc.bias differs"),
        ({**state, "fc.weight": state["fc.weight"] + 1}, "only fc.weight differs"),
        ({**state, "fc.weight": state["fc.weight"][:2]}, "only fc.weight differs"),
        ({**state, "extra": state["fc.bias"]}, "they have unknown tensors, extra"),
        ({name: t for name, t in state.items() if name != "fc.bias"}, "they lack fc.bias"),
        (trained, "and 16 more differ"),
    ):
        with pytest.raises(
            UserError, match=rf"not the ones that the edit was made for \(torchvision/resnet18\).*{words}"
        ):
            apply_edit_file(edit_file, other)
    edited = apply_edit_file(edit_file, state)
    for held in ([], [edit_file]):
        with pytest.raises(UserError, match="hold this edit already"):
            apply_edit_file(edit_file, edited, held)
    with pytest.raises(UserError, match="nothing to undo"):
        undo_edit_file(edit_file, state)
    with pytest.raises(UserError, match="cannot be undone"):
        undo_edit_file(another, edited)
    with pytest.raises(UserError, match=r"with the edits that the file lists\): only fc.weight differs"):
        apply_edit_file(another, state, [edit_file])
    other_model = network()
    other_model.load_state_dict(trained)
    elsewhere = make_edit_file(other_model, site, sae, [Edit(3, 4.0)], "r")
    with pytest.raises(UserError, match="made for different networks"):
        apply_edit_file(edit_file, state, [elsewhere])
    empty = make_sae("linear_l1", 512, 2)
    with torch.no_grad():
        empty.decoder[:, 0] = 0
    with pytest.raises(UserError, match="not change the model"):
        make_edit_file(model, site, empty, [Edit(0, 4.0)], "r")
    with pytest.raises(UserError, match="latents 0 to 15"):
        make_edit_file(model, site, sae, [Edit(16, 4.0)], "r")
    with pytest.raises(UserError, match="reads 8 channels"):
        make_edit_file(model, site, make_sae("linear_l1", 8, 2), [Edit(0, 4.0)], "r")


def test_an_edit_file_that_does_not_fit_itself_is_not_made(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    good = make_edit_file(model, site, sae, [Edit(3, 4.0)], "r")
    with pytest.raises(ValueError, match="1 edits, but 2"):
        replace(good, contributions=good.contributions.repeat(2, 1))
    with pytest.raises(ValueError, match="are not "):
        replace(good, readers=(Reader("other.weight"),))
    with pytest.raises(UserError, match=r"8 channels, but fc.weight has the shape \(4, 512\)"):
        replace(good, contributions=good.contributions[:, :8])
    assert isinstance(good, EditFile)
