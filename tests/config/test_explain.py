"""What the command line says of settings that it cannot read or find, and that its advice works."""

import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from salve.cli import main
from salve.run.explain import choices, conf_dir, explain, groups, list_of_choices, quoted
from salve.run.folder import RunFolder
from salve.run.schema import Config, register, resolve
from salve.run.target import data_class
from salve.sweep.plan import run_key
from salve.types import UserError

#: Values that a person may have, of which Hydra's grammar reads hardly one as it stands.
NASTY = (
    *(
        "/my/a=b",
        "epoch=3-step=100.ckpt",
        "x=",
        "=",
        "/a{b}",
        "{a}",
        "{a: b}",
        "}",
        "/a(b)",
        "(x)",
        "f(x)",
        "range(1,3)",
    ),
    *("choice(a,b)", "/a[b]", "[x]", "x[/y]", "]", "a#b", "#a", "a,b", ",", "/bilder/ü", "日本", "~/x", "my folder"),
    *(" lead", "trail ", "a'b", 'a"b', "'q'", '"q"', '"', "'", "a\\b", "a\\", "\\", '\\"', "a\\'b", 'a\\\\"b', "\\\\"),
    *("a$b", "${x}", "a${x}b", "\\${x}", "a\\\\${name}", "a:b", "a;b", "a&b", "a!b", "a^b", "a`b", "a|b", "a<b>", "*"),
    *("null", "true", "1", "1e3", "", "a\tb", "C:\\x\\", "-m", "--help", "a%b", "@x", "?"),
)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


# -- quoting


def test_advice_on_quoting_gives_the_users_own_value() -> None:
    wanted = {f"value{number}": value for number, value in enumerate(NASTY)}
    # What a shell makes of them; all at once, since Hydra takes long to compose.
    config = composed(*(f"+{argument}" for key in wanted for argument in shlex.split(quoted(f"{key}={wanted[key]}"))))
    assert {key: config[key] for key in wanted} == wanted


def test_a_real_shell_passes_the_advice_on() -> None:
    words = " ".join(quoted(f"name={value}") for value in NASTY)
    program = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:]))"
    shown = subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {words}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split("\0") == [shlex.split(quoted(f"name={value}"))[0] for value in NASTY]


@pytest.mark.parametrize("value", NASTY)
def test_what_hydra_cannot_read_is_answered_with_how_to_quote_it(value: str) -> None:
    argument = f"name={value}"
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        # What can be read is read; and null is what it says, no name at all.
        with pytest.raises(HydraException) as refused:
            composed(argument)
        assert value == "null" or f"write {quoted(argument)}." in explain(refused.value)


def test_a_list_that_cannot_be_read_is_no_text() -> None:
    with pytest.raises(HydraException) as refused:
        composed("edit.sets=[[a=b]]")
    assert "put double quotes around each text in it" in explain(refused.value)


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("stages=control", "a list, such as stages=[control]"),
        ("edit.alpha=3", "a list, such as edit.alpha=[3]"),
        ("validate.concepts=[img]", "a mapping, such as validate.concepts={NAME: img}"),
        ("sae.sparsity=abc", "a number"),
        ("sae.k=[2]", "a whole number"),
        ("trainer.devices=1.5", "a whole number"),
        ("edit.by_class=maybe", "true or false"),
    ],
)
def test_a_value_of_another_type_is_answered_with_what_the_setting_takes(argument: str, wanted: str) -> None:
    with pytest.raises(HydraException) as refused:
        composed(argument)
    assert explain(refused.value) == f"{argument} must be {wanted}."


def test_what_is_no_setting_at_all_is_not_quoted() -> None:
    with pytest.raises(HydraException) as refused:
        composed("quickstart")
    assert explain(refused.value).startswith("quickstart cannot be read; settings are given as key=value")


# -- the user's own files


OUR_DATA = ("celeba", "cifar100", "composed", "concepts", "folder", "imagenette", "table", "waterbirds")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's with ``data=mine`` and a group that only she has."""
    for name in ("data/mine", "data/deep/er", "paper/first", "hydra/mine"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", [["hydra.searchpath=[file://{}]"], ["--config-dir", "{}"], ["--config-dir={}"]])
def test_choices_include_the_users_own(own: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["salve", *(part.format(own) for part in given), "data=nothing"])
    assert choices("data") == sorted([*OUR_DATA, "deep/er", "mine"])
    assert groups() == [*groups_of_ours(), "paper"]
    assert "\n    paper       first" in list_of_choices()


def test_choices_include_those_of_the_users_own_main_file(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "mine.yaml").write_text("hydra: {searchpath: [pkg://salve_test_of_own/conf]}\n")
    (own / "salve_test_of_own/conf/sae").mkdir(parents=True)
    (own / "salve_test_of_own/conf/sae/new.yaml").write_text("{}\n")
    monkeypatch.syspath_prepend(own)
    monkeypatch.setattr(sys, "argv", ["salve", "-cd", str(own), "--config-name", "mine"])
    assert "new" in choices("sae")
    assert "mine" in choices("data")


def groups_of_ours() -> list[str]:
    return [
        *(
            "data",
            "mark",
            "backbone",
            "finetune",
            "sae",
            "edit",
            "trainer",
            "callbacks",
            "logger",
            "cluster",
            "sweep",
            "experiment",
        ),
    ]


def test_our_groups_are_the_folders_that_there_are() -> None:
    assert sorted(groups_of_ours()) == sorted({path.parent.name for path in conf_dir().glob("*/*")} & set(groups()))
    assert set(groups_of_ours()) == {path.name for path in conf_dir().iterdir() if path.is_dir()}


# -- the command as a whole


Salve = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Salve:
    """``refused(*arguments)``: what the command says when it ends with status 2; nothing of its run stays."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["salve", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert not list(tmp_path.rglob("runs/*"))
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def test_the_users_own_choice_is_named_on_the_command_line(own: Path, refused: Salve) -> None:
    said = refused(f"hydra.searchpath=[{own}]", "data=nothing")
    assert said == f"salve: data=nothing is no choice; data can be {', '.join(sorted([*OUR_DATA, 'deep/er', 'mine']))}."


def test_a_main_file_that_does_not_exist(refused: Salve) -> None:
    assert refused("--config-name", "nothing") == "salve: There is no file nothing.yaml among the settings."


@pytest.mark.parametrize("value", [None, "0", "1"])
@pytest.mark.slow
def test_hydra_full_error_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", value)
    for argument, kind in (("sae.foo=1", HydraException), ("sae.sparsity=-1", UserError)):
        monkeypatch.setattr(sys, "argv", ["salve", argument])
        with pytest.raises(kind if value == "1" else SystemExit) as ended:
            main()
        assert ("salve: sae." in capsys.readouterr().err) == (value != "1")
        if value == "1":
            assert len(ended.traceback) > 3  # of where it came from, and not of where it was caught
        assert os.environ.get("HYDRA_FULL_ERROR") == value
    assert not list(tmp_path.rglob("runs/*"))


def test_an_output_folder_that_cannot_be_made_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["salve", "output_dir=file/out"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("salve: ")
    assert "\n" not in said
    assert "file is a file, but must be a folder; remove it, or choose another one with output_dir=FOLDER" in said


# -- classes that are named in the settings


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such_thing.Data", "there is no module no_such_thing; is the folder that holds it on PYTHONPATH?"),
        (
            "salve.data.FolderDat",
            "the module salve.data is there, but has no class FolderDat; did you mean FolderData?",
        ),
        ("salve.data.Zzz", "the module salve.data is there, but has no class Zzz."),
        ("salve.nothing.Data", "there is no module salve.nothing."),
        ("salve_test_of_targets.needs.Data", "(ModuleNotFoundError: No module named 'no_such_dependency')"),
        ("salve_test_of_targets.wrong.Data", "is there, but cannot be imported (SyntaxError: "),
        ("salve_test_of_targets.good.number", "is a int, not a class."),
        ("salve_test_of_targets.good.function", "is a function, not a class."),
        ("salve_test_of_targets.good.Other", "is a class, but does not derive from salve.data.ImageData."),
        ("Data", "names no class; write package.module.Class."),
        ("a..b", "names no class; write package.module.Class."),
    ],
)
def test_a_target_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    package = tmp_path / "salve_test_of_targets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "needs.py").write_text("import no_such_dependency\n")
    (package / "wrong.py").write_text("class Data(\n")
    (package / "good.py").write_text(
        "from salve.data import ImageData\nnumber = 3\n\ndef function(): pass\nclass Other: pass\n"
        "class Data(ImageData): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"^data\._target_=") as refusal:
        data_class("data._target_", target)
    assert said in str(refusal.value)
    assert data_class("data._target_", "salve_test_of_targets.good.Data").__name__ == "Data"


def test_a_missing_module_leaves_no_run(refused: Salve) -> None:
    assert refused("data._target_=no_such_thing.Data").startswith(
        "salve: data._target_=no_such_thing.Data: there is no"
    )


def test_a_constructor_that_raises_is_a_sentence(
    refused: Salve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "salve_test_of_constructors.py").write_text(
        textwrap.dedent(
            """
            from salve.data import ImageData

            class Data(ImageData):
                def __init__(self, **settings):
                    raise RuntimeError("no disk\\nto read")
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = refused("data._target_=salve_test_of_constructors.Data")
    assert said.endswith("cannot be made with these settings of data (RuntimeError: no disk to read).")


# -- paths


def settings(*overrides: str) -> Config:
    return resolve(composed(*overrides))


def test_home_is_one_folder_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = settings("data=folder", 'output_dir="~/out"', 'data.root="~/images"', 'backbone.weights="~/w.pt"')
    assert config.output_dir == f"{tmp_path}/out"
    assert config.data.root == f"{tmp_path}/images"
    assert config.backbone.weights == f"{tmp_path}/w.pt"
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydras = compose("config", overrides=['output_dir="~/out"'], return_hydra_config=True).hydra
    assert str(hydras.run.dir).startswith(f"{tmp_path}/out/runs/")  # the folder that Hydra makes
    assert str(hydras.sweep.dir).startswith(f"{tmp_path}/out/sweeps/")


def test_a_run_can_be_repeated_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    (start / "images").mkdir(parents=True)
    (start / "w.pt").write_bytes(b"")
    elsewhere.mkdir()
    monkeypatch.chdir(start)
    config = settings("data=folder", "data.root=images", "backbone.weights=w.pt")
    key = run_key(config)
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config)
    assert (config.data.root, config.backbone.weights) == ("images", "w.pt")
    assert run_key(config) == key  # as given, from wherever

    monkeypatch.chdir(elsewhere)
    again = folder.settings()
    assert again.data.root == str(start / "images")
    assert again.backbone.weights == str(start / "w.pt")
    named = RunFolder(tmp_path / "named")
    named.prepare(settings("backbone.weights=imagenet"))
    assert named.settings().backbone.weights == "imagenet"


def test_a_change_of_a_rerun_that_cannot_be_read_is_answered_as_elsewhere(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings())
    with pytest.raises(UserError, match="some of its characters need quotes; write 'output_dir="):
        folder.settings(["output_dir=a=b"])


def test_an_error_that_is_the_cause_of_its_own_cause_is_explained() -> None:
    """As OmegaConf leaves it under a debugger."""
    error, cause = OmegaConfBaseException("what is wrong"), ValueError("why")
    error.__cause__, cause.__context__ = cause, error
    assert explain(error) == "what is wrong: why."
