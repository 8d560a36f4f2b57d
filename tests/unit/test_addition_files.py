"""Additions on disk: new weights beside the edit file, lists without them, and damaged or hostile files."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salve.artifacts import digest_of
from salve.editing import AdditionFile, apply_edit_file, load_edit_file, make_addition, save_edit_file
from salve.editing.additions import stamps
from salve.editing.edits import checksum, checksums
from salve.editing.files import HELD, held_in, load_edit_files, load_held, metadata_with
from salve.types import UserError
from tests.unit.addition_examples import State, additions, bits, gates, network, several
from tests.unit.test_edit_files import _mutated, _value_changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds the ablation of the head's weight and bias as ``01.json``, among other edits."""
    for k, edit_file in enumerate(additions(network())):
        save_edit_file(edit_file, tmp_path / f"{k:02d}.json")
    return tmp_path


def beside(path: Path, field: str) -> Path:
    return path.with_name(json.loads(path.read_text())[field])


def test_a_saved_addition_comes_back_the_same(folder: Path) -> None:
    model = network()
    paths = [folder / f"{k:02d}.json" for k in range(3)]
    for path, made, found in zip(paths, additions(model), load_edit_files(paths), strict=True):
        assert isinstance(found, AdditionFile)
        for name in ("name", "backbone", "site", "method", "alpha", "before", "after", "key", "weights", "changed"):
            assert getattr(found, name) == getattr(made, name)
        state = model.state_dict()
        assert (
            bits(apply_edit_file(found, state)) == bits(apply_edit_file(made, state)) == bits(state | dict(made.edited))
        )
        assert bits(load_file(beside(path, "changes"))) == bits(dict(made.edited))
        assert load_held(path).key == made.key
    record = json.loads(paths[1].read_text())
    assert (record["method"], record["alpha"], record["site"]) == ("directional ablation", 0.5, "pool")
    assert record["changed"]["2.weight"]["shape"] == [4, 6]


def test_gates_and_additions_of_the_same_tensors_share_their_originals(tmp_path: Path) -> None:
    model = network()
    head = make_addition(
        model, {"2.weight": torch.ones(4, 6)}, name="", method="m", alpha=1.0, site="", backbone="two layers"
    )
    for k, edit_file in enumerate([*gates(model), head]):
        save_edit_file(edit_file, tmp_path / f"{k}.json")
    names = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert names == ["0.json", "1.json", "2.json", "changes", "originals"]
    assert all(load_edit_file(tmp_path / f"{k}.json").originals.keys() == {"2.weight"} for k in range(3))


def test_the_list_of_held_edits_has_stamps_but_no_weights() -> None:
    edit_files = several(network())
    listed = metadata_with({"format": "pt"}, edit_files)
    assert listed == metadata_with({"format": "pt"}, edit_files[::-1])
    found = held_in(listed, Path("x"))
    assert sorted(edit.key for edit in found) == sorted(edit.key for edit in edit_files)
    assert not any(isinstance(edit, AdditionFile) for edit in found)
    tuning = json.dumps([record for record in json.loads(listed[HELD]) if record.get("method") == "fine-tuning"])
    assert len(tuning) < 150 * len(edit_files[-1].tensors) + 500


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an old format": (lambda r: r.update(format="salve-edit-1"), "its format is not salve-edit-2 or salve-addition-1"),
    "a gate's format": (lambda r: r.update(format="salve-edit-2"), "only these, must have the field changed"),
    "no changed": (lambda r: r.pop("changed"), "only these, must have the field changed"),
    "changed is empty": (lambda r: r.update(changed={}), "changed must be an object that is not empty"),
    "changed in a list": (lambda r: r.update(changed=["2.bias"]), "changed must be an object that is not empty"),
    "a stamp": (lambda r: r["changed"].update({"2.bias": 3}), "changed must say shape and checksum of each tensor"),
    "a field more": (lambda r: r["changed"]["2.bias"].update(more=1), "and nothing else"),
    "a shape": (lambda r: r["changed"]["2.bias"].update(shape=4), "a shape must be a list of whole numbers"),
    "a negative size": (lambda r: r["changed"]["2.bias"].update(shape=[-4]), "a list of whole numbers"),
    "half a size": (lambda r: r["changed"]["2.bias"].update(shape=[4.0]), "a list of whole numbers"),
    "another shape": (lambda r: r["changed"]["2.bias"].update(shape=[2, 2]), "do not have the checksums"),
    "a checksum": (lambda r: r["changed"]["2.bias"].update(checksum="x"), "a checksum is malformed"),
    "another checksum": (lambda r: r["changed"]["2.bias"].update(checksum="0" * 32), "changes must be changes-"),
    "a tensor less": (lambda r: r["changed"].pop("2.bias"), "changes must be changes-"),
    "an unknown tensor": (lambda r: r["changed"].update(no=r["changed"]["2.bias"]), "changes must be changes-"),
    "no method": (lambda r: r.pop("method"), "method must be a text"),
    "an empty method": (lambda r: r.update(method=""), "must say by which method"),
    "a strength": (lambda r: r.update(alpha="1"), "alpha must be a number"),
    "a strength that is none": (lambda r: r.update(alpha=float("nan")), "alpha must be a number"),
    "an infinite strength": (lambda r: r.update(alpha=float("inf")), "alpha must be a number"),
    "a huge strength": (lambda r: r.update(alpha=10**400), "alpha must be a number"),
    "before": (lambda r: r.update(before="0" * 64), "originals of another network"),
    "after": (lambda r: r.update(after="0" * 64), "does not give the checksum"),
    "no changes": (lambda r: r.pop("changes"), "changes must be changes-"),
    "a path": (lambda r: r.update(changes=f"../{r['changes']}"), "changes must be changes-"),
    "an absolute path": (lambda r: r.update(changes="/etc/passwd"), "changes must be changes-"),
    "other changes": (lambda r: r.update(changes="changes-0123456789ab.safetensors"), "changes must be changes-"),
    "a path to originals": (
        lambda r: r.update(originals=f"../{r['originals']}"),
        "originals must be the name of a file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_field_is_checked(folder: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    path = folder / "01.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=words) as refusal:
        load_edit_file(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"2.bias": t["2.bias"] + 1}), "do not have the checksums"),
        (lambda t: t.update({"2.bias": t["2.bias"].half()}), r"2\.bias are not float32"),
        (lambda t: t.update({"2.bias": t["2.bias"].reshape(2, 2)}), r"have the shape \(2, 2\), but it has \(4,\)"),
        (lambda t: t.update(more=torch.ones(1)), r"are of 2\.bias, 2\.weight, more, not of 2\.bias, 2\.weight"),
        (lambda t: t.pop("2.bias"), r"are of 2\.weight, not of 2\.bias, 2\.weight"),
    ],
)
def test_damaged_changes_are_found_out(folder: Path, change: Callable[[State], Any], words: str) -> None:
    path = folder / "01.json"
    changes = beside(path, "changes")
    tensors = load_file(changes)
    change(tensors)
    save_file(tensors, changes)
    with pytest.raises(UserError, match=words):
        load_edit_file(path)
    changes.unlink()
    with pytest.raises(UserError, match=f"There is no .*{changes.name}, which holds the new weights of 01.json"):
        load_edit_file(path)


def forge(path: Path, edited: State) -> None:
    """Give an edit file other new values, with all checksums and names right."""
    record = json.loads(path.read_text())
    known = load_held(path)
    changed = {name: {"shape": list(stamp.shape), "checksum": stamp.checksum} for name, stamp in stamps(edited).items()}
    sums = {name: stamp.checksum for name, stamp in stamps(edited).items()}
    weights = {**checksums(network().state_dict()), **sums}
    changes = f"changes-{digest_of(sums)[:12]}.safetensors"
    save_file(edited, path.with_name(changes))
    path.write_text(json.dumps({**record, "changed": changed, "changes": changes, "after": checksum(weights)}))
    assert load_held(path).key != known.key


@pytest.mark.parametrize(
    ("edited", "words"),
    [
        ({"2.bias": torch.tensor([1.0, torch.nan, 0.0, 0.0])}, "hold NaN, infinity"),
        ({"2.bias": torch.full((4,), torch.inf)}, "hold NaN, infinity"),
        ({"2.bias": torch.ones(5)}, r"have the shape \(5,\)"),
        ({"2.bias": torch.ones(4).double()}, "not float32"),
        ({"2.bias": torch.ones(4), "no": torch.ones(4)}, "originals of another network or site"),
        ({"2.bias": torch.ones(4), "1.num_batches_tracked": torch.ones(1)}, "originals of another network or site"),
    ],
)
def test_hostile_changes_with_the_right_digests_are_refused(folder: Path, edited: State, words: str) -> None:
    forge(folder / "00.json", edited)
    with pytest.raises(UserError, match=words):
        load_edit_file(folder / "00.json")


def test_a_forged_file_that_is_right_in_all_is_another_edit(folder: Path) -> None:
    """What the refusals above rest on: the forgery itself is not what is refused."""
    forge(folder / "00.json", {"2.bias": torch.ones(4)})
    found = load_edit_file(folder / "00.json")
    assert apply_edit_file(found, network().state_dict())["2.bias"].tolist() == [1, 1, 1, 1]


def test_original_counters_are_refused(folder: Path) -> None:
    """No checksum covers BatchNorm's counters, so that nothing would tell wrong ones."""
    path = folder / "00.json"
    originals = beside(path, "originals")
    header = {"format": "salve-edit-2", "weights": checksums(network().state_dict())}
    tensors = {"2.bias": load_file(originals)["2.bias"], "1.num_batches_tracked": torch.ones(1)}
    key = digest_of({"weights": header["weights"], "originals": sorted(tensors)})[:12]
    forged = originals.with_name(f"originals-{key}.safetensors")
    save_file(tensors, forged, {"salve": json.dumps(header)})
    path.write_text(json.dumps({**json.loads(path.read_text()), "originals": forged.name}))
    with pytest.raises(UserError, match="it holds a counter of batches"):
        load_edit_file(path)


def test_only_sentences_come_out_of_damaged_files(folder: Path) -> None:
    """Random damages of both files: an edit that is still read must change the weights to the same ones."""
    draw = random.Random(12)
    path = folder / "01.json"
    changes = beside(path, "changes")
    text, binary = path.read_bytes(), changes.read_bytes()
    good, refused = load_edit_file(path), list[str]()
    assert isinstance(good, AdditionFile)
    for turn in range(450):
        record, content = text, binary
        if turn % 3 == 0:
            record = _mutated(text, draw)
        elif turn % 3 == 1:
            content = _mutated(binary, draw)
        else:
            tree = json.loads(text)
            _value_changed(tree, draw)
            try:
                record = json.dumps(tree).encode()
            except ValueError:  # too many digits to be written
                continue
        path.write_bytes(record)
        changes.write_bytes(content)
        try:
            found = load_edit_file(path)
        except UserError as error:
            refused.append(str(error))
        else:
            assert isinstance(found, AdditionFile)
            assert (found.before, found.after, found.key) == (good.before, good.after, good.key)
            assert bits(dict(found.edited)) == bits(dict(good.edited))
            assert bits(dict(found.originals)) == bits(dict(good.originals))
    assert len(refused) > 300
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)


def test_only_sentences_come_out_of_a_damaged_list_of_held_additions() -> None:
    draw = random.Random(12)
    whole = metadata_with({}, additions(network()))[HELD]
    refused = []
    for _ in range(300):
        damaged = _mutated(whole.encode(), draw).decode(errors="replace")
        try:
            held_in({HELD: damaged}, Path("edited.safetensors"))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 150
    assert all("damaged list of its edits" in sentence for sentence in refused)
