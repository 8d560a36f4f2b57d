"""``salve-edit``: applying, undoing to the same bits, and refusals in one sentence that write nothing."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from salve.artifacts import Artifact
from salve.backbones import Site
from salve.backbones.site import Reader
from salve.editing import Edit, GateFile, apply_edit_files, gate, make_edit_files, save_edit_file
from salve.editing.cli import _write, main
from salve.editing.files import HELD
from salve.run.manifest import write_manifest
from salve.sae import SAE, make_sae

SITE = Site("pool", (Reader("1.weight"),), 6, map="0")
NAMES = ("church", "tench", "gas pump", "Gas-Pump")


def bits(path: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    return {n: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in load_file(path).items()}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _sae() -> SAE:
    return make_sae("linear_l1", 6, len(NAMES), torch.Generator().manual_seed(0))


class _Net(nn.Module):
    """A network that is nothing but its state."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self.state


class Studied:
    """A run's folder with edits, its classifier elsewhere, and a user's own copy of the weights."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.root, self.run = root, root / "runs" / "one"
        (self.run / "edits").mkdir(parents=True)
        model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
        model[1] = nn.Linear(6, 4)
        own = {name: t.to(dtype) for name, t in model.state_dict().items()}
        model.load_state_dict({name: t.float() for name, t in own.items()})
        sae = _sae()
        named = [(name, [Edit(k, 0.5 + k)]) for k, name in enumerate(NAMES)]
        self.edit_files: list[GateFile] = make_edit_files(model, SITE, sae, named, "two layers")
        self.files = []
        for k, edit_file in enumerate(self.edit_files):
            slug = edit_file.name.lower().replace(" ", "-")
            self.files.append(self.run / "edits" / f"{k:02d}-{slug}.json")
            save_edit_file(edit_file, self.files[-1])
        classifier = root / "artifacts" / "classifier" / "abc"
        classifier.mkdir(parents=True)
        self.classifier = classifier / "model.safetensors"
        save_file(model.state_dict(), self.classifier)
        record = {"artifacts": {"classifier": {"key": "abc", "path": "../../artifacts/classifier/abc"}}}
        (self.run / "manifest.json").write_text(json.dumps(record))
        self.weights = root / "own.safetensors"
        save_file(own, self.weights, {"format": "pt", "author": "me"})
        self.before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def out(self, name: str = "out") -> Path:
        return self.root / f"{name}.safetensors"

    def left_as_it_was(self) -> bool:
        return {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()} == self.before


@pytest.fixture
def studied(tmp_path: Path) -> Studied:
    return Studied(tmp_path)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_apply_and_undo_give_back_bits_dtypes_and_metadata(tmp_path: Path, dtype: torch.dtype) -> None:
    studied = Studied(tmp_path, dtype) if dtype != torch.float64 else Studied(tmp_path)
    if dtype == torch.float64:
        save_file(
            {n: t.double() for n, t in load_file(studied.weights).items()}, studied.weights, metadata(studied.weights)
        )
    assert run("apply", studied.files[0], studied.weights, studied.out("edited")) == 0
    assert {t.dtype for t in load_file(studied.out("edited")).values()} == {dtype}
    assert bits(studied.out("edited")) != bits(studied.weights)
    assert run("undo", studied.files[0], studied.out("edited"), studied.out("restored")) == 0
    assert bits(studied.out("restored")) == bits(studied.weights)
    assert metadata(studied.out("restored")) == metadata(studied.weights) == {"format": "pt", "author": "me"}


def test_edits_stack_over_several_commands_and_are_undone_apart(studied: Studied) -> None:
    one, two, three = studied.files[:3]
    assert run("apply", one, two, three, studied.weights, studied.out("together")) == 0
    expected = apply_edit_files(studied.edit_files[:3], load_file(studied.weights))
    assert all(torch.equal(t, expected[name]) for name, t in load_file(studied.out("together")).items())
    for order in itertools.permutations((one, two, three)):
        now = studied.weights
        for k, file in enumerate(order):
            assert run("apply", file, now, studied.out(f"step-{k}")) == 0
            now = studied.out(f"step-{k}")
        assert bits(now) == bits(studied.out("together"))
        assert metadata(now) == metadata(studied.out("together"))
        for k, file in enumerate(order):
            assert run("undo", file, now, studied.out(f"back-{k}")) == 0
            now = studied.out(f"back-{k}")
            left = order[k + 1 :]
            assert run("apply", *left, studied.weights, studied.out("left")) == 0 if left else True
            same = studied.out("left") if left else studied.weights
            assert (bits(now), metadata(now)) == (bits(same), metadata(same))


def test_another_strength(studied: Studied) -> None:
    def scaled(alpha: str) -> torch.Tensor:
        assert run("apply", studied.files[0], "--alpha", alpha, studied.weights, studied.out(f"at-{alpha}")) == 0
        return load_file(studied.out(f"at-{alpha}"))["1.weight"]

    weight, c = load_file(studied.weights)["1.weight"], studied.edit_files[0].contributions[0]
    torch.testing.assert_close(scaled("0.25"), weight * (1 - 0.25 * c.abs()))
    assert torch.equal(scaled("inf"), weight * gate(c, float("inf")))
    assert (scaled("inf") == 0).all()
    # The file lists the strength of its edit, so that undoing needs no --alpha, but accepts it.
    for more in ([], ["--alpha", "0.25"]):
        assert run("undo", studied.files[0], *more, studied.out("at-0.25"), studied.out("back")) == 0
        assert bits(studied.out("back")) == bits(studied.weights)


def test_a_strength_that_the_weights_do_not_hold_is_not_undone(
    studied: Studied, capsys: pytest.CaptureFixture[str]
) -> None:
    run("apply", studied.files[0], studied.weights, studied.out("once"))
    assert run("undo", studied.files[0], "--alpha", "7", studied.out("once"), studied.out("x")) == 2
    assert "does not hold this edit; it holds church: suppress latent 0 at α = 0.5" in capsys.readouterr().err
    run("apply", studied.files[0], "--alpha", "0.25", studied.out("once"), studied.out("twice"))
    assert run("undo", studied.files[0], "--alpha", "0.25", studied.out("twice"), studied.out("back")) == 0
    assert bits(studied.out("back")) == bits(studied.out("once"))
    assert run("undo", studied.files[0], studied.out("back"), studied.out("base")) == 0
    assert bits(studied.out("base")) == bits(studied.weights)


def test_edits_of_a_runs_folder_are_chosen_by_name(studied: Studied) -> None:
    for words, index in (
        (["church"], 0),
        (["Tench"], 1),
        (["01-tench"], 1),
        (["gas pump"], 2),
        (["Gas-Pump"], 3),
        (["03-gas-pump.json"], 3),
    ):
        names = [part for word in words for part in ("--edit", word)]
        assert run("apply", studied.run, *names, studied.weights, studied.out("named")) == 0
        assert run("apply", studied.files[index], studied.weights, studied.out("file")) == 0
        assert bits(studied.out("named")) == bits(studied.out("file"))
    assert run("apply", studied.run, "--edit", "church", "--edit", "tench", studied.weights, studied.out("named")) == 0
    assert run("apply", *studied.files[:2], studied.weights, studied.out("file")) == 0
    assert bits(studied.out("named")) == bits(studied.out("file"))
    assert (
        run("undo", studied.run, studied.out("named"), studied.out("all")) == 0
    )  # without a name: all edits that it holds
    assert bits(studied.out("all")) == bits(studied.weights)
    assert metadata(studied.out("all")) == metadata(studied.weights)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["--edit", "harbour"], "has no edit called harbour; its edits are church, tench, gas pump, Gas-Pump."),
        (["--edit", "gas_pump"], "could be 02-gas-pump or 03-gas-pump; give one of these."),
        ([], "Choose one of the edits of"),
    ],
)
def test_a_name_that_does_not_lead_to_one_edit_lists_those_there(
    studied: Studied, names: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("apply", studied.run, *names, studied.weights, studied.out()) == 2
    assert words in capsys.readouterr().err
    assert studied.left_as_it_was()


def test_the_runs_own_classifier_is_edited_when_no_weights_are_given(studied: Studied) -> None:
    assert run("apply", studied.run, "--edit", "church", "--out", studied.out()) == 0
    assert run("apply", studied.files[0], "--weights", studied.classifier, "--out", studied.out("by-path")) == 0
    assert bits(studied.out()) == bits(studied.out("by-path")) != bits(studied.classifier)


def test_the_manifest_leads_to_the_classifier_from_wherever_both_are_moved(
    studied: Studied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Data:
        def fingerprint(self) -> str:
            return "data"

    class Thing:
        weights, seed, data = "random", 0, Data()

    Thing.backbone = Thing  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    classifier = Artifact("classifier", "abc", Path("artifacts/classifier/abc"), "digest", reused=False)
    write_manifest(Path("runs/one"), Thing, Thing, {"classifier": classifier})  # type: ignore[arg-type]
    record = json.loads((studied.run / "manifest.json").read_text())
    assert record["artifacts"]["classifier"]["path"] == "../../artifacts/classifier/abc"
    studied.root.joinpath("moved").mkdir()
    for name in ("runs", "artifacts"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    monkeypatch.chdir("/")
    assert run("apply", tmp_path / "moved/runs/one", "--edit", "church", "--out", studied.out()) == 0


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "no folder of a finished run"),
        ("{", "does not say where the run's classifier is"),
        ("[]", "does not say where the run's classifier is"),
        ('{"artifacts": {"classifier": {"path": 3}}}', "does not say where"),
        ('{"artifacts": {"classifier": {"key": "abc"}}}', "does not say where"),
        ('{"artifacts": {"classifier": {"path": "gone"}}}', "is no longer at"),
    ],
)
def test_a_run_that_does_not_lead_to_its_classifier(
    studied: Studied, manifest: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = studied.run / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    assert run("apply", studied.run, "--edit", "church", "--out", studied.out()) == 2
    error = capsys.readouterr().err
    assert error.startswith("salve-edit: Give the WEIGHTS to edit")
    assert words in error
    assert not studied.out().exists()


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "net.encoder."])
def test_what_stands_before_all_names_stays_there(studied: Studied, prefix: str) -> None:
    own = {prefix + name: tensor for name, tensor in load_file(studied.weights).items()}
    save_file(own, studied.root / "behind.safetensors", {"author": "me"})
    assert run("apply", *studied.files[:2], studied.root / "behind.safetensors", studied.out("edited")) == 0
    assert run("apply", *studied.files[:2], studied.weights, studied.out("plain")) == 0
    assert bits(studied.out("edited")) == {prefix + name: found for name, found in bits(studied.out("plain")).items()}
    assert run("undo", *studied.files[:2], studied.out("edited"), studied.out("back")) == 0
    assert bits(studied.out("back")) == bits(studied.root / "behind.safetensors")
    assert metadata(studied.out("back")) == {"author": "me"}


def test_names_behind_two_prefixes_are_not_guessed(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    own = load_file(studied.weights)
    both = {prefix + name: tensor.clone() for name, tensor in own.items() for prefix in ("model.", "ema.")}
    save_file(both, studied.root / "both.safetensors")
    assert run("apply", studied.files[0], studied.root / "both.safetensors", studied.out()) == 2
    assert "they have unknown tensors" in capsys.readouterr().err
    # Without what torch.compile adds, two names may become the same.
    save_file({**own, "_orig_mod.0.bias": own["0.bias"].clone()}, studied.root / "twice.safetensors")
    assert run("apply", studied.files[0], studied.root / "twice.safetensors", studied.out()) == 2
    assert "hold 0.bias twice" in capsys.readouterr().err
    assert not studied.out().exists()


@pytest.mark.parametrize("entry", ["state_dict", "model", "model.state_dict"])
def test_the_weights_in_a_checkpoint(studied: Studied, entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = {f"module.{name}": tensor for name, tensor in load_file(studied.weights).items()}
    content: dict[str, object] = own  # type: ignore[assignment]
    for name in reversed(entry.split(".")):
        content = {"epoch": 3, "best": np.float64(0.9), name: content}
    torch.save(content, studied.root / "own.ckpt")
    assert run("apply", studied.files[0], studied.root / "own.ckpt", studied.out("edited")) == 0
    assert f"the plain state_dict of entry {entry}; other entries of own.ckpt are left out" in capsys.readouterr().out
    assert run("apply", studied.files[0], studied.weights, studied.out("plain")) == 0
    assert bits(studied.out("edited")) == {
        f"module.{name}": found for name, found in bits(studied.out("plain")).items()
    }
    assert run("undo", studied.files[0], studied.out("edited"), studied.out("back")) == 0
    assert {n: t for n, (_, t) in bits(studied.out("back")).items()} == {
        f"module.{n}": t for n, (_, t) in bits(studied.weights).items()
    }


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_an_edit_whose_originals_are_damaged_is_not_applied(
    studied: Studied, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an edit could not be undone."""
    (originals,) = studied.files[0].parent.glob("originals-*.safetensors")
    whole = originals.read_bytes()
    if damage == "gone":
        originals.unlink()
    else:
        originals.write_bytes(whole[:-4] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run("apply", studied.files[0], studied.weights, studied.out()) == 2
    assert originals.name in capsys.readouterr().err
    assert not studied.out().exists()


@pytest.mark.parametrize("given", [None, {}, {"format": "pt"}, {"": "", "a\nb": "ü", "license": "x" * 5000}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_metadata_comes_back(tmp_path: Path, given: dict[str, str] | None, dtype: torch.dtype) -> None:
    studied = Studied(tmp_path, dtype)
    save_file(load_file(studied.weights), studied.weights, given)
    assert run("apply", studied.files[0], studied.weights, studied.out("edited")) == 0
    assert {name: text for name, text in metadata(studied.out("edited")).items() if name != HELD} == (given or {})
    assert run("undo", studied.files[0], studied.out("edited"), studied.out("back")) == 0
    assert metadata(studied.out("back")) == (given or {})
    assert bits(studied.out("back")) == bits(studied.weights)


def test_tensors_that_are_not_edited_keep_whatever_type_they_have(studied: Studied) -> None:
    """A float64 buffer with digits that float32 does not hold, and counters, are passed on."""
    own = load_file(studied.weights)
    own["0.running_var"] = torch.tensor([1 / 3], dtype=torch.float64)
    edit_file = make_edit_files(_Net(own), SITE, _sae(), [("church", [Edit(0, 2.0)])], "two layers")[0]
    save_edit_file(edit_file, studied.root / "own.json")
    own["0.num_batches_tracked"] = torch.tensor(7)
    save_file(own, studied.root / "own.safetensors")
    assert run("apply", studied.root / "own.json", studied.root / "own.safetensors", studied.out("edited")) == 0
    assert run("undo", studied.root / "own.json", studied.out("edited"), studied.out("back")) == 0
    assert bits(studied.out("back")) == bits(studied.root / "own.safetensors")


def test_a_strength_that_half_precision_does_not_hold_makes_no_infinite_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studied = Studied(tmp_path, torch.float16)
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4))
    model.load_state_dict({name: t.float() for name, t in load_file(studied.weights).items()})
    [edit_file] = make_edit_files(model, SITE, _sae(), [("church", [Edit(0, 1e7, "enhance")])], "two layers")
    save_edit_file(edit_file, studied.root / "up.json")
    assert run("apply", studied.root / "up.json", studied.weights, studied.out()) == 2
    assert "At α = 1e+07 the edit would give values in 1.weight that float16 cannot hold" in capsys.readouterr().err
    assert not studied.out().exists()
    save_file({n: t.float() for n, t in load_file(studied.weights).items()}, studied.root / "wide.safetensors")
    assert run("apply", studied.root / "up.json", studied.root / "wide.safetensors", studied.out()) == 0


def test_weights_of_torch_and_a_lost_list_of_edits(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    own = load_file(studied.weights)
    torch.save(own, studied.root / "own.pt")
    assert run("apply", *studied.files[:2], studied.root / "own.pt", studied.out("edited")) == 0
    torch.save(load_file(studied.out("edited")), studied.root / "edited.pt")  # and the list of edits is gone
    for words in (["undo", studied.files[0]], ["apply", studied.files[2]], ["apply", studied.files[0]]):
        assert run(*words, studied.root / "edited.pt", studied.out("x")) == 2
        error = capsys.readouterr().err
        assert "only 1.weight differs, so they may hold edits" in error
        assert ("does not list its edits: name all of them" in error) == (words[0] == "undo")
    assert run("undo", *studied.files[:2], studied.root / "edited.pt", studied.out("back")) == 0
    assert bits(studied.out("back")) == bits(studied.weights)


def test_tensors_that_share_memory_are_written_in_full(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    _write(tmp_path / "x.safetensors", {"whole": whole, "part": whole[:2], "again": whole}, {})
    found = load_file(tmp_path / "x.safetensors")
    assert {name: t.tolist() for name, t in found.items()} == {
        "whole": [0, 1, 2, 3, 4, 5],
        "part": [0, 1],
        "again": [0, 1, 2, 3, 4, 5],
    }


def test_refusals_come_before_anything_is_written(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    (studied.root / "folder.safetensors").mkdir()
    (studied.root / "damaged.safetensors").write_bytes(studied.weights.read_bytes()[:-3])
    (studied.root / "notes.txt").write_text("hello")
    studied.before |= {p: p.read_bytes() for p in (studied.root / "damaged.safetensors", studied.root / "notes.txt")}
    edit, weights, out = studied.files[0], studied.weights, studied.out()
    for words, reason in (
        (["apply", edit, weights, studied.root / "x.pt"], "must end in .safetensors"),
        (["apply", edit, weights, weights], "is one of the input files"),
        (
            ["apply", edit, weights, edit.parent / next(edit.parent.glob("*.safetensors")).name],
            "a file that edit files need",
        ),
        (["apply", edit, weights, studied.root / "none" / "x.safetensors"], "There is no folder"),
        (["apply", edit, weights, studied.root / "folder.safetensors"], "is a folder"),
        (["apply", edit, studied.root / "none.safetensors", out], "There is no file of weights"),
        (["apply", studied.root / "none.json", weights, out], "There is no edit file"),
        (["apply", edit, studied.root / "damaged.safetensors", out], "cannot be read as safetensors"),
        (["apply", edit, studied.root / "notes.txt", out], "was not loaded"),
        (["apply", "--edit", "church", edit, weights, out], "no folder of a run was given"),
        (["apply", edit, "--out", out], "can be left out only with the folder of a run"),
        (["apply", studied.root, "--edit", "church", weights, out], "holds no edit files"),
        (["undo", edit, weights, out], "nothing to undo"),
        (["show", studied.root / "none.json"], "There is no edit file"),
        (["show", studied.root / "none.safetensors"], "There is no file"),
        (["show", studied.root / "damaged.safetensors"], "cannot be read"),
        (["show", studied.root], "holds no edit files"),
    ):
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert reason in error
        assert error.startswith("salve-edit: ")
        assert error.count("\n") == 1
        assert studied.left_as_it_was()


def test_a_folder_that_cannot_be_written_to(
    studied: Studied, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    assert run("apply", studied.files[0], studied.weights, studied.out()) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert studied.left_as_it_was()


def test_what_fails_while_writing_leaves_nothing_and_is_a_sentence(
    studied: Studied, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert run("apply", studied.files[0], studied.weights, studied.out()) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert studied.left_as_it_was()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "required"),
        (["apply"], "salve-edit --help has examples"),
        (["apply", "own.safetensors", "out.safetensors"], "no EDIT was given"),
        (["apply", "a.json", "b", "c", "--alpha", "-1"], "argument --alpha"),
        (["apply", "a.json", "b", "c", "--alpha", "nan"], "argument --alpha"),
        (["apply", "a.json", "b", "c", "--alpha", "1e39"], "a number from 0 to 3.4e+38, or inf, not 1e39"),
        (["apply", "a.json", "b", "c", "--alpha", "1e999"], "a number from 0 to 3.4e+38, or inf, not 1e999"),
        (["show", "a.json", "--alpha", "2"], "show takes files and folders"),
        (["show"], "show takes an edit file"),
        (["redo", "a.json"], "invalid choice"),
    ],
)
def test_what_is_not_understood(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_weights_that_hold_no_edit_have_nothing_to_undo(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("undo", studied.files[0], studied.weights, studied.out()) == 2
    assert "do not hold the edit, so there is nothing to undo" in capsys.readouterr().err


def test_what_is_written_can_be_read_by_whoever_may_read_other_files(studied: Studied, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert run("apply", studied.files[0], studied.weights, studied.out()) == 0
    assert Path(studied.out()).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_show(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    run("apply", studied.files[0], "--alpha", "inf", studied.weights, studied.out())
    capsys.readouterr()
    assert run("show", studied.files[1]) == 0
    text = capsys.readouterr().out
    for fact in ("tench", "latent 1 at α = 1.5", "pool, read by 1", "two layers", studied.edit_files[1].after[:12]):
        assert fact in text
    assert run("show", studied.run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "  00-church.json: church: suppress latent 0 at α = 0.5",
        "  01-tench.json: tench: suppress latent 1 at α = 1.5",
    ]
    assert run("show", studied.out(), studied.weights) == 0
    text = capsys.readouterr().out
    assert "holds 1 edit." in text
    assert "latent 0 at α = inf" in text
    assert "6 of 6 scaled, 6 closed" in text
    assert "holds no edits." in text


def test_a_files_text_does_not_steer_the_terminal(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(studied.files[0].read_text())
    studied.files[0].write_text(json.dumps({**record, "name": "\x1b[2Jchurch"}))
    assert run("show", studied.files[0]) == 0
    assert "?[2Jchurch" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_imports_nothing_heavy(studied: Studied) -> None:
    """Modules, not seconds: those depend on the machine."""
    code = (
        "import sys; from salve.editing.cli import main; assert 'torch' not in sys.modules; main(sys.argv[1:]); "
        "print(*({n.partition('.')[0] for n in sys.modules} | {n for n in sys.modules if n.startswith('salve.')}))"
    )
    arguments = ["apply", str(studied.run), "--edit", "church", "--out", str(studied.out())]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "torch" in imported
    heavy = {"torchvision", "timm", "pytorch_lightning", "lightning", "torchmetrics", "pandas", "scipy", "hydra", "PIL"}
    heavy |= {"salve.sae", "salve.features", "salve.backbones.load", "salve.editing.evaluation", "salve.run"}
    assert imported & heavy == set()
    helped = (
        "import sys; from salve.editing.cli import main\n"
        "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", helped], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_told_to_end_leaves_nothing_half_written(
    studied: Studied, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    def told(tensors: Any, path: Path, metadata: Any) -> None:
        save_file(tensors, path, metadata)
        signal.raise_signal(number)

    monkeypatch.setattr("safetensors.torch.save_file", told)
    with pytest.raises(SystemExit) as left:
        run("apply", studied.files[0], studied.weights, studied.out())
    assert left.value.code == status
    assert capsys.readouterr() == ("", "salve-edit: stopped; nothing half-written is left.\n")
    assert studied.left_as_it_was()
