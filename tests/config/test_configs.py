"""Every file of settings composes and means what it says; what cannot be is refused before any work starts."""

import copy
import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import cache
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from salve.cli import main
from salve.data.transforms import Preprocess
from salve.editing.methods import METHODS, make_method
from salve.run.explain import conf_dir
from salve.run.schema import STAGES, Config, register, resolve
from salve.settings import PreprocessSettings
from salve.stages.compare import entries_of
from salve.sweep.plan import refuse_idle_axis
from salve.types import UserError
from tests.composing import changed, settings

CONF = conf_dir()
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
#: Values for settings that only a user can give.
GIVEN = {"data.root": "some/folder", "backbone.name": "resnet10t", "backbone._target_": "my.net"}
#: Values that follow from what the user gives.
FOLLOWS = {("backbone/own", "backbone.name"): GIVEN["backbone._target_"]}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def _rounds() -> list[tuple[str, ...]]:
    """Files that are composed together, since each composition takes long: those that set only their own group."""
    groups: dict[str, list[str]] = {}
    for file in FILES:
        groups.setdefault(file.partition("/")[0], []).append(file)
    alone = [(file,) for group in ("config", "experiment", "sweep", "cluster") for file in groups.pop(group)]
    return [*alone, *(tuple(filter(None, files)) for files in zip_longest(*groups.values()))]


ROUNDS = _rounds()


@cache
def composed(files: tuple[str, ...]) -> DictConfig:
    """What Hydra composes with files chosen, its own settings included; read only."""
    choices = [file.replace("/", "=", 1) for file in files if "/" in file]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=choices, return_hydra_config=True)
    except HydraException as error:
        if files[0].startswith("cluster/") and "hydra/launcher" in str(error):
            pytest.skip(f"the launcher of {choices[0]} is not installed: {str(error).splitlines()[0]}")
        raise


def with_file(file: str) -> DictConfig:
    """What Hydra composes with a file chosen, and perhaps with files of other groups."""
    return copy.deepcopy(composed(next(files for files in ROUNDS if file in files)))


@cache
def chosen(files: tuple[str, ...]) -> Config:
    """The settings with files chosen, and with values for what they leave to the user."""
    config = copy.deepcopy(composed(files))
    with open_dict(config):
        del config.hydra
    # Where the schema has a value, ??? leaves it as it is.
    missing = OmegaConf.missing_keys(config) | {
        key for file in files for key, value in leaves({file.partition("/")[0]: read(file)}).items() if value == "???"
    }
    assert missing <= GIVEN.keys(), f"{files} leave {missing} to the user: give the test values for them"
    for key in missing:
        OmegaConf.update(config, key, GIVEN[key])
    return resolve(config)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """A nested mapping by dotted path; an empty one is a value."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        leaf: value
        for key, child in tree.items()
        for leaf, value in leaves(child, f"{path}.{key}" if path else str(key)).items()
    }


@cache
def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{file}.yaml").read_text(encoding="utf-8"))


def is_global(file: str) -> bool:
    """Whether a file sets more than its own group."""
    text = (CONF / f"{file}.yaml").read_text(encoding="utf-8")
    return file == "config" or text.startswith("# @package _global_")


# -- every file


def test_there_are_files_of_every_kind() -> None:
    groups = {file.partition("/")[0] for file in FILES}
    assert {"config", "backbone", "data", "edit", "experiment", "finetune", "logger", "sae", "trainer"} <= groups
    wanted = {"resnet18", "vit", "vit_b_16", "efficientnet_lite0"}
    assert wanted <= {file.rpartition("/")[2] for file in FILES if file.startswith("experiment/imagenette/")}


def test_every_file_is_in_a_round_and_sets_what_no_other_file_of_it_sets() -> None:
    assert sorted(file for files in ROUNDS for file in files) == FILES
    for files in ROUNDS:
        assert len({file.partition("/")[0] for file in files}) == len(files)
        assert len(files) == 1 or not any(is_global(file) for file in files)


@pytest.mark.parametrize("files", ROUNDS, ids=" ".join)
@pytest.mark.slow
def test_every_file_composes_and_its_values_arrive(files: tuple[str, ...]) -> None:
    found = leaves(asdict(chosen(files)))
    for file in files:
        content = {key: value for key, value in read(file).items() if key not in ("defaults", "hydra")}
        group = file.partition("/")[0]
        wanted = leaves(content if is_global(file) else {group: content})
        assert wanted or group == "cluster", f"{file} sets nothing"
        for key, value in wanted.items():
            got: Any = found.get(key)
            if (file, key) in FOLLOWS:
                value = FOLLOWS[file, key]
            elif value == "???":
                value = GIVEN[key]
            elif isinstance(value, str) and "${" in value:
                got, value = str(got), re.sub(r"\$\{([\w.]+)\}", lambda named: str(found[named[1]]), value)
            assert value == {} or (key in found and got == value), f"{file} sets {key} to {value}, but a run gets {got}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("experiment/")])
@pytest.mark.slow
def test_an_experiment_chooses_what_it_names(file: str) -> None:
    config = with_file(file)
    choices = config.hydra.runtime.choices
    for item in read(file).get("defaults", []):
        if isinstance(item, dict):
            ((group, choice),) = item.items()
            assert choices[group.removeprefix("override /")] == choice
    assert config.name != changed().name  # its runs do not land among the quickstart's


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("cluster/")])
def test_a_cluster_chooses_a_launcher_and_only_settings_that_it_has(file: str) -> None:
    name = file.partition("/")[2]
    config = with_file(file)
    launcher = get_class(config.hydra.launcher._target_)
    assert issubclass(launcher, Launcher)
    assert (name == "local") == (launcher.__name__ == "BasicLauncher")
    accepted = inspect.signature(launcher).parameters
    given = read(file).get("hydra", {}).get("launcher", {})
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        assert given.keys() <= accepted.keys()


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("sweep/") and file != "sweep/grid"])
def test_a_named_sweep_sweeps_what_there_is_into_a_folder_of_its_own(file: str) -> None:
    name = file.partition("/")[2]
    config = with_file(file)
    config.hydra.runtime.output_dir = "somewhere"  # which only a run knows
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.sweep.name == f"quickstart-{name}"
    assert config.hydra.sweep.dir == f"outputs/sweeps/quickstart-{name}"
    axes = config.hydra.sweeper.params
    assert axes
    groups = {file.partition("/")[0] for file in FILES}
    for override in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in axes.items()]):
        key = override.get_key_element()
        assert key in groups or OmegaConf.select(config, key) is not None
        refuse_idle_axis(key)
        assert override.is_sweep_override() or (key, override.value()) == ("layer", "all")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("data/")])
def test_data_settings_are_arguments_of_their_class(file: str) -> None:
    data = asdict(chosen(next(files for files in ROUNDS if file in files)))["data"]
    accepted = inspect.signature(get_class(data.pop("_target_"))).parameters
    assert data.keys() <= accepted.keys()


def test_overrides_of_the_preset_are_fields_of_the_preset() -> None:
    assert {item.name for item in fields(PreprocessSettings)} - {"squash"} == {item.name for item in fields(Preprocess)}


def test_the_default_is_the_embedded_data_on_random_weights() -> None:
    config = settings()
    assert type(config.data).__name__ == "ConceptsConfig"
    assert config.backbone.weights == "random"
    assert (config.sae.variant, config.sae.centre) == ("linear_l1", False)
    assert config.stages == ["finetune", "discover", "validate", "control", "diagnose", "report"]


def test_what_tests_compose_faster_is_what_hydra_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["sae=topk", "seed=3", "edit.alpha=[0,1]", "+backbone.args.channels=[8,8]", "data.image_size=32", "name=x"]
    found = changed(*given)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert found == compose("config", overrides=given)
        remembered: list[tuple[type, str]] = [
            (ConfigLoaderImpl, "_compose_config_from_defaults_list"),
            (ConfigRepository, "load_config"),
        ]
        for owner, name in remembered:
            monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
        assert found == compose("config", overrides=given)


def test_settings_are_plain_and_typed() -> None:
    config = settings("seed=3", "edit.alpha=[0,1]", "backbone.preprocess.mean=[0,0,1]")
    assert type(config) is Config
    assert type(config.edit.alpha) is list
    assert [type(alpha) for alpha in config.edit.alpha] == [float, float]
    assert type(config.backbone.args) is dict
    assert config.backbone.preprocess.mean == [0.0, 0.0, 1.0]


def test_every_edit_method_has_a_file_of_its_settings() -> None:
    files = {path.stem for path in (CONF / "edit").glob("*.yaml")} - {"default"}
    assert files == set(METHODS) - {"gate", "reconstruction"}  # the default, and a control without a strength
    for name in files:
        edit = chosen(next(files for files in ROUNDS if f"edit/{name}" in files)).edit
        assert edit.method == name
        assert make_method(name, edit.args).settings().keys() >= edit.args.keys()
    compared = settings().compare
    assert {name for name in METHODS if name not in compared.methods} == {
        "class_vector",
        "mapped_class_vector",
    }  # they need a file
    assert list(entries_of(compared)) == compared.methods


def test_arguments_of_a_backbone_are_free() -> None:
    config = settings("backbone=timm", "backbone.name=test_vit", "+backbone.args.img_size=98")
    assert config.backbone.args == {"img_size": 98}


# -- what cannot be, in the terms of Python


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["+sae.foo=1"], ["sae.foo", "sparsity", "dictionary_size"]),
        (["++sae.foo=1"], ["sae.foo", "sparsity"]),
        (["+foo=1"], ["foo", "stages", "layer"]),
        (["+backbone.preprocess.crop=3"], ["backbone.preprocess.crop", "squash"]),
        (["data=folder", "data.root=x", "+data.size=3"], ["data.size", "limit_per_class"]),
        (["data=folder"], ["data.root"]),
        (["backbone=timm"], ["backbone.name"]),
        (["layer=${nowhere}"], ["layer", "nowhere"]),
        (["stages=[discover,contrl]"], ["stages", "contrl", "control", "report"]),
        (["stages=[]"], ["stages", "empty", "finetune"]),
        (["backbone.library=keras"], ["backbone.library", "keras", "torchvision", "timm"]),
        (["finetune.mode=half"], ["finetune.mode", "half", "auto", "full", "probe", "none"]),
        (["sae.variant=dense"], ["sae.variant", "dense", "linear_l1", "relu_l1", "topk", "matryoshka"]),
        (["discover.select=best"], ["discover.select", "best", "margin", "largest"]),
        (["edit.modes=[suppress,remove]"], ["edit.modes", "remove", "suppress", "enhance"]),
        (["edit.modes=[]"], ["edit.modes", "empty", "suppress", "enhance"]),
        (["edit.scale=2"], ["edit.scale", "2", "unit", "max"]),
        (["edit.channels=some"], ["edit.channels", "some", "all", "aligned"]),
        (["logger.kind=tensorboard"], ["logger.kind", "tensorboard", "csv", "wandb"]),
        (["logger.mode=dryrun"], ["logger.mode", "dryrun", "online", "offline"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator", "tpu", "auto", "cpu", "gpu"]),
        (["trainer.precision=8"], ["trainer.precision", "8", "32-true", "bf16-mixed"]),
        (["seed=-1"], ["seed=-1", "negative"]),
        (["seed=4294967296"], ["seed=4294967296"]),
        (["discover.threshold=0"], ["discover.threshold", "above 0"]),
        (["discover.threshold=1.1"], ["discover.threshold", "at most 1"]),
        (["finetune.warmup=1.5"], ["finetune.warmup", "at most 1"]),
        (["finetune.label_smoothing=-0.1"], ["finetune.label_smoothing", "negative"]),
        (["finetune.weight_decay=-1"], ["finetune.weight_decay", "negative"]),
        (["finetune.without=[storm]", "finetune.mode=none"], ["finetune.without", "finetune.mode=none", "full"]),
        (["finetune.patience=0"], ["finetune.patience", "above 0"]),
        (["sae.sparsity=-1"], ["sae.sparsity", "negative"]),
        (["sae.sparsity=nan"], ["sae.sparsity"]),
        (["sae.learning_rate=inf"], ["sae.learning_rate"]),
        (["sae=topk", "sae.k=0"], ["sae.k", "1", "32", "0"]),
        (["sae=topk", "sae.k=33"], ["sae.k", "32", "33"]),
        (["sae=topk", "sae.k=null"], ["sae.k", "None"]),
        (["sae=batch_topk", "sae.k=33"], ["sae.k", "32", "33"]),
        (["sae=jumprelu", "sae.bandwidth=0"], ["sae.bandwidth", "above 0", "0"]),
        (["sae=jumprelu", "sae.bandwidth=null"], ["sae.bandwidth", "None"]),
        (["sae.bandwidth=1"], ["sae.bandwidth", "jumprelu", "linear_l1"]),
        (["sae=topk", "sae.prefixes=[0.5,1]"], ["sae.prefixes", "matryoshka", "topk"]),
        (["sae=matryoshka", "sae.prefixes=[0.5]"], ["sae.prefixes", "to 1", "0.5"]),
        (["sae=matryoshka", "sae.base=relu_l1"], ["sae.base=relu_l1", "batch_topk", "topk"]),
        (["sae=matryoshka", "sae.base=null"], ["sae.base=None", "batch_topk", "topk"]),
        (["sae.start=pca"], ["sae.start", "pca", "random", "data"]),
        (["sae.decoder=tied"], ["sae.decoder", "tied", "trained", "random"]),
        (["sae.decoder=random", "sae.start=data"], ["sae.decoder=random", "sae.start=data"]),
        (["sae.auxk=-1"], ["sae.auxk", "negative"]),
        (["sae.auxk=4"], ["sae.auxk=4", "topk, batch_topk, matryoshka", "linear_l1"]),
        (["sae=topk", "sae.auxk=33"], ["sae.auxk=33", "sae.dictionary_size=32"]),
        (["sae=topk", "sae.resample=5"], ["sae.resample=5", "linear_l1, relu_l1, gated", "topk"]),
        (["sae.warmup=0.5", "sae.decay=0.6"], ["sae.warmup=0.5", "sae.decay=0.6", "at most 1"]),
        (["sae.decay=-0.1"], ["sae.decay=-0.1", "negative"]),
        (["edit.evaluate=-1"], ["edit.evaluate", "negative"]),
        (["edit.alpha=[]"], ["edit.alpha", "0"]),
        (["edit.alpha=[1,2]"], ["edit.alpha", "0"]),
        (["edit.alpha=[0,2,1]"], ["edit.alpha", "increase"]),
        (["edit.alpha=[0,1,1]"], ["edit.alpha", "increase"]),
        (["edit.alpha=[0,nan]"], ["edit.alpha", "increase"]),
        (["edit.alpha=[0,inf]"], ["edit.alpha", "infinite", "suppress"]),
        *(
            ([f"{key}=0"], [f"{key}=0", "above 0"])
            for key in (
                *("sae.dictionary_size", "sae.batch_size", "sae.steps", "sae.epochs", "sae.learning_rate"),
                "finetune.epochs",
                *("finetune.learning_rate", "discover.dominant", "validate.top_images", "validate.localise_images"),
                *("trainer.devices", "trainer.memory"),
            )
        ),
        *(
            ([f"validate.{key}=-1"], [f"validate.{key}=-1", "negative"])
            for key in ("pictures", "random_latents", "faithfulness_steps", "maximisation_steps", "pointing_tolerance")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_what_cannot_be_is_one_sentence_with_the_key_and_the_choices(overrides: list[str], named: list[str]) -> None:
    config = changed(*overrides)
    with pytest.raises(UserError) as refused:
        resolve(config)
    message = str(refused.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert all(part in message for part in named)


def test_a_parquet_file_is_refused_where_nothing_can_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings("edit.by_class=true").edit.by_class
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'salve\[parquet\]'"):
        settings("edit.by_class=true")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["edit.alpha=[0,inf]", "edit.modes=[suppress]"], {"edit.alpha": [0, inf]}),
        (["edit.alpha=[0]"], {"edit.alpha": [0]}),
        (["finetune.patience=null"], {"finetune.patience": None}),
        (["validate.faithfulness_steps=0"], {"validate.faithfulness_steps": 0}),
        (["validate.random_latents=0", "validate.maximisation_steps=0"], {"validate.random_latents": 0}),
        (["sae=topk", "sae.k=32"], {"sae.k": 32}),
        (["sae=topk", "sae.auxk=32"], {"sae.auxk": 32}),
        (["sae=matryoshka", "sae.prefixes=[1]", "sae.base=topk"], {"sae.prefixes": [1.0]}),
        (["sae=gated", "sae.resample=10"], {"sae.resample": 10}),
        (["discover.threshold=1"], {"discover.threshold": 1}),
        (["edit.sets=[[1,2],[church]]"], {"edit.sets": [[1, 2], ["church"]]}),
        (["seed=4294967295"], {"seed": 2**32 - 1}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_at_the_edge_is_accepted(overrides: list[str], expected: dict[str, Any]) -> None:
    assert leaves(asdict(resolve(changed(*overrides)))).items() >= expected.items()


# -- what cannot be, on the command line


Salve = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Salve]:
    """``refused(*arguments)``: what the command says when it ends with status 2, having left no artifact."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["salve", f"output_dir={tmp_path}/out", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert not (tmp_path / "out" / "artifacts").exists()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        return shown.err.strip()

    yield run
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    HydraConfig.instance().cfg = None


def test_a_layer_that_is_no_site_lists_the_sites(refused: Salve) -> None:
    said = refused("backbone=resnet_small", "layer=nonsense")
    assert re.fullmatch(
        r"salve: layer=nonsense is no site of this ResNet; near it: .*global_pool \(last is the one that the head "
        r"reads; salve-sites lists all 11\)\.",
        said,
    )


def test_a_folder_that_is_not_there_is_named(refused: Salve) -> None:
    said = refused("data=folder", "data.root=no/such/folder")
    assert "\n" not in said
    assert said.startswith("salve: data.root=no/such/folder")
    assert "train/" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sae.foo=1"], ["sae.foo", "variant", "dictionary_size", "sparsity"]),
        (["foo=1"], ["foo", "stages", "layer", "backbone"]),
        (["+sae.foo=1"], ["sae.foo", "variant"]),
        (["backbone.preprocess.foo=1"], ["backbone.preprocess.foo", "squash", "size"]),
        (["data.foo=1"], ["data.foo", "train_per_class"]),
        (["backbone.args.img_size=32"], ["+backbone.args.img_size"]),
        (["sae=5"], ["sae=5 is no choice", "linear_l1", "relu_l1", "topk"]),
        (["sae.sparsity=1,2"], ["sae.sparsity=1,2 names several values", "salve -m", "sae.sparsity=[1,2]"]),
        (["hydra/launcher=submitit_x"], ["launcher submitit_x is not installed: pip install 'salve[slurm]'"]),
        (["sae=nonsense"], ["sae=nonsense", "linear_l1", "relu_l1", "topk"]),
        (["experiment=nonsense"], ["experiment=nonsense", "imagenette/resnet18", "imagenette/vit"]),
        (["sae.k=abc"], ["sae.k=abc must be a whole number"]),
        (["seed=1.5"], ["seed=1.5 must be a whole number"]),
        (["seed=null"], ["seed", "not Optional"]),
        (["stages=discover"], ["stages=discover", "list"]),
        (["edit.alpha=[0,a]"], ["edit.alpha=[0,a]: a must be a number"]),
        (["sae.k=[1"], ["[1"]),
        (["data=folder"], ["data.root"]),
        (["data.image_size=3"], ["data.image_size", "32"]),
        (["data._target_=no.such.thing"], ["no.such.thing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_a_wrong_argument_is_answered_with_what_would_be_right(
    refused: Salve, arguments: list[str], named: list[str]
) -> None:
    said = refused(*arguments)
    last = said.splitlines()[-1]
    assert last.startswith("salve: ")
    assert all(part in last for part in named)


@pytest.mark.slow
def test_help_teaches() -> None:
    """The one test through a process of its own: the command as a user has it."""
    done = subprocess.run([sys.executable, "-m", "salve.cli", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed: dict[str, set[str]] = {}
    for path in CONF.rglob("*/*.yaml"):
        group, _, name = path.relative_to(CONF).with_suffix("").as_posix().partition("/")
        listed.setdefault(group, set()).add(name)
    assert len(listed) == 12
    for group, names in listed.items():
        lines = re.findall(rf"^ +{group} +(.*)$", done.stdout, re.MULTILINE)  # a stage may have the group's name
        assert names in [set(line.split(", ")) for line in lines]
    commands = re.findall(r"^ +(salve(?: -m)?(?: \S+=\S+)*)$", done.stdout, re.MULTILINE)
    assert len(commands) == 4
    for stage in STAGES:
        assert re.search(rf"^ +{stage} +\w+", done.stdout, re.MULTILINE), f"{stage} is not explained"
    for command in commands:  # and what it proposes works
        overrides = [part.replace("FOLDER", "p").replace("FILE", "f") for part in command.split()[1:] if part != "-m"]
        swept = [re.sub(r"(=[^\[,]+),.*", r"\1", override) for override in overrides]
        assert settings(*swept).stages
