"""A run's folder that somebody sent is data: nothing that it names is run, and nothing is written where it says."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from salve.cli import main
from salve.data import ConceptsData
from salve.edit_settings import CompareSettings
from salve.integrity import sealed
from salve.processes.trainer import _Checkpoints
from salve.run import execute as execution
from salve.run.folder import RunFolder
from salve.run.schema import DATA, Config
from salve.run.stored import named_again
from salve.stages.compare import entries_of
from salve.sweep import summarise_sweep
from salve.sweep.jobs import make_runs
from salve.types import UserError
from tests import composing
from tests.integration.conftest import quiet_logging

Edit = Callable[[dict[str, Any]], None]
Salve = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def settings() -> Config:
    return composing.settings("data.train_per_class=8")


@pytest.fixture
def sent(settings: Config, tmp_path: Path) -> Callable[[Edit], Path]:
    """``sent(edit)``: the folder of a run whose settings somebody has edited."""

    def make(edit: Edit) -> Path:
        folder = RunFolder(tmp_path / "sent")
        stored = yaml.safe_load(folder.prepare(settings))
        edit(stored)
        (folder.path / "config.yaml").write_text(yaml.safe_dump(stored))
        return folder.path

    return make


@pytest.fixture
def salve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Salve:
    """``salve(*arguments)``: the command, in a folder of its own; its status and what it said on stderr."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["salve", *arguments])
        capsys.readouterr()
        with quiet_logging():
            try:
                main()
            except SystemExit as left:
                return int(left.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def refused(salve: Salve, folder: Path, *changes: str) -> str:
    """Repeats a run that must be refused in one sentence, and with nothing made; gives the sentence."""
    status, said = salve(f"rerun={folder}", *changes)
    assert status == 2, said
    assert said.startswith("salve: ")
    assert said.count("\n") == 1
    assert not list(Path().iterdir())  # where the command was given
    assert not (folder.parent / "proof").exists()
    return said


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# -- code


CALLS: dict[str, dict[str, Any]] = {
    "os.system": {"command": "mkdir {proof}"},
    "os.mkdir": {"path": "{proof}"},
    "posix.system": {"command": "mkdir {proof}"},
    "pathlib.os.mkdir": {"path": "{proof}"},
    "salve.data.folders.os.mkdir": {"path": "{proof}"},
    "salve.data.os.mkdir": {"path": "{proof}"},
    "shutil.copyfile": {"src": "{bomb}", "dst": "{proof}"},
    "subprocess.check_output": {"args": ["mkdir", "{proof}"]},
    "subprocess.Popen": {"args": ["mkdir", "{proof}"]},
    "builtins.exec": {"_args_": ["import os; os.mkdir('{proof}')"]},
    "pandas.read_pickle": {"filepath_or_buffer": "{bomb}"},
    "pickle.load": {"_args_": ["{bomb}"]},
    "torch.load": {"f": "{bomb}", "weights_only": False},
    "joblib.load": {"filename": "{bomb}"},
    "functools.partial": {"_args_": ["{bomb}"]},
    "salve.data.folders.FolderData": {"root": "x", "batch_size": 1},  # a class of salve's, by another name
    "sent_module.Data": {},
}


@pytest.mark.parametrize("target", CALLS)
def test_a_class_that_only_the_folder_names_is_neither_called_nor_imported(
    sent: Callable[[Edit], Path], salve: Salve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    (tmp_path / "sent_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'proof')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    given = json.dumps(CALLS[target]).replace("{proof}", f"{tmp_path}/proof").replace("{bomb}", f"{tmp_path}/bomb")
    folder = sent(lambda stored: stored.update(data={"_target_": target, **json.loads(given)}))
    said = refused(salve, folder)
    assert f"names the class data._target_={target}, which is none of salve's own" in said
    assert "sent_module" not in sys.modules


@pytest.mark.parametrize(
    "target", ["os.system", "salve.data.folders.os.mkdir", "builtins.exec", "torch.load", "shutil.copyfile"]
)
def test_what_is_no_class_of_images_is_not_called_though_it_is_typed(
    sent: Callable[[Edit], Path], salve: Salve, tmp_path: Path, target: str
) -> None:
    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    given = json.dumps(CALLS[target]).replace("{proof}", f"{tmp_path}/proof").replace("{bomb}", f"{tmp_path}/bomb")
    folder = sent(lambda stored: stored.update(data={"_target_": target, **json.loads(given)}))
    status, said = salve(f"rerun={folder}", f"data._target_={target}")
    assert (status, said.splitlines()[-1].startswith(f"salve: data._target_={target}")) == (2, True), said
    status, said = salve(f"data._target_={target}")
    assert (status, said.splitlines()[-1].startswith(f"salve: data._target_={target}")) == (2, True), said
    assert not (tmp_path / "proof").exists()


CALL = {"_target_": "os.system", "command": "mkdir proof"}


@pytest.mark.parametrize(
    ("key", "at"),
    [
        ("backbone.args.norm_layer", lambda stored: stored["backbone"]["args"].update(norm_layer=CALL)),
        ("data.splits.train", lambda stored: stored.update(data=images(splits={"train": CALL}))),
        ("data.classes.0", lambda stored: stored.update(data=images(classes=[CALL]))),
    ],
)
def test_below_the_data_nothing_names_a_class(sent: Callable[[Edit], Path], salve: Salve, key: str, at: Edit) -> None:
    assert f"{key}._target_=os.system: only data, callbacks and backbone name a class" in refused(salve, sent(at))


def a_number_for_a_key() -> dict[Any, Any]:
    return {3: 4}


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "builtins.exec", "sent_module.Mine", "pytorch_lightning.callbacks.ModelCheckpoint"),
        *("pytorch_lightning.callbacks.SpikeDetection", "pytorch_lightning.callbacks.callback.Callback"),
    ],
)
def test_a_callback_that_only_the_folder_names_is_neither_made_nor_imported(
    sent: Callable[[Edit], Path], salve: Salve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "sent_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'proof')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    folder = sent(lambda stored: stored.update(callbacks={"x": {"_target_": target, "command": "mkdir proof"}}))
    assert f"names the class callbacks.x._target_={target}, which is none of Lightning's" in refused(salve, folder)
    assert "sent_module" not in sys.modules


def test_a_callback_of_lightnings_or_one_that_is_named_again_is_made(
    sent: Callable[[Edit], Path], salve: Salve, made: list[tuple[Config, Path]]
) -> None:
    callbacks = {
        "mine": {"_target_": "my.Mine", "number": 3},
        "lr": {"_target_": "pytorch_lightning.callbacks.LearningRateMonitor"},
    }
    folder = sent(lambda stored: stored.update(callbacks=callbacks))
    assert "callbacks.mine._target_=my.Mine" in refused(salve, folder)
    assert salve(f"rerun={folder}", "callbacks.mine._target_=my.Mine") == (0, "")
    assert made[0][0].callbacks == callbacks


MONITOR = "pytorch_lightning.callbacks.LearningRateMonitor"


def images(**settings: Any) -> dict[str, Any]:
    return {
        **{"_target_": "salve.data.FolderData", "root": "x", "batch_size": 8, "num_workers": 0},
        **{"limit_per_class": None, "splits": None, "select_share": 0.5, "split_seed": 0},
        **{"classes": None, "outputs": None, "white": None},
        **settings,
    }


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{proof}]",
        "name: !!python/name:os.system",
        "name: !!python/object/new:os.mkdir [[{proof}]]",
    ],
)
def test_yaml_makes_no_objects(sent: Callable[[Edit], Path], salve: Salve, tmp_path: Path, text: str) -> None:
    folder = sent(lambda _: None)
    (folder / "config.yaml").write_text(text.replace("{proof}", str(tmp_path / "proof")))
    assert "could not determine a constructor" in refused(salve, folder)


def test_a_pickle_in_the_place_of_cifar_100_is_not_loaded(
    sent: Callable[[Edit], Path], salve: Salve, tmp_path: Path
) -> None:
    archive = tmp_path / "cifar" / "cifar-100-python"
    archive.mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (archive / name).write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    data = {
        **{"_target_": "salve.data.Cifar100Data", "root": str(archive.parent), "batch_size": 8, "num_workers": 0},
        **{"limit_per_class": None, "select_share": 0.5, "split_seed": 0, "download": False},
    }
    status, said = salve(f"rerun={sent(lambda stored: stored.update(data=data))}")
    assert status == 2
    assert "or a damaged one" in said
    assert not (tmp_path / "proof").exists()


def test_a_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "more": Bomb(tmp_path / "proof")}, tmp_path / "last.ckpt")
    for unsafe in (True, False, None):
        with pytest.raises(pickle.UnpicklingError):
            _Checkpoints().load_checkpoint(tmp_path / "last.ckpt", weights_only=unsafe)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights"])
def test_arguments_of_a_network_name_no_file_to_load(sent: Callable[[Edit], Path], salve: Salve, name: str) -> None:
    folder = sent(lambda stored: stored["backbone"]["args"].update({name: "bomb.pth"}))
    assert f"backbone.args.{name} cannot be set" in refused(salve, folder)


@pytest.mark.parametrize("name", ["local-dir:/tmp/net", "hf-hub:somebody/net", "hf_hub:somebody/net"])
def test_a_network_is_not_taken_from_a_place_that_only_the_folder_names(
    sent: Callable[[Edit], Path], salve: Salve, name: str
) -> None:
    folder = sent(lambda stored: stored["backbone"].update(name=name, library="timm", weights="imagenet"))
    assert f"backbone.name={name}, a place to load a network from" in refused(salve, folder)
    # A job of a sweep knows from the sweep's command that its user has named it.
    settings = RunFolder(folder).settings(classes=[name])
    assert settings.backbone.name == name
    assert named_again(settings) == {"backbone.name": name}


def test_a_network_of_somebodys_own_is_not_made_for_the_folder_alone(
    sent: Callable[[Edit], Path], salve: Salve, made: list[tuple[Config, Path]], tmp_path: Path
) -> None:
    own = {"_target_": "sent_module.Net", "library": "own", "name": "sent_module.Net", "args": {}}
    folder = sent(lambda stored: stored["backbone"].update(own))
    assert "names backbone._target_=sent_module.Net, which makes a network of somebody's own" in refused(salve, folder)
    assert "sent_module" not in sys.modules
    # As a name alone it is none, whatever else is named.
    sent(lambda stored: stored["backbone"].update(own, _target_=None))
    assert "backbone.library=own needs backbone._target_" in refused(salve, folder)
    sent(lambda stored: stored["backbone"].update(own, _target_=["x"]))
    refused(salve, folder)
    sent(lambda stored: stored["backbone"].update(own))
    for command in (["backbone._target_=sent_module.Net"], ["backbone._target_=my.Net"]):
        assert salve(f"rerun={folder}", *command) == (0, "")
        assert made[-1][0].backbone.name == command[0].partition("=")[2]
    # A job of a sweep knows from the sweep's command that its user has named it.
    settings = RunFolder(folder).settings(classes=["sent_module.Net"])
    assert named_again(settings) == {"backbone._target_": "sent_module.Net"}
    assert "sent_module" not in sys.modules


@pytest.mark.parametrize("name", ["somebody/net", "net", "/tmp/net"])
def test_a_network_of_transformers_is_not_taken_from_where_only_the_folder_says(
    sent: Callable[[Edit], Path], salve: Salve, name: str
) -> None:
    change = {"name": name, "library": "transformers", "weights": "pretrained"}
    folder = sent(lambda stored: stored["backbone"].update(change))
    assert f"backbone.name={name}, a place to load a network from" in refused(salve, folder)
    assert f"backbone.name={name}, a place" in refused(salve, folder, "backbone._target_=null")
    # Nor where the command changes only the library.
    sent(lambda stored: stored["backbone"].update(change, library="timm"))
    assert f"backbone.name={name}, a place" in refused(salve, folder, "backbone.library=transformers")
    sent(lambda stored: stored["backbone"].update(change))
    settings = RunFolder(folder).settings(classes=[name])
    assert named_again(settings) == {"backbone.name": name}


# -- texts


def test_texts_of_the_folder_are_not_looked_up(
    sent: Callable[[Edit], Path], salve: Salve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALVE_TEST_KEY", "the secret")
    folder = sent(lambda stored: stored["backbone"].update(weights="${oc.env:SALVE_TEST_KEY}"))
    assert "backbone.weights=${oc.env:SALVE_TEST_KEY} is neither random" in refused(salve, folder)
    folder = sent(lambda stored: stored.update(seed="${oc.decode:'3'}"))
    assert "could not be converted to Integer" in refused(salve, folder)
    for text in (
        "${oc.env:SALVE_TEST_KEY}",
        "a\\${b}",
        "x\\\\${name}",
        "${",
        "x\\",
        "${${seed}}",
        "x\\${oc.env:HOME}\\",
    ):
        folder = sent(lambda stored, text=text: stored.update(name=text))  # type: ignore[misc]
        assert RunFolder(folder).settings().name == text


def test_a_file_that_stands_for_more_than_fits_is_refused(sent: Callable[[Edit], Path], salve: Salve) -> None:
    folder = sent(lambda _: None)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (folder / "config.yaml").write_text("\n".join(lines))
    assert "cannot be read as settings" in refused(salve, folder)
    (folder / "config.yaml").write_text("data: &a [*a]")
    assert "cannot be read as settings" in refused(salve, folder)


BROKEN: dict[str, Edit] = {
    "no data": lambda stored: stored.pop("data"),
    "data is a list": lambda stored: stored.update(data=[1]),
    "data is empty": lambda stored: stored.update(data=None),
    "the class is a list": lambda stored: stored["data"].update(_target_=["os.system"]),
    "an unknown argument": lambda stored: stored["data"].update(_args_=["x"]),
    "a partial": lambda stored: stored["data"].update(_partial_=True),
    "another type": lambda stored: stored["data"].update(batch_size=["x"]),
    "no backbone": lambda stored: stored.update(backbone=None),
    "the backbone is a text": lambda stored: stored.update(backbone="x"),
    "the name of it is a list": lambda stored: stored["backbone"].update(name=["x"]),
    "callbacks are a list": lambda stored: stored.update(callbacks=["x"]),
    "a callback is a text": lambda stored: stored.update(callbacks={"x": "y"}),
    "the class of a callback is a list": lambda stored: stored.update(callbacks={"x": {"_target_": ["os.system"]}}),
    "a callback below a callback": lambda stored: stored.update(callbacks={"x": {"_target_": MONITOR, "y": CALL}}),
    "a Trainer's argument of another type": lambda stored: stored["trainer"].update(profiler=CALL),
    "no sae": lambda stored: stored.update(sae=None),
    "stages is a text": lambda stored: stored.update(stages="x"),
    "no stages": lambda stored: stored.update(stages=None),
    "strengths of texts": lambda stored: stored["edit"].update(alpha=["x"]),
    "missing": lambda stored: stored.update(name="???"),
    "no name": lambda stored: stored.update(name=None),
    "hydra": lambda stored: stored.update(hydra={"callbacks": {"x": CALL}}),
    "a key that is no text": lambda stored: stored.update(a_number_for_a_key()),
    "a day": lambda stored: stored.update(name=__import__("datetime").date(2026, 1, 1)),
}


@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_settings_that_are_none_are_one_sentence(sent: Callable[[Edit], Path], salve: Salve, edit: Edit) -> None:
    refused(salve, sent(edit))


def test_an_old_name_is_answered_with_the_new_one(sent: Callable[[Edit], Path], salve: Salve) -> None:
    folder = sent(lambda stored: stored["sae"].update(learn_shift=True))
    assert "sae.learn_shift is no setting; its name is sae.learn_b_dec." in refused(salve, folder)


@pytest.mark.parametrize("content", [b"3", b"- x", b"x", b"\xff\xfe", b"a: 2026-99-99", b"{" * 2000, b"a: [", b"\0"])
def test_a_file_that_holds_no_settings_is_one_sentence(
    sent: Callable[[Edit], Path], salve: Salve, content: bytes
) -> None:
    folder = sent(lambda _: None)
    (folder / "config.yaml").write_bytes(content)
    refused(salve, folder)


# -- places


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path]]:
    """Settings and folder of each run that is repeated, in place of the run."""
    runs: list[tuple[Config, Path]] = []

    def note(config: Config, folder: Path, *_: Any) -> None:
        runs.append((config, folder))
        (folder / "manifest.json").write_text(json.dumps(sealed({"artifacts": {}, "files": {}, "versions": {}})))

    monkeypatch.setattr(execution, "execute", note)
    return runs


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../../x", "..", "", "..\\x"])
def test_a_name_does_not_lead_out_of_the_results(sent: Callable[[Edit], Path], salve: Salve, name: str) -> None:
    for edit in (lambda stored: stored.update(name=name), lambda stored: stored["sweep"].update(name=name)):
        assert "must be a name, or a path below output_dir" in refused(salve, sent(edit))


@pytest.mark.parametrize("name", ["../../x", "/tmp/x"])
def test_a_typed_name_does_not_either(salve: Salve, name: str) -> None:
    for command in ([f'name="{name}"'], [f'sweep.name="{name}"'], ["-m", "seed=0,1", f'sweep.name="{name}"']):
        status, said = salve(*command)
        assert (status, said.count("\n")) == (2, 1), said
        assert "must be a name, or a path below output_dir" in said
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_where_results_go_and_what_is_sent_or_fetched_is_the_callers(
    sent: Callable[[Edit], Path], salve: Salve, made: list[tuple[Config, Path]], tmp_path: Path
) -> None:
    def edit(stored: dict[str, Any]) -> None:
        stored["output_dir"] = str(tmp_path / "proof")
        stored["logger"].update(kind="wandb", entity="somebody", project="theirs")
        stored["data"] = {**images(root=str(tmp_path)), "_target_": "salve.data.ImagenetteData", "size": "160px"}
        stored["data"]["download"] = True

    (tmp_path / "train").mkdir()
    for split in ("train", "val"):
        for name in ("n01440764", "n02102040"):
            (tmp_path / split / name).mkdir(parents=True)
    folder = sent(edit)
    assert salve(f"rerun={folder}") == (0, "")
    typed = ["output_dir=mine", "logger.kind=wandb", "data.download=true"]
    assert salve(f"rerun={folder}", *typed) == (0, "")
    assert not (tmp_path / "proof").exists()
    (usual, _), (wanted, _) = made
    assert (usual.output_dir, usual.logger.kind, usual.logger.entity, usual.data.download) == (
        *("outputs", "csv", None),
        False,
    )
    assert (wanted.output_dir, wanted.logger.kind, wanted.logger.entity, wanted.data.download) == (
        *("mine", "wandb", None),
        True,
    )
    assert [place.parts[:3] for _, place in made] == [("outputs", "runs", "quickstart"), ("mine", "runs", "quickstart")]


def test_ones_own_class_is_made_when_it_is_named_again(
    sent: Callable[[Edit], Path],
    salve: Salve,
    made: list[tuple[Config, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = sent(lambda stored: stored.update(data={"_target_": "my.Data", "batch_size": 3}))
    refused(salve, folder)
    assert salve(f"rerun={folder}", "data._target_=my.Data") == (0, "")
    assert made[0][0].data == {"_target_": "my.Data", "batch_size": 3}


def test_a_damaged_manifest_is_said_before_the_run_is_repeated(
    sent: Callable[[Edit], Path], salve: Salve, made: list[tuple[Config, Path]]
) -> None:
    folder = sent(lambda _: None)
    for text in ("", "[]", "{}", '{"artifacts": {"sae": 3}, "versions": {}}', '{"artifacts": {}, "versions": 3}'):
        (folder / "manifest.json").write_text(text)
        said = refused(salve, folder)
        assert "is damaged" in said
        assert "manifest.json" in said
    assert not made
    (folder / "manifest.json").write_text(json.dumps(sealed({"artifacts": {}, "files": {}, "versions": {}})))
    (folder / "metrics.json").write_text("{}")
    assert salve(f"rerun={folder}") == (0, "")


def test_changes_that_are_none_are_one_sentence(sent: Callable[[Edit], Path], salve: Salve) -> None:
    folder = sent(lambda _: None)
    assert "sae.sparsity=1,2 names several values" in refused(salve, folder, "sae.sparsity=1,2")
    assert "backbone.args names a group" in refused(salve, folder, "backbone.args={_target_: os.system}")
    assert "must be a name, or a path below output_dir" in refused(salve, folder, "name=../x")


# -- sweeps


def test_a_job_makes_the_classes_that_its_command_names(
    sent: Callable[[Edit], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sent(lambda stored: stored["data"].update(_target_="my.Data"))
    runs: list[Config] = []
    monkeypatch.setattr("salve.sweep.jobs.execute", lambda config, *_, **__: runs.append(config))
    make_runs(folder.parent, [folder.name], ["other.Data"])
    assert "names the class data._target_=my.Data" in RunFolder(folder).reason()
    make_runs(folder.parent, [folder.name], ["my.Data"])
    assert [config.data["_target_"] for config in runs] == ["my.Data"]


def test_a_job_makes_the_callbacks_that_its_command_names_and_says_how_to_repeat_its_run(
    sent: Callable[[Edit], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sent(lambda stored: stored.update(callbacks={"x": {"_target_": "my.Mine"}, "y": {"_target_": MONITOR}}))
    commands: list[str] = []
    monkeypatch.setattr("salve.sweep.jobs.execute", lambda config, path, command, *_, **__: commands.append(command))
    make_runs(folder.parent, [folder.name])
    assert "names the class callbacks.x._target_=my.Mine" in RunFolder(folder).reason()
    make_runs(folder.parent, [folder.name], ["my.Mine"])
    [command] = commands
    assert command.endswith(""" 'callbacks.x._target_="my.Mine"'""")


def test_the_plan_of_a_sweep_names_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "other").mkdir()
    for key in ("../other", str(tmp_path / "other"), "..", "a/b", ""):
        (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"runs": {key: {"swept": {}}}}))
        with pytest.raises(UserError, match=r"sweep\.json cannot be read as the plan of a sweep"):
            summarise_sweep(tmp_path / "sweep")


def test_a_lock_that_is_a_link_leaves_what_it_leads_to_alone(tmp_path: Path) -> None:
    sweep, precious = tmp_path / "sweep", tmp_path / "precious"
    (sweep / "abc").mkdir(parents=True)
    (sweep / ".locks").mkdir()
    precious.write_text("all of it")
    (sweep / ".locks" / "abc.lock").symlink_to(precious)
    (sweep / "sweep.json").write_text(json.dumps({"runs": {"abc": {"swept": {}}}}))
    (sweep / "abc" / "running.json").write_text("{}")
    summarise_sweep(sweep)
    assert precious.read_text() == "all of it"


def test_the_classes_that_are_trusted_are_salves_own() -> None:
    assert set(DATA) == {f"salve.data.{name}Data" for name in ("Concepts", "Folder", "Imagenette", "Table", "Cifar100")}
    assert ConceptsData.__module__.startswith("salve.data.")


@pytest.mark.parametrize("target", ["sent_module.Mine", "os.system", "salve.editing.methods.gate.Gate"])
@pytest.mark.parametrize(
    ("key", "at"),
    [
        ("edit.method", lambda stored, target: stored["edit"].update(method=target)),
        (
            "compare.variants.mine._target_",
            lambda stored, target: stored["compare"]["variants"].update(mine={"_target_": target}),
        ),
    ],
)
def test_an_edit_method_that_only_the_folder_names_is_neither_made_nor_imported(
    sent: Callable[[Edit], Path],
    salve: Salve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[tuple[Config, Path]],
    target: str,
    key: str,
    at: Callable[[Any, str], None],
) -> None:
    (tmp_path / "sent_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'proof')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    folder = sent(lambda stored: at(stored, target))
    assert f"names {key}={target}, which is none of salve's own" in refused(salve, folder)
    assert "sent_module" not in sys.modules
    more = ["edit.modes=[suppress]"] if key == "edit.method" else []
    assert salve(f"rerun={folder}", f"{key}={target}", *more) == (0, "")
    config, _ = made[0]
    assert named_again(config)[key] == target


@pytest.mark.parametrize("target", ["sent_module.Mine", "os.system"])
@pytest.mark.parametrize(
    ("key", "at"),
    [
        ("sae.variant", lambda stored, target: stored["sae"].update(variant=target)),
        ("measures.mine._target_", lambda stored, target: stored["measures"].update(mine={"_target_": target})),
        (
            "compare.variants.mine.sae.variant",
            lambda stored, target: stored["compare"]["variants"].update(
                mine={"method": "gate", "sae": {"variant": target}}
            ),
        ),
    ],
)
def test_neither_is_an_sae_nor_a_measure_that_only_the_folder_names(
    sent: Callable[[Edit], Path],
    salve: Salve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    key: str,
    at: Callable[[Any, str], None],
) -> None:
    (tmp_path / "sent_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'proof')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(salve, sent(lambda stored: at(stored, target)))
    assert f"names {key}={target}, which is none of salve's own" in said
    assert "sent_module" not in sys.modules


@pytest.mark.parametrize("name", ["sent_module.Mine", "os.system"])
def test_the_name_of_a_method_is_none_of_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Lists of names stand in stored settings, too: only ``_target_`` says that a class is meant."""
    (tmp_path / "sent_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'proof')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for settings in (CompareSettings([name], 4), CompareSettings(["a"], 4, {"a": {"method": name}})):
        with pytest.raises(UserError, match=f"={name} is no edit method"):
            entries_of(settings)
    assert "sent_module" not in sys.modules
    assert not (tmp_path / "proof").exists()
