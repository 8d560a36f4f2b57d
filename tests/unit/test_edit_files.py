"""Edit files on disk: originals are stored once, and damaged files are refused in a sentence."""

import base64
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from salve.backbones import Site
from salve.backbones.site import Reader
from salve.editing import Edit, GateFile, apply_edit_file, load_edit_file, make_edit_files, save_edit_file
from salve.editing.files import HELD, held_in, metadata_with
from salve.report.text import slug
from salve.sae import make_sae
from salve.types import UserError

SITE = Site("pool", (Reader("1.weight"),), 6, map="0")


def network(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Linear(6, classes))


def edit_files(count: int = 2, classes: int = 4) -> list[GateFile]:
    sae = make_sae("linear_l1", 6, count, torch.Generator().manual_seed(0))
    named = [(f"class {k}", [Edit(k, 0.5 + k)]) for k in range(count)]
    return make_edit_files(network(classes), SITE, sae, named, "two layers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, edit_file in enumerate(edit_files()):
        save_edit_file(edit_file, tmp_path / f"{k:02d}.json")
    return tmp_path


def originals_in(folder: Path) -> Path:
    (path,) = folder.glob("originals-*.safetensors")
    return path


def test_the_originals_lie_once_in_a_folder_however_many_edits_it_has(tmp_path: Path) -> None:
    many = edit_files(40, classes=5000)
    for k, edit_file in enumerate(many):
        save_edit_file(edit_file, tmp_path / f"{k:02d}.json")
    head = 4 * 6 * 5000
    shared = originals_in(tmp_path)
    assert head < shared.stat().st_size < head + 2000
    assert all(path.stat().st_size < 2000 for path in tmp_path.glob("*.json"))
    assert len(list(tmp_path.iterdir())) == 41  # and nothing that is unfinished
    state = network(5000).state_dict()
    for k in (0, 39):
        found, expected = (apply_edit_file(r, state) for r in (load_edit_file(tmp_path / f"{k:02d}.json"), many[k]))
        assert all(torch.equal(found[name], expected[name]) for name in state)


def test_the_originals_are_written_once_and_again_only_when_damaged(folder: Path) -> None:
    shared = originals_in(folder)
    stamp, whole = shared.stat().st_mtime_ns, shared.read_bytes()
    save_edit_file(edit_files()[0], folder / "again.json")
    assert shared.stat().st_mtime_ns == stamp
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        shared.write_bytes(damaged)
        save_edit_file(edit_files()[0], folder / "again.json")
        assert shared.read_bytes() == whole


def test_files_survive_being_copied_by_the_reports_names(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("run")
    for path in folder.iterdir():
        shutil.copyfile(path, other / f"{slug(path.stem)}{path.suffix}")
    assert load_edit_file(other / "01.json").name == "class 1"


def test_metadata_say_the_same_in_whatever_order_edits_came() -> None:
    one, two = edit_files()
    given = {"format": "pt"}
    both = metadata_with(given, [one, two])
    assert both == metadata_with(metadata_with(given, [two]), [two, one])
    found = held_in(both, Path("x"))
    assert sorted(edit.key for edit in found) == sorted([one.key, two.key])
    assert metadata_with(both, []) == given


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda r: r.update(format="salve-edit_file-1"), "its format is not salve-edit-2 or salve-addition-1"),
    "no readers": (lambda r: r.update(readers={}), "readers must be an object that is not empty"),
    "readers in a list": (lambda r: r.update(readers=["1.weight"]), "readers must be an object that is not empty"),
    "half a group": (lambda r: r.update(readers={"1.weight": 0.5}), "names of weights with their number of groups"),
    "no groups": (lambda r: r.update(readers={"1.weight": 0}), "names of weights with their number of groups"),
    "other groups": (lambda r: r.update(readers={"1.weight": 3}), r"1\.weight has the shape \(.*\) in 3 groups"),
    "other readers": (lambda r: r.update(readers={"0.weight": 1}), "originals of another network or site"),
    "before": (lambda r: r.update(before="0" * 64), "originals of another network or site"),
    "after": (lambda r: r.update(after="0" * 64), "does not give the checksum"),
    "no after": (lambda r: r.pop("after"), "after must be a text"),
    "site": (lambda r: r.update(site=3), "site must be a text"),
    "edits": (lambda r: r.update(edits={}), "edits must be a list"),
    "an edit": (lambda r: r.update(edits=[3]), "an edit must be a JSON object"),
    "unknown field": (lambda r: r["edits"][0].update(beta=1), "and nothing else"),
    "missing field": (lambda r: r["edits"][0].pop("sign"), "an edit must say alpha, channels"),
    "mode": (lambda r: r["edits"][0].update(mode="amplify"), "mode must be suppress or enhance"),
    "mode's type": (lambda r: r["edits"][0].update(mode=[]), "mode must be suppress or enhance"),
    "scale": (lambda r: r["edits"][0].update(scale="min"), "scale must be unit or max"),
    "channels": (lambda r: r["edits"][0].update(channels=None), "channels must be all or aligned"),
    "latent": (lambda r: r["edits"][0].update(latent=-1), "latent must not be negative"),
    "latent's type": (lambda r: r["edits"][0].update(latent=True), "latent must be a whole number"),
    "sign": (lambda r: r["edits"][0].update(sign=0), "sign must be 1 or -1"),
    "negative alpha": (lambda r: r["edits"][0].update(alpha=-1), "alpha must be a number"),
    "alpha that is none": (lambda r: r["edits"][0].update(alpha=float("nan")), "alpha must be a number"),
    "huge alpha": (lambda r: r["edits"][0].update(alpha=10**400), "alpha must be a number"),
    "alpha's type": (lambda r: r["edits"][0].update(alpha="1"), "alpha must be a number"),
    "infinite enhancement": (lambda r: r["edits"][0].update(alpha="inf", mode="enhance"), "alpha must be a number"),
    "another alpha": (lambda r: r["edits"][0].update(alpha=0.25), "does not give the checksum"),
    "alpha 0": (lambda r: r["edits"][0].update(alpha=0), "does not give the checksum"),
    "base64": (lambda r: r.update(contributions=["*"]), "float32 numbers in base64"),
    "contributions' type": (lambda r: r.update(contributions=[[0.5]]), "contributions must be texts"),
    "odd bytes": (lambda r: r.update(contributions=["AAA="]), "float32 numbers in base64"),
    "empty": (lambda r: r.update(contributions=[""]), "contributions must be finite"),
    "not finite": (
        lambda r: r.update(contributions=[base64.b64encode(np.full(6, np.nan, "<f4").tobytes()).decode()]),
        "contributions must be finite",
    ),
    "another width": (
        lambda r: r.update(contributions=[base64.b64encode(np.ones(5, "<f4").tobytes()).decode()]),
        "5 channels",
    ),
    "one contribution more": (lambda r: r["contributions"].append(r["contributions"][0]), "one contribution for each"),
    "a path": (lambda r: r.update(originals=f"../{r['originals']}"), "must be the name of a file"),
    "an absolute path": (lambda r: r.update(originals="/etc/passwd"), "must be the name of a file"),
    "other originals": (lambda r: r.update(originals="originals-0123456789ab.safetensors"), "beside its edit files"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_field_is_checked(folder: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    path = folder / "00.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=words) as refusal:
        load_edit_file(path)
    assert str(path.parent) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, h: t.update({"1.weight": t["1.weight"] + 1}), "do not have their checksums"),
        (lambda t, h: t.update({"1.weight": t["1.weight"].half()}), "not float32"),
        (lambda t, h: t.update({"more": t["1.weight"].clone()}), "do not have their checksums"),
        (lambda t, h: t.clear(), "its checksum is not the one in its name"),
        (lambda t, h: h.update(weights=[]), "no checksums"),
        (lambda t, h: h["weights"].update({"0.bias": "0" * 32}), "its checksum is not the one in its name"),
        (lambda t, h: h["weights"].update({"0.bias": 3}), "a checksum is malformed"),
        (lambda t, h: h.update(format="x"), "another version"),
    ],
)
def test_damaged_originals_are_found_out(folder: Path, change: Callable[[Any, Any], Any], words: str) -> None:
    path = originals_in(folder)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["salve"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, {"salve": json.dumps(header)})
    with pytest.raises(UserError, match=words):
        load_edit_file(folder / "00.json")


def _mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at, kind = draw.randrange(len(changed) + 1), draw.randrange(4)
        if kind == 0:
            del changed[at:]  # truncated
        elif kind == 1:
            del changed[at : at + draw.randint(1, 20)]
        elif kind == 2:
            changed[at:at] = draw.choice([b"\x00", b"{", b"[" * 3000, b'"', b"1e999", b"-", b"null", b"\xff", b"NaN"])
        elif changed:
            changed[at % len(changed)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _value_changed(record: Any, draw: random.Random) -> None:
    """Put something else in the place of one value, at any depth."""
    while True:
        places = list(record) if isinstance(record, dict) else list(range(len(record)))
        place = draw.choice(places)
        value = record[place]
        if isinstance(value, dict | list) and value and draw.random() < 0.7:
            record = value
            continue
        record[place] = draw.choice(
            [None, True, -1, 0, 1e308, 10**5000, "", "inf", "../x", [], {}, [[]], [None], "\x1b[2J"]
        )
        return


def test_only_sentences_come_out_of_damaged_files(folder: Path) -> None:
    """Random damages of both files: an edit that is still read must be the same."""
    draw = random.Random(12)
    path, shared = folder / "00.json", originals_in(folder)
    text, binary = path.read_bytes(), shared.read_bytes()
    good, refused = load_edit_file(path), list[str]()
    assert isinstance(good, GateFile)
    for turn in range(600):
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
        shared.write_bytes(content)
        try:
            found = load_edit_file(path)
        except UserError as error:
            refused.append(str(error))
        else:
            assert isinstance(found, GateFile)
            assert (found.before, found.after, found.edits[0].alpha) == (good.before, good.after, good.edits[0].alpha)
            assert torch.equal(found.contributions, good.contributions)
            assert torch.equal(found.originals["1.weight"], good.originals["1.weight"])
    assert len(refused) > 400
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)


def test_only_sentences_come_out_of_a_damaged_list_of_held_edits() -> None:
    draw = random.Random(12)
    whole = metadata_with({}, edit_files())[HELD]
    refused = []
    for _ in range(300):
        damaged = _mutated(whole.encode(), draw).decode(errors="replace")
        try:
            held_in({HELD: damaged}, Path("edited.safetensors"))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all("damaged list of its edits" in sentence for sentence in refused)
