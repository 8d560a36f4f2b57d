"""Types of every setting: an unknown key or a wrong type is an error before anything starts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from math import inf
from operator import attrgetter
from typing import Any, get_args

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from salve.run.allowed import below, check_args, check_data, input_path, refuse_undecodable, results_folder
from salve.run.explain import list_of_choices
from salve.settings import (
    LARGEST,
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
    TrainerSettings,
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
    """

    name: str = MISSING
    search: SearchSettings | None = None


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
    OmegaConf.register_new_resolver("salve.home", results_folder, replace=True)
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
    refuse_undecodable(asdict(resolved))
    check_data(resolved.data)
    check_args(resolved.backbone.args)
    for key in ("name", "sweep.name"):
        below(key, attrgetter(key)(resolved))
    _check(resolved)
    resolved.output_dir = results_folder(resolved.output_dir)
    for group, name in PATHS:
        change_path(getattr(resolved, group), name, partial(input_path, f"{group}.{name}"))
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
        (ABOVE_ZERO, lambda value: value > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        ((*ABOVE_ZERO, *NOT_NEGATIVE), lambda value: value <= LARGEST, f"must be at most {LARGEST:.2g}, as float32 is"),
        (AT_MOST_ONE, lambda value: value <= 1, "must be at most 1"),
    ):
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and not holds(value):
                raise UserError(f"{key}={value} {rule}.")
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
    if beyond := [alpha for alpha in alphas if LARGEST < alpha < inf]:
        raise UserError(
            f"edit.alpha holds {beyond[0]:g}, which float32 does not: strengths go up to {LARGEST:.2g}, and inf closes "
            "every channel."
        )
    if alphas[-1] == inf and "enhance" in config.edit.modes:
        raise UserError("edit.alpha holds an infinite strength, which can only suppress; set edit.modes=[suppress].")
