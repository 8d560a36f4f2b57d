"""``salve-edit`` with additions: stacked with gates over several commands, shown, undone apart, and refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salve.editing import EditFile, apply_edit_files, save_edit_file
from salve.editing.cli import main
from tests.unit.addition_examples import bits, cast, network, several
from tests.unit.damages import cut_and_flipped, of_other_types
from tests.unit.test_edit_command import metadata

#: Names of the edit files in a run's folder.
GAS, CHURCH, STEERING, ABLATION, TUNING = (
    f"{name}.json" for name in ("00-gas-pump", "01-church", "02-steering", "03-ablation", "04-fine-tuning")
)


class Studied:
    """A run's folder with gates and additions, and a user's copy of the weights."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root, self.run = root, root / "run"
        (self.run / "edits").mkdir(parents=True)
        model = network(dtype)
        self.edit_files: list[EditFile] = several(model)
        for name, edit_file in zip((GAS, CHURCH, STEERING, ABLATION, TUNING), self.edit_files, strict=True):
            save_edit_file(edit_file, self.file(name))
        self.weights = root / "own.safetensors"
        save_file(cast(model.state_dict(), dtype), self.weights, {"format": "pt", "author": "me"})

    def file(self, name: str) -> Path:
        return self.run / "edits" / name

    def out(self, name: str = "out") -> Path:
        return self.root / f"{name}.safetensors"


@pytest.fixture
def studied(tmp_path: Path) -> Studied:
    return Studied(tmp_path)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def same(one: Path, other: Path) -> bool:
    return bits(load_file(one)) == bits(load_file(other)) and metadata(one) == metadata(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_apply_and_undo_give_back_bits_dtypes_and_metadata(tmp_path: Path, dtype: torch.dtype) -> None:
    studied = Studied(tmp_path, dtype)
    for name, edit_file in zip((STEERING, ABLATION, TUNING), studied.edit_files[2:], strict=True):
        assert run("apply", studied.file(name), studied.weights, studied.out("edited")) == 0
        expected = apply_edit_files([edit_file], load_file(studied.weights))
        assert bits(load_file(studied.out("edited"))) == bits(expected) != bits(load_file(studied.weights))
        assert run("undo", studied.file(name), studied.out("edited"), studied.out("restored")) == 0
        assert same(studied.out("restored"), studied.weights)


def test_edits_stack_over_several_commands_and_are_undone_apart(studied: Studied) -> None:
    names = (CHURCH, ABLATION, STEERING)
    held = ["--held", studied.run]
    assert run("apply", *map(studied.file, names), studied.weights, studied.out("together")) == 0
    expected = apply_edit_files([studied.edit_files[k] for k in (1, 3, 2)], load_file(studied.weights))
    assert bits(load_file(studied.out("together"))) == bits(expected)
    for order in itertools.permutations(names):
        now = studied.weights
        for k, name in enumerate(order):
            more = held if k else []
            assert run("apply", studied.file(name), now, studied.out(f"step-{k}"), *more) == 0
            now = studied.out(f"step-{k}")
        assert same(now, studied.out("together"))
        for k, name in enumerate(order):
            assert run("undo", studied.file(name), now, studied.out(f"back-{k}"), *held) == 0
            now = studied.out(f"back-{k}")
            left = [studied.file(other) for other in order[k + 1 :]]
            assert not left or run("apply", *left, studied.weights, studied.out("left")) == 0
            assert same(now, studied.out("left") if left else studied.weights)


def test_the_edit_file_of_what_stays_is_asked_for_by_name(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("apply", studied.file(CHURCH), studied.file(ABLATION), studied.weights, studied.out("both")) == 0
    capsys.readouterr()
    assert run("undo", studied.file(CHURCH), studied.out("both"), studied.out()) == 2
    assert capsys.readouterr().err == (
        "salve-edit: These weights hold the edit church: directional ablation at α = 0.5, which changes 2.weight too; "
        "give its edit file as well, with --held (in Python in held=[…]).\n"
    )
    assert not studied.out().exists()
    words = ["undo", studied.file(CHURCH), studied.out("both"), studied.out()]
    assert run(*words, "--held", studied.file(ABLATION)) == 0
    assert run("apply", studied.file(ABLATION), studied.weights, studied.out("alone")) == 0
    assert same(studied.out(), studied.out("alone"))
    # All that is held is undone with nothing more.
    assert run("undo", studied.run, studied.out("both"), studied.out("restored")) == 0
    assert same(studied.out("restored"), studied.weights)


def test_only_edits_that_are_listed_can_be_named_as_held(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("apply", studied.file(CHURCH), studied.weights, studied.out("edited")) == 0
    for weights in (studied.out("edited"), studied.weights):
        words = ["apply", studied.file(GAS), weights, studied.out()]
        assert run(*words, "--held", studied.file(ABLATION)) == 2
        said = capsys.readouterr().err
        assert f"{weights} does not list the edit of {studied.file(ABLATION)}, which was given with --held" in said
    assert run("apply", studied.file(GAS), studied.weights, studied.out(), "--held", studied.run) == 2
    assert f"holds no edit of {studied.run}" in capsys.readouterr().err
    assert not studied.out().exists()
    # A gate that the weights hold at another strength is no reason to refuse.
    assert run("apply", studied.file(GAS), "--alpha", "2", studied.weights, studied.out("at-2")) == 0
    assert run("apply", studied.file(ABLATION), studied.out("at-2"), studied.out(), "--held", studied.run) == 0


def test_edits_of_a_runs_folder_are_listed_and_chosen_by_name(
    studied: Studied, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", studied.run) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == [
        "  00-gas-pump.json: gas pump: suppress latent 0 at α = 0.5",
        "  01-church.json: church: suppress latent 1 at α = 1.5",
        "  02-steering.json: tench: steering at α = 1",
        "  03-ablation.json: church: directional ablation at α = 0.5",
        "  04-fine-tuning.json: fine-tuning at α = 1",
    ]
    for name, index in (("tench", 2), ("03-ablation", 3), ("fine-tuning", 4)):
        assert run("apply", studied.run, "--edit", name, studied.weights, studied.out()) == 0
        expected = apply_edit_files([studied.edit_files[index]], load_file(studied.weights))
        assert bits(load_file(studied.out())) == bits(expected)
    assert run("apply", studied.run, "--edit", "church", studied.weights, studied.out("x")) == 2
    assert "could be 01-church or 03-ablation" in capsys.readouterr().err


def test_show(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    edit_file = studied.edit_files[3]
    assert run("show", studied.file(ABLATION)) == 0
    text = capsys.readouterr().out
    for fact in ("church", "directional ablation at α = 0.5", "2.bias, 2.weight (28 numbers)", "pool", "two layers"):
        assert fact in text
    assert edit_file.before[:12] in text
    assert edit_file.after[:12] in text
    assert run("apply", studied.file(ABLATION), studied.file(GAS), studied.weights, studied.out()) == 0
    capsys.readouterr()
    assert run("show", studied.out()) == 0
    text = capsys.readouterr().out
    assert "holds 2 edits." in text
    assert "directional ablation at α = 0.5" in text
    assert "suppress  latent 0 at α = 0.5" in text


def test_what_an_addition_refuses_before_anything_is_written(
    studied: Studied, capsys: pytest.CaptureFixture[str]
) -> None:
    steering = studied.file(STEERING)
    changes = steering.with_name(json.loads(steering.read_text())["changes"])
    record = json.loads(steering.read_text())
    for words, reason in (
        (["apply", steering, studied.weights, studied.out(), "--alpha", "2"], "cannot be set to α = 2"),
        (["apply", steering, studied.weights, changes], "a file that edit files need"),
        (["undo", steering, studied.weights, studied.out()], "nothing to undo"),
    ):
        assert run(*words) == 2
        assert reason in capsys.readouterr().err
        assert not studied.out().exists()
    (studied.run / "far").mkdir()
    changes.rename(studied.run / "far" / changes.name)
    steering.write_text(json.dumps({**record, "changes": f"../far/{changes.name}"}))
    assert run("apply", steering, studied.weights, studied.out()) == 2
    assert f"changes must be {changes.name}" in capsys.readouterr().err
    steering.write_text(json.dumps(record))
    assert run("apply", steering, studied.weights, studied.out()) == 2
    assert "it must lie beside it" in capsys.readouterr().err
    assert not studied.out().exists()


def test_a_lost_list_of_edits(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("apply", studied.file(CHURCH), studied.file(TUNING), studied.weights, studied.out("edited")) == 0
    torch.save(load_file(studied.out("edited")), studied.root / "edited.pt")
    assert run("undo", studied.file(TUNING), studied.root / "edited.pt", studied.out()) == 2
    assert "does not list its edits: name all of them" in capsys.readouterr().err
    both = [studied.file(TUNING), studied.file(CHURCH)]
    assert run("undo", *both, studied.root / "edited.pt", studied.out()) == 0
    assert bits(load_file(studied.out())) == bits(load_file(studied.weights))


def test_damaged_edit_files_through_the_command(studied: Studied, capsys: pytest.CaptureFixture[str]) -> None:
    """With any damage: status 2, a sentence and no file written; or the right edit."""
    file = studied.file(ABLATION)
    whole, record = file.read_bytes(), json.loads(file.read_text())
    assert run("apply", file, studied.weights, studied.out("good")) == 0
    good, refused = bits(load_file(studied.out("good"))), 0
    free = {"name", "backbone", "site", "method", "alpha"}  # what these say is for people
    texts = [(name, text.encode("utf-8", "surrogatepass")) for name, text in of_other_types(record)]
    for name, content in [*cut_and_flipped(whole), *texts]:
        file.write_bytes(content)
        if run("apply", file, studied.weights, studied.out()) == 0:
            assert bits(load_file(studied.out())) == good, name
            assert name.split(" ")[0] in free or name.startswith(("bit", "goes on")), name
            studied.out().unlink()
            capsys.readouterr()
            continue
        refused += 1
        said = capsys.readouterr().err
        assert said.startswith("salve-edit: "), name
        assert said.count("\n") == 1, name
        assert len(said) < 2500, name
        assert not studied.out().exists(), name
    assert refused > 250
