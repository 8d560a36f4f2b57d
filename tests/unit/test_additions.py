"""Additions: new weights given as they are, stacked with gates in any order, and undone to the same bits."""

import itertools
import random
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from salve.editing import (
    AdditionFile,
    EditFile,
    HeldEdit,
    apply_edit_file,
    apply_edit_files,
    make_addition,
    make_additions,
    undo_edit_file,
    undo_edit_files,
)
from salve.editing import make as making
from salve.editing.records import held_from, record_of
from salve.types import UserError
from tests.unit.addition_examples import State, additions, bits, cast, gates, network, new_weights, several

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def record(edit_file: EditFile) -> HeldEdit:
    """The edit as a file of edited weights lists it."""
    return held_from(record_of(edit_file))


def added(model: nn.Module, changed: State, method: str = "steering", alpha: float = 1.0) -> AdditionFile:
    return make_addition(
        model, changed, name="church", method=method, alpha=alpha, site="pool", backbone="torchvision/resnet18"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_addition_gives_the_new_weights_bit_for_bit_and_undo_the_old_ones(dtype: torch.dtype) -> None:
    model = network(dtype)
    own = cast(model.state_dict(), dtype)
    generator = torch.Generator().manual_seed(2)
    new = {name: torch.randn(model.state_dict()[name].shape, generator=generator) for name in ("0.bias", "2.weight")}
    # original + (new − original) would not give these, even in float64.
    new["2.weight"][0, :3] = torch.tensor([1e-30, -0.0, 3e-39])
    edit_file = added(model, new)
    edited = apply_edit_file(edit_file, own)
    expected = {**own, **{name: tensor.to(dtype) for name, tensor in new.items()}}
    assert bits(edited) == bits(expected)
    assert edit_file.tensors == ("0.bias", "2.weight")
    assert bits(undo_edit_file(edit_file, edited)) == bits(own)


def test_values_of_very_different_size_come_out_exactly() -> None:
    """Of 1e30 and 1e-30, adding the difference in float64 would give 0."""
    model = network()
    model.state_dict()["2.bias"][:] = torch.tensor([1e30, -1e30, 1.0, 0.0])
    new = torch.tensor([1e-30, 2e-30, 1 + 2**-23, -0.0])
    edited = apply_edit_file(added(model, {"2.bias": new}), model.state_dict())
    assert bits({"b": edited["2.bias"]}) == bits({"b": new})


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stacked_is_the_sum_that_plain_arithmetic_gives(dtype: torch.dtype) -> None:
    """The oracle: NumPy in float64, with the gates' formula written out; additions in the order of their keys."""
    model = network(dtype)
    own, studied = cast(model.state_dict(), dtype), {n: t.numpy() for n, t in model.state_dict().items()}
    edit_files = several(model)
    one, two = (edit_file.contributions[0].numpy() for edit_file in gates(model))
    factors = [np.maximum(0, 1 - np.float32(0.5) * abs(one)), np.maximum(0, 1 - np.float32(1.5) * abs(two))]
    found = apply_edit_files(edit_files, own)
    in_order = sorted(additions(model), key=lambda edit: edit.key)
    for name in ("0.weight", "1.running_mean", "2.bias", "2.weight"):
        expected = studied[name].astype(np.float64)
        if name == "2.weight":
            expected = expected * (factors[0] * factors[1]).astype(np.float64)
        for edit in in_order:
            if name in edit.edited and not (name.startswith(("0", "1"))):
                expected = expected + (edit.edited[name].numpy().astype(np.float64) - studied[name].astype(np.float64))
            elif name in edit.edited:
                expected = edit.edited[name].numpy().astype(np.float64)  # the only edit of this tensor
        exact = torch.from_numpy(expected)
        assert torch.equal(found[name], exact if dtype == torch.float64 else exact.float().to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_orders_of_applying_and_undoing_change_no_bit(dtype: torch.dtype) -> None:
    """A walk among all sets of edits: each set has one state, however it was reached."""
    model = network(dtype)
    own, edit_files = cast(model.state_dict(), dtype), several(model)
    draw, seen = random.Random(3), dict[frozenset[str], Any]()
    state, held = own, list[EditFile]()
    for _ in range(100):
        few = draw.sample(edit_files, draw.randint(1, 2))
        apply_, undo = [e for e in few if e not in held], [e for e in few if e in held]
        if apply_:
            state = apply_edit_files(apply_, state, draw.sample(held, len(held)))
            held += apply_
        if undo:
            held = [e for e in held if e not in undo]
            state = undo_edit_files(undo, state, draw.sample(held, len(held)))
        known = frozenset(e.key for e in held)
        assert bits(state) == seen.setdefault(known, bits(state)), [e.title for e in held]
        if held:
            assert bits(apply_edit_files(draw.sample(held, len(held)), own)) == seen[known]
    assert len(seen) > 20
    assert len({str(found) for found in seen.values()}) == len(seen)
    assert bits(undo_edit_files(held, state) if held else state) == bits(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_of_very_different_size_are_summed_in_one_order(dtype: torch.dtype) -> None:
    """In float64, 1e25 + 1 − 1e25 is 0 in this order and 1 in another: what counts are the keys."""
    model = network()
    own = cast(model.state_dict(), dtype)
    edit_files = [added(model, {"2.bias": torch.full((4,), new)}) for new in (1e25, 1.0, -1e25)]
    expected, original = own["2.bias"].double(), model.state_dict()["2.bias"].double()
    for edit_file in sorted(edit_files, key=lambda edit: edit.key):
        expected = expected + (edit_file.edited["2.bias"].double() - original)
    for order in itertools.permutations(edit_files):
        state, held = own, list[EditFile]()
        for edit_file in order:
            state = apply_edit_file(edit_file, state, held)
            held.append(edit_file)
        assert torch.equal(state["2.bias"], expected.to(dtype))
        for edit_file in order:
            held.remove(edit_file)
            state = undo_edit_file(edit_file, state, held[::-1])
        assert bits(state) == bits(own)


def test_an_addition_is_needed_where_it_shares_a_tensor_and_only_there() -> None:
    model = network()
    state, (gate, _), (steering, ablation, tuning) = model.state_dict(), gates(model), additions(model)
    sentence = (
        "These weights hold the edit church: directional ablation at α = 0.5, which changes {} too; give its edit file "
        "as well, with --held (in Python in held=[…])."
    )
    held = apply_edit_file(ablation, state)
    for act in (apply_edit_file, undo_edit_file):
        for edit_file, names in ((gate, "2.weight"), (steering, "2.bias"), (tuning, "2.bias, 2.weight")):
            with pytest.raises(UserError) as refusal:
                act(edit_file, held, [record(ablation)])
            assert str(refusal.value) == sentence.format(names)
    assert bits(apply_edit_file(gate, held, [ablation])) == bits(apply_edit_files([gate, ablation], state))
    # Steering changes the bias alone, and the gate the weight: neither is needed for the other.
    steered = apply_edit_file(steering, state)
    both = apply_edit_file(gate, steered, [record(steering)])
    assert bits(both) == bits(apply_edit_files([gate, steering], state))
    assert bits(undo_edit_file(steering, both, [record(gate)])) == bits(apply_edit_file(gate, state))


def test_tensors_that_a_listed_addition_changes_elsewhere_are_compared() -> None:
    model = network()
    (gate, _), state = gates(model), model.state_dict()
    elsewhere = added(model, {"0.bias": state["0.bias"] + 1})
    edited = apply_edit_file(elsewhere, state)
    assert "0.bias" in apply_edit_file(gate, edited, [record(elsewhere)])
    for wrong in (state, {**edited, "0.bias": edited["0.bias"] * 2}):
        with pytest.raises(UserError, match=r"with the edits that the file lists\): 0\.bias differs"):
            apply_edit_file(gate, wrong, [record(elsewhere)])


def test_of_a_whole_state_dict_only_what_differs_is_kept() -> None:
    model, tuned = network(), network().train()
    tuned(torch.randn(8, 3, generator=torch.Generator().manual_seed(4)))  # moves BatchNorm's means and counter
    tuned.state_dict()["2.bias"].add_(1)
    edit_file = added(model, tuned.state_dict(), "fine-tuning")
    assert set(edit_file.tensors) == {"1.running_mean", "1.running_var", "2.bias"} == set(edit_file.originals)
    edited = apply_edit_file(edit_file, model.state_dict())
    fresh = network()
    fresh.load_state_dict(edited)
    images = torch.randn(5, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(fresh(images), tuned.eval()(images))


def test_an_edit_file_does_not_change_with_the_network_or_the_tensors_it_was_made_of() -> None:
    model = network()
    new = {"2.bias": model.state_dict()["2.bias"] + 1}
    edit_file = added(model, new)
    own, wanted = {n: t.clone() for n, t in model.state_dict().items()}, new["2.bias"].clone()
    for tensor in (new["2.bias"], model.state_dict()["2.bias"], apply_edit_file(edit_file, own)["2.bias"]):
        tensor.add_(1)
    edited = apply_edit_file(edit_file, own)
    assert torch.equal(edited["2.bias"], wanted)
    assert bits(undo_edit_file(edit_file, edited)) == bits(own)


def test_many_additions_are_those_made_alone_and_the_network_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed, checksums = network(), list[int](), making.checksums

    def counted(state: State) -> dict[str, str]:
        hashed.append(len(state))
        return checksums(state)

    monkeypatch.setattr(making, "checksums", counted)
    many = make_additions(model, new_weights(model), "two layers")
    assert len(hashed) == 1
    for found, new in zip(many, new_weights(model), strict=True):
        alone = make_addition(model, **new._asdict(), backbone="two layers")
        assert (found.key, found.before, found.after) == (alone.key, alone.before, alone.after)
        assert (found.name, found.method, found.alpha, found.site) == (new.name, new.method, new.alpha, new.site)
    assert many[0].originals["2.bias"] is many[1].originals["2.bias"]


def test_the_key_tells_new_weights_and_networks_apart_not_what_they_are_called() -> None:
    model, other = network(), network()
    other.state_dict()["0.weight"].add_(1)
    changed = {"2.bias": torch.ones(4)}
    edit_file = added(model, changed)
    assert edit_file.key == added(model, changed, "head bias", 7.0).key
    assert edit_file.is_same_but_for_strength(added(model, changed))
    for another in (added(model, {"2.bias": torch.zeros(4)}), added(other, changed), *gates(model)):
        assert edit_file.key != another.key
        assert not edit_file.is_same_but_for_strength(another)
        assert not another.is_same_but_for_strength(edit_file)


def _tied() -> nn.Module:
    embed, head = nn.Linear(4, 4), nn.Linear(4, 4)
    head.weight = embed.weight
    return nn.ModuleDict({"embed": embed, "head": head})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"2.bias": torch.tensor([1.0, 2.0, torch.nan, 0.0])},
            r"of 2\.bias hold NaN, infinity, or numbers that float32",
        ),
        ({"2.bias": torch.tensor([1.0, 2.0, -torch.inf, 0.0])}, "hold NaN, infinity"),
        ({"2.bias": torch.full((4,), 1e300, dtype=torch.float64)}, "numbers that float32 cannot hold"),
        ({"2.bias": torch.ones(5)}, r"of 2\.bias have the shape \(5,\), but it has \(4,\)"),
        ({"2.bias": torch.ones(1)}, r"have the shape \(1,\)"),
        ({"2.bias": torch.ones(4, dtype=torch.int64)}, r"2\.bias is not floating-point, so that steering cannot"),
        (
            {"3.bias": torch.ones(4), "2.bias": torch.ones(4)},
            r"The network has no 3\.bias, which steering would change",
        ),
        ({}, "would not change the model"),
        ({"1.num_batches_tracked": torch.tensor(9)}, "would not change the model"),
    ],
)
def test_new_weights_that_do_not_fit_are_refused(changed: State, words: str) -> None:
    with pytest.raises(UserError, match=words):
        added(network(), changed)


def test_what_else_cannot_be_an_addition() -> None:
    model = network()
    changed = {"2.bias": torch.ones(4)}
    same = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with pytest.raises(UserError, match="would not change the model: all new values are those that it has"):
        added(model, same)
    with pytest.raises(UserError, match="must say by which method"):
        added(model, changed, "")
    for alpha in (float("nan"), float("inf"), 1e39):
        with pytest.raises(UserError, match="strength α of an addition must be a number"):
            added(model, changed, "steering", alpha)
    with pytest.raises(UserError, match="church: steering at α = 1 cannot be set to α = 2, because its file holds"):
        added(model, changed).at(2)
    fine = network().double()
    fine.state_dict()["2.bias"].add_(1e-12)
    with pytest.raises(UserError, match="float64 with digits that float32 cannot hold"):
        added(fine, changed)
    model.state_dict()["2.bias"][0] = torch.inf
    with pytest.raises(UserError, match=r"2\.bias of the network holds NaN or infinity"):
        added(model, changed)


def test_two_names_of_one_parameter_change_together() -> None:
    model, new = _tied(), torch.eye(4)
    for changed in ({"head.weight": new}, {"head.weight": new, "embed.weight": new + 1}):
        with pytest.raises(UserError, match=r"head\.weight and embed\.weight are the same parameter, but steering"):
            added(model, changed)
    edit_file = added(model, {"head.weight": new, "embed.weight": new})
    model.load_state_dict(apply_edit_file(edit_file, model.state_dict()))
    assert torch.equal(model.state_dict()["embed.weight"], new)


def test_wrong_weights_and_twice_applied_are_refused() -> None:
    model = network()
    state = model.state_dict()
    edit_file, another = added(model, {"2.bias": torch.ones(4)}), added(model, {"2.bias": torch.zeros(4)})
    without = {name: tensor for name, tensor in state.items() if name != "2.bias"}
    for other, words in (
        ({**state, "2.weight": state["2.weight"] + 1}, r"2\.weight differs"),
        ({**state, "2.bias": state["2.bias"] + 1}, r"only 2\.bias differs, so they may hold edits"),
        ({**state, "2.bias": state["2.bias"][:2]}, r"only 2\.bias differs"),
        (without, r"they lack 2\.bias"),
    ):
        with pytest.raises(UserError, match=rf"not the ones that the edit was made for.*{words}"):
            apply_edit_file(edit_file, other)
    edited = apply_edit_file(edit_file, state)
    for held in ([], [edit_file], [record(edit_file)]):
        with pytest.raises(UserError, match="hold this edit already"):
            apply_edit_file(edit_file, edited, held)
    with pytest.raises(UserError, match="nothing to undo"):
        undo_edit_file(edit_file, state)
    with pytest.raises(UserError, match="cannot be undone"):
        undo_edit_file(another, edited)
    other_model = network()
    other_model.state_dict()["0.bias"].add_(1)
    with pytest.raises(UserError, match="made for different networks"):
        apply_edit_file(edit_file, state, [added(other_model, {"0.bias": torch.ones(6)})])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_half_precision_does_not_hold_is_refused(dtype: torch.dtype) -> None:
    model = network(dtype)
    own, bias = cast(model.state_dict(), dtype), model.state_dict()["2.bias"]
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"would not change these weights: what it changes is lost in {name}"):
        apply_edit_file(added(model, {"2.bias": bias * (1 + 1e-6)}), own)
    with pytest.raises(UserError, match=f"is lost in {name}"):
        apply_edit_file(gates(model)[0].at(1e-5), own)
    with pytest.raises(UserError, match=rf"values in 2\.bias that {name} cannot hold"):
        apply_edit_file(added(model, {"2.bias": torch.full((4,), 3.4e38)}), own)
    rounded = cast(network().state_dict(), dtype)
    with pytest.raises(UserError, match=f"is rounded to {name}"):
        apply_edit_file(added(network(), {"2.bias": bias + 1, "2.weight": torch.ones(4, 6)}), rounded)


def test_a_sum_that_overflows_is_refused() -> None:
    model = network()
    large = [added(model, {"2.bias": torch.full((4,), size)}) for size in (3e38, 2e38)]
    with pytest.raises(UserError, match=r"values in 2\.bias that float32 cannot hold"):
        apply_edit_files(large, model.state_dict())


@pytest.mark.parametrize(
    ("readers", "channels"),
    [({"2.bias": 1}, 4), ({"2.weight": 1}, 5), ({"2.weight": 2}, 12), ({"2.weight": 4}, 24), ({"2.weight": 3}, 18)],
)
def test_held_gates_that_do_not_fit_the_tensors_of_an_addition(readers: dict[str, int], channels: int) -> None:
    """Hostile metadata: gates of the same network with other readers, groups or channels."""
    model = network()
    row = b64encode(np.full(channels, 0.5, "<f4").tobytes()).decode()
    hostile = held_from({**record_of(gates(model)[0]), "readers": readers, "contributions": [row]})
    _, ablation, _ = additions(model)
    act: Callable[..., State]
    for act in (apply_edit_file, undo_edit_file):
        with pytest.raises(UserError, match=r"channels, unlike 2\.|2\.weight(, 2\.bias)? differ"):
            act(ablation, model.state_dict(), [hostile])
