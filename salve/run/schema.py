"""Types of every setting: an unknown key or a wrong type is an error before anything starts."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from salve.run.explain import list_of_choices
from salve.settings import (
    BackboneSettings,
    Channels,
    DiscoverSettings,
    EditSettings,
    FinetuneMode,
    FinetuneSettings,
    Mode,
    Precision,
    SAESettings,
    Scale,
    Selection,
    ValidateSettings,
)
from salve.types import UserError
from salve.variants import TRAITS

STAGES = ("finetune", "discover", "validate", "control", "diagnose", "report")


@dataclass
class ConceptsConfig:
    """Arguments of :class:`salve.data.ConceptsData`."""

    _target_: str = "salve.data.ConceptsData"
    batch_size: int = MISSING
    num_workers: int = MISSING
    seed: int = MISSING
    image_size: int = MISSING
    train_per_class: int = MISSING
    select_per_class: int = MISSING
    test_per_class: int = MISSING
    spurious_correlation: float = MISSING
    clutter: float = MISSING


@dataclass
class FolderConfig:
    """Arguments of :class:`salve.data.FolderData`."""

    _target_: str = "salve.data.FolderData"
    root: str = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING
    limit_per_class: int | None = MISSING
    splits: Any = MISSING  # a typed mapping that is null cannot be given on the command line
    select_share: float = MISSING
    split_seed: int = MISSING
    classes: Any = MISSING
    outputs: Any = MISSING
    white: float | None = MISSING


@dataclass
class ImagenetteConfig(FolderConfig):
    """Arguments of :class:`salve.data.ImagenetteData`."""

    _target_: str = "salve.data.ImagenetteData"
    size: str = MISSING
    download: bool = MISSING


@dataclass
class Cifar100Config:
    """Arguments of :class:`salve.data.Cifar100Data`."""

    _target_: str = "salve.data.Cifar100Data"
    root: str = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING
    limit_per_class: int | None = MISSING
    select_share: float = MISSING
    split_seed: int = MISSING
    download: bool = MISSING


#: The classes of images that settings may name without being trusted, each with its settings.
DATA: dict[str, Any] = {
    kind._target_: kind for kind in (ConceptsConfig, FolderConfig, ImagenetteConfig, Cifar100Config)
}


@dataclass
class TrainerSettings:
    """Where things run; all fields but the last are those of Lightning's Trainer.

    Attributes:
        accelerator: auto, cpu, gpu or cuda. devices: on each node. strategy: with several devices, ``ddp_spawn`` starts
            their ranks, ``ddp`` finds them started by torchrun or SLURM, ``auto`` is either. precision: of fine-tuning.
        memory: GiB for the activations of a training, in each process; what does not fit is read from disk.
    """

    accelerator: str = MISSING
    devices: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING
    memory: float = MISSING


@dataclass
class LoggerSettings:
    """Where metrics go: ``csv``, or ``wandb`` with its settings."""

    kind: str = MISSING
    mode: str = "online"
    project: str = "salve"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class SearchSettings:
    """A search by Optuna in place of a grid.

    Attributes:
        trials: runs in all, those of earlier commands included. parallel: trials that are asked for, and run, at once.
        objectives: each measure of a run's ``metrics.json`` that counts, and ``maximize`` or ``minimize``.
    """

    trials: int
    parallel: int
    objectives: dict[str, str]


@dataclass
class SweepSettings:
    """What the runs of a sweep share.

    Attributes:
        name: the sweep's folder under ``<output_dir>/sweeps`` and its group in W&B. search: None for a grid.
        runs: keys of the runs that a job of the sweep makes; set by the sweep itself.
    """

    name: str = MISSING
    search: SearchSettings | None = None
    runs: list[str] = field(default_factory=list)


@dataclass
class Config:
    """All settings of a run."""

    name: str = MISSING
    stages: list[str] = MISSING
    layer: str = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    data: Any = MISSING
    backbone: BackboneSettings = MISSING
    finetune: FinetuneSettings = MISSING
    sae: SAESettings = MISSING
    discover: DiscoverSettings = MISSING
    validate: ValidateSettings = MISSING
    edit: EditSettings = MISSING
    trainer: TrainerSettings = MISSING
    logger: LoggerSettings = MISSING
    sweep: SweepSettings = MISSING


def register() -> None:
    """Make the types known to Hydra; called by the entry point, not on import."""
    OmegaConf.register_new_resolver("salve.choices", list_of_choices, replace=True)
    OmegaConf.register_new_resolver("salve.home", _results_folder, replace=True)
    OmegaConf.register_new_resolver("salve.below", below, replace=True)
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    sweeper = {"_target_": "hydra_plugins.salve_sweeper.SalveSweeper", "params": None}
    store.store(group="hydra/sweeper", name="salve", node=sweeper)
    for name, node in (
        ("concepts", ConceptsConfig),
        ("folder", FolderConfig),
        ("imagenette", ImagenetteConfig),
        ("cifar100", Cifar100Config),
    ):
        store.store(group="data", name=f"{name}_schema", node=node)


def resolve(config: DictConfig) -> Config:
    """The settings as plain typed objects, checked one by one and against each other.

    Raises:
        UserError: a key that is no setting; a value that is missing, out of range or impossible together with another.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise UserError(f"No value was given for {', '.join(missing)}.")
        _refuse_unknown(config)
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # such as an interpolation of a key that does not exist
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error
    assert isinstance(resolved, Config)
    _refuse_undecodable(asdict(resolved))
    _check_data(resolved.data)
    _check_args(resolved.backbone.args)
    _check(resolved)
    resolved.output_dir = _results_folder(resolved.output_dir)
    for group, name in PATHS:
        change_path(getattr(resolved, group), name, partial(_input_path, f"{group}.{name}"))
    return resolved


#: Where settings may name a file or folder that is read.
PATHS = (("data", "root"), ("data", "classes"), ("data", "outputs"), ("backbone", "weights"))


def change_path(settings: Any, name: str, change: Callable[[str], str]) -> None:
    """Change a path in settings, if they have it: one's own data may have no root, and take theirs as a mapping."""
    before = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    if isinstance(before, str):
        if isinstance(settings, dict):
            settings[name] = change(before)
        else:
            setattr(settings, name, change(before))


def _at_home(path: str) -> str:
    """A path whose ``~`` is the user's home: a shell leaves it in ``output_dir=~/x``, and libraries differ in it."""
    return os.path.expanduser(path)


def below(key: str, name: str) -> str:
    """A name that is used as a path under ``output_dir``, which it must not lead out of.

    Args:
        key: of the setting, for the message. name: its value.

    Raises:
        UserError: an absolute path, or one with a part ``..``.
    """
    parts = str(name).replace("\\", "/").split("/")
    if Path(str(name)).is_absolute() or not parts[0] or ".." in parts:
        raise UserError(f"{key}={name} must be a name, or a path below output_dir: neither absolute nor with .. in it.")
    return _decodable(key, str(name))


def _decodable(key: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no text, as the system hands them over
        shown = text.encode(errors="backslashreplace").decode()
        raise UserError(f"{key}='{shown}' is not UTF-8, and results could not be written: rename it.") from None
    return text


def _refuse_undecodable(value: Any, key: str = "") -> None:
    """Text that is not UTF-8 can be computed with, but not be written into results."""
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_undecodable(part, f"{key}.{name}".lstrip("."))
            _decodable(key, str(name))
    elif isinstance(value, list):
        for part in value:
            _refuse_undecodable(part, key)
    elif isinstance(value, str):
        _decodable(key, value)


def _check_data(data: Any) -> None:
    """Of the settings of data, only the first names a class: what is below is passed on as plain values."""
    settings = asdict(data) if is_dataclass(data) else data  # type: ignore[arg-type]
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise UserError("data says nothing of data._target_, the class that reads the images.")
    for name, value in settings.items():
        _refuse_class_in(value, f"data.{name}")


def _refuse_class_in(value: Any, key: str) -> None:
    for name, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if name == "_target_":
            raise UserError(
                f"{key}._target_={part}: only data itself names a class, and its settings are plain values."
            )
        _refuse_class_in(part, f"{key}.{name}")


#: Arguments of the libraries' constructors that say where weights come from, which ``backbone.weights`` alone says:
#: what it names is never unpickled.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")


def _check_args(args: dict[str, Any]) -> None:
    for name in SOURCES:
        if name in args:
            raise UserError(
                f"backbone.args.{name} cannot be set: backbone.weights says where the weights come from (random, "
                "imagenet or a file), and backbone.args how the network is built."
            )
    _refuse_class_in(args, "backbone.args")


def _results_folder(path: str) -> str:
    """Also where it is relative, and the folder that it is relative to has a name that is no text."""
    _decodable("output_dir", os.path.abspath(_at_home(path)))
    return _at_home(path)


def _input_path(key: str, path: str) -> str:
    """A run's settings are kept with whole paths, without links."""
    path = _at_home(path)
    if path and os.path.exists(path):
        _decodable(key, os.path.realpath(path))
    return path


def _refuse_unknown(node: DictConfig, path: str = "") -> None:
    """``+sae.foo=1`` puts a key even into a typed node, where it would do nothing."""
    kind: Any = OmegaConf.get_type(node)
    known = [item.name for item in fields(kind)]
    for key in map(str, node):
        if key not in known:
            settings = ", ".join(name for name in known if not name.startswith("_"))
            raise UserError(f"{path}{key} is no setting; {path.rstrip('.') or 'the top level'} has {settings}.")
        if is_dataclass(OmegaConf.get_type(node, key)):
            _refuse_unknown(node[key], f"{path}{key}.")


CHOICES = {
    "stages": STAGES,
    "backbone.library": ("torchvision", "timm"),
    "finetune.mode": get_args(FinetuneMode),
    "sae.variant": tuple(TRAITS),
    "sae.start": ("random", "data"),
    "sae.precision": get_args(Precision),
    "discover.select": get_args(Selection),
    "edit.modes": get_args(Mode),
    "edit.scale": get_args(Scale),
    "edit.channels": get_args(Channels),
    "logger.kind": ("csv", "wandb"),
    "logger.mode": ("online", "offline"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda"),
    "trainer.strategy": ("auto", "ddp_spawn", "ddp"),
    "trainer.precision": ("auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
}
ABOVE_ZERO = (
    *("sae.dictionary_size", "sae.batch_size", "sae.steps", "sae.epochs", "sae.learning_rate", "sae.ensemble"),
    *("finetune.epochs", "finetune.learning_rate", "finetune.patience"),
    *("discover.dominant", "discover.threshold", "validate.top_images", "validate.localise_images"),
    *("trainer.devices", "trainer.memory"),
)
NOT_NEGATIVE = (
    *(
        "sae.sparsity",
        "sae.auxk",
        "sae.resample",
        "sae.warmup",
        "sae.decay",
        "finetune.weight_decay",
        "finetune.warmup",
        "finetune.label_smoothing",
        "edit.evaluate",
    ),
    *("validate.pictures", "validate.pointing_tolerance", "validate.random_latents"),
    *("validate.faithfulness_steps", "validate.maximisation_steps"),
)
AT_MOST_ONE = ("discover.threshold", "sae.warmup", "sae.decay", "finetune.warmup", "finetune.label_smoothing")


def _check(config: Config) -> None:
    for key, choices in CHOICES.items():
        value = attrgetter(key)(config)
        for one in value if isinstance(value, list) else [value]:
            if one not in choices:
                raise UserError(f"{key} has {one}, which is none of {', '.join(choices)}.")
        if value == []:
            raise UserError(f"{key} is empty; choose from {', '.join(choices)}.")
    for keys, holds, rule in (
        (ABOVE_ZERO, lambda value: 0 < value < inf, "must be above 0"),
        (NOT_NEGATIVE, lambda value: 0 <= value < inf, "must not be negative"),
        (AT_MOST_ONE, lambda value: value <= 1, "must be at most 1"),
    ):
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and not holds(value):
                raise UserError(f"{key}={value} {rule}.")
    below("name", config.name)
    below("sweep.name", config.sweep.name)
    if config.sae.ensemble > 1 and config.trainer.devices != 1:
        raise UserError(
            f"sae.ensemble={config.sae.ensemble} trains SAEs together on one device; it cannot go with "
            f"trainer.devices={config.trainer.devices}."
        )
    for key in ("seed", "sae.seed"):
        if not 0 <= attrgetter(key)(config) < 2**32:
            raise UserError(f"{key}={attrgetter(key)(config)} must lie between 0 and 2**32 − 1.")
    config.sae.check()
    if config.edit.by_class and find_spec("pyarrow") is None:
        raise UserError("edit.by_class=true writes a Parquet file, which needs pyarrow: pip install 'salve[parquet]'.")
    alphas = config.edit.alpha
    if not alphas or alphas[0] != 0 or not all(a < b for a, b in pairwise(alphas)):
        raise UserError(f"edit.alpha must increase from 0, which is the model without an edit; it is {alphas}.")
    if alphas[-1] == inf and "enhance" in config.edit.modes:
        raise UserError("edit.alpha holds an infinite strength, which can only suppress; set edit.modes=[suppress].")
