# SPDX-License-Identifier: MIT
"""The schema of all settings: an unknown key or a wrong type is an error before anything starts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from math import inf
from operator import attrgetter
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from salve.data_settings import MarkSettings
from salve.edit_settings import GATE, CompareSettings, EditSettings
from salve.repair_settings import AuditSettings, RepairSettings
from salve.run.allowed import (
    below,
    check_backbone,
    check_callbacks,
    check_data,
    check_evaluate,
    check_measures,
    input_path,
    of_stage,
    refuse_undecodable,
    results_folder,
)
from salve.run.explain import list_of_choices, no_setting
from salve.run.sources import with_defaults
from salve.settings import (
    BackboneSettings,
    CaptureSettings,
    DiscoverSettings,
    FinetuneSettings,
    SAESettings,
    TrainerSettings,
    ValidateSettings,
)
from salve.types import UserError
from salve.values import ABOVE_ZERO, LARGEST, SEED, OneOf, Takes, Unit, check_values

STAGES = ("finetune", "discover", "validate", "control", "diagnose", "compare", "audit", "repair", "report")


@dataclass
class ConceptsConfig:
    """Arguments of :class:`salve.data.ConceptsData`."""

    _target_: str = "salve.data.ConceptsData"
    batch_size: Annotated[int, Unit("images")] = MISSING
    num_workers: Annotated[int, Unit("processes")] = MISSING
    seed: int = MISSING
    image_size: Annotated[int, Unit("pixels")] = MISSING
    train_per_class: Annotated[int, Unit("images of a class")] = MISSING
    select_per_class: Annotated[int, Unit("images of a class")] = MISSING
    test_per_class: Annotated[int, Unit("images of a class")] = MISSING
    spurious_correlation: float = MISSING
    clutter: float = MISSING
    shortcut: str = "tag"
    defining_rate: float = 1.0
    min_crop_scale: float = 0.6


# Settings of type Any below: Hydra cannot override a typed mapping that is null.


@dataclass
class FolderConfig:
    """Arguments of :class:`salve.data.FolderData`."""

    _target_: str = "salve.data.FolderData"
    root: str = MISSING
    batch_size: Annotated[int, Unit("images")] = MISSING
    num_workers: Annotated[int, Unit("processes")] = MISSING
    limit_per_class: Annotated[int | None, Unit("images of a class and split")] = MISSING
    splits: Annotated[Any, Takes("a mapping from train, select and test to names of folders, or null")] = MISSING
    select_share: Annotated[float, Unit("of the held-out images of a class")] = MISSING
    split_seed: int = MISSING
    classes: Annotated[Any, Takes("a list of folders, or a mapping from folders to names, or null")] = MISSING
    outputs: Annotated[Any, Takes("`imagenet`, a path, or a mapping from folders to outputs, or null")] = MISSING
    white: Annotated[float | None, Unit("grey value")] = MISSING
    groups: str | None = None
    boxes: str | None = None


@dataclass
class ImagenetteConfig(FolderConfig):
    """Arguments of :class:`salve.data.ImagenetteData`."""

    _target_: str = "salve.data.ImagenetteData"
    size: str = MISSING
    download: bool = MISSING


@dataclass
class TableConfig:
    """Arguments of :class:`salve.data.TableData`."""

    _target_: str = "salve.data.TableData"
    root: str = MISSING
    table: Annotated[Any, Takes("a path, or a list of paths")] = MISSING
    file: str = MISSING
    label: str = MISSING
    split: str = MISSING
    attribute: str | None = MISSING
    batch_size: Annotated[int, Unit("images")] = MISSING
    num_workers: Annotated[int, Unit("processes")] = MISSING
    limit_per_class: Annotated[int | None, Unit("images of a class and split")] = MISSING
    classes: Annotated[Any, Takes("a list of values, or a mapping from values to names, or null")] = MISSING
    values: Annotated[Any, Takes("a mapping from values to names, or null")] = MISSING
    splits: Annotated[Any, Takes("a mapping from train, select and test to values, or null")] = MISSING
    select_share: Annotated[float, Unit("of the held-out images of a class")] = MISSING
    split_seed: int = MISSING
    outputs: Annotated[Any, Takes("`imagenet`, a path, or a mapping from values to outputs, or null")] = MISSING
    white: Annotated[float | None, Unit("grey value")] = MISSING
    object: str | None = None


@dataclass
class Cifar100Config:
    """Arguments of :class:`salve.data.Cifar100Data`."""

    _target_: str = "salve.data.Cifar100Data"
    root: str = MISSING
    batch_size: Annotated[int, Unit("images")] = MISSING
    num_workers: Annotated[int, Unit("processes")] = MISSING
    limit_per_class: Annotated[int | None, Unit("images of a class and split")] = MISSING
    select_share: Annotated[float, Unit("of the held-out images of a class")] = MISSING
    split_seed: int = MISSING
    download: bool = MISSING


#: salve's own data classes with their settings. Stored settings may name these and no others (salve.run.stored).
DATA: dict[str, Any] = {
    kind._target_: kind for kind in (ConceptsConfig, FolderConfig, ImagenetteConfig, TableConfig, Cifar100Config)
}

#: Their names.
DATA_NAMES: dict[str, str] = {
    "concepts": ConceptsConfig._target_,
    "folder": FolderConfig._target_,
    "imagenette": ImagenetteConfig._target_,
    "table": TableConfig._target_,
    "cifar100": Cifar100Config._target_,
}

#: Lightning's callbacks that stored settings may name: those that write no files of their own.
CALLBACKS = tuple(
    f"pytorch_lightning.callbacks.{name}"
    for name in (
        *("DeviceStatsMonitor", "EarlyStopping", "EMAWeightAveraging", "GradientAccumulationScheduler"),
        *("LearningRateMonitor", "ModelSummary", "RichModelSummary", "StochasticWeightAveraging"),
    )
)


@dataclass
class LoggerSettings:
    """Where metrics go."""

    kind: Annotated[str, OneOf("csv", "wandb")] = MISSING
    mode: Annotated[str, OneOf("online", "offline")] = "online"
    project: str = "salve"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class SearchSettings:
    """A search by Optuna in place of a grid.

    Attributes:
        trials: runs in all, those of earlier commands included.
        parallel: how many trials are proposed and run at once.
        objectives: measures in a run's ``metrics.json``, each with ``maximize`` or ``minimize``.
    """

    trials: Annotated[int, Unit("runs")]
    parallel: Annotated[int, Unit("runs")]
    objectives: dict[str, str]


@dataclass
class SweepSettings:
    """Settings of a sweep.

    Attributes:
        name: the sweep's folder under ``<output_dir>/sweeps``, and its group in W&B.
        search: None for a grid.
        sites: with ``layer=all``, how many sites at most, evenly over the network's depth; None for all of them.
    """

    name: str = MISSING
    search: SearchSettings | None = None
    sites: Annotated[int | None, ABOVE_ZERO, Unit("sites")] = None


@dataclass
class Config:
    """All settings of a run.

    Attributes:
        callbacks: callbacks of Lightning, each by a name of the user's own (docs/training.md).
    """

    name: str = MISSING
    stages: Annotated[list[str], OneOf(*STAGES)] = MISSING
    layer: str = MISSING
    seed: Annotated[int, SEED] = MISSING
    output_dir: str = MISSING
    data: Any = MISSING
    mark: MarkSettings = field(default_factory=MarkSettings)
    evaluate: list[Any] = field(default_factory=list)  # texts and mappings
    backbone: BackboneSettings = MISSING
    finetune: FinetuneSettings = MISSING
    sae: SAESettings = MISSING
    capture: CaptureSettings = MISSING
    discover: DiscoverSettings = MISSING
    validate: ValidateSettings = field(default_factory=lambda: ValidateSettings(*[MISSING] * 7))
    edit: EditSettings = field(default_factory=lambda: EditSettings(MISSING, MISSING, MISSING, MISSING))
    compare: CompareSettings = field(default_factory=lambda: CompareSettings(MISSING, MISSING))
    audit: AuditSettings = MISSING
    repair: RepairSettings = field(default_factory=lambda: RepairSettings(*[MISSING] * 6))
    trainer: TrainerSettings = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    logger: LoggerSettings = MISSING
    sweep: SweepSettings = MISSING


def register() -> None:
    """Register the schema and salve's resolvers with Hydra. Entry points call it; importing does not."""
    OmegaConf.register_new_resolver("salve.choices", list_of_choices, replace=True)
    OmegaConf.register_new_resolver("salve.home", results_folder, replace=True)
    OmegaConf.register_new_resolver("salve.below", below, replace=True)
    store = ConfigStore.instance()
    schema = OmegaConf.structured(Config)
    named = (schema.mark.rates, schema.mark.held_out_rates, schema.validate.concepts)
    for free in (schema.callbacks, schema.measures, schema.edit.args, schema.compare.variants, *named):
        OmegaConf.set_struct(free, False)  # so that callbacks.NAME._target_=CLASS needs no +
    store.store(name="config_schema", node=schema)
    sweeper = {"_target_": "hydra_plugins.salve_sweeper.SalveSweeper", "params": None}
    store.store(group="hydra/sweeper", name="salve", node=sweeper)
    for name, target in DATA_NAMES.items():
        store.store(group="data", name=f"{name}_schema", node=DATA[target])


def resolve(config: DictConfig) -> Config:
    """Turn composed settings into plain typed objects, and check them one by one and against each other.

    Raises:
        UserError: a key is no setting, or a value is missing, out of range or impossible together with another.
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
    of_data = {name: [one.name for one in fields(DATA[kind])[1:]] for name, kind in DATA_NAMES.items()}
    resolved.evaluate = with_defaults(resolved.evaluate, of_data)
    check_evaluate(resolved.evaluate)
    check_backbone(resolved.backbone)
    check_callbacks(resolved.callbacks)
    check_measures(resolved.measures)
    for key in ("name", "sweep.name"):
        below(key, attrgetter(key)(resolved))
    check_values(resolved)
    _check_together(resolved)
    resolved.output_dir = results_folder(resolved.output_dir)
    for group, name in PATHS:
        change_path(getattr(resolved, group), name, partial(input_path, f"{group}.{name}"))
    return resolved


#: Settings that may name a file or folder to read, as group and name.
PATHS = (*(("data", name) for name in ("root", "classes", "outputs", "groups", "boxes")), ("backbone", "weights"))


def change_path(settings: Any, name: str, change: Callable[[str], str]) -> None:
    """Change a path in settings that have it; a user's own data class has a mapping, perhaps without a root."""
    before = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    if isinstance(before, str):
        if isinstance(settings, dict):
            settings[name] = change(before)
        else:
            setattr(settings, name, change(before))


def _refuse_unknown(node: DictConfig, path: str = "") -> None:
    """Refuse a key that the schema does not have: ``+sae.foo=1`` adds one even to a typed node."""
    kind: Any = OmegaConf.get_type(node)
    known = [item.name for item in fields(kind)]
    for key in map(str, node):
        if key not in known:
            raise UserError(no_setting(f"{path}{key}", known))
        if is_dataclass(OmegaConf.get_type(node, key)):
            _refuse_unknown(node[key], f"{path}{key}.")


def _check_together(config: Config) -> None:
    """Check settings that depend on each other."""
    if config.sae.ensemble > 1 and config.trainer.devices != 1:
        raise UserError(
            f"sae.ensemble={config.sae.ensemble} trains SAEs together on one device; it cannot go with "
            f"trainer.devices={config.trainer.devices}."
        )
    if config.sae.ensemble > 1 and (names := of_stage(config.callbacks, "discover")):
        raise UserError(
            f"sae.ensemble={config.sae.ensemble} trains SAEs together, where callbacks.{next(iter(names))} would see "
            "all of them as one; set sae.ensemble=1, or give the callback _stages_: [finetune]."
        )
    config.sae.check()
    config.mark.check()
    if config.finetune.without and config.finetune.mode == "none":
        raise UserError(
            f"finetune.without={config.finetune.without} leaves images out of a training, but finetune.mode=none "
            "trains nothing; choose full or probe."
        )
    if config.edit.by_class and find_spec("pyarrow") is None:
        raise UserError("edit.by_class=true writes a Parquet file, which needs pyarrow: pip install 'salve[parquet]'.")
    if config.edit.method != GATE and config.edit.modes != ["suppress"]:
        raise UserError(f"edit.method={config.edit.method} can only suppress; set edit.modes=[suppress].")
    if config.edit.method == GATE and config.edit.args:
        raise UserError("The gate's settings are edit.scale and edit.channels; edit.args is for other edit methods.")
    alphas = config.edit.alpha
    if not alphas or alphas[0] != 0 or not all(a < b for a, b in pairwise(alphas)):
        raise UserError(f"edit.alpha must increase from 0, which is the model without an edit; it is {alphas}.")
    if beyond := [alpha for alpha in alphas if LARGEST < alpha < inf]:
        raise UserError(
            f"edit.alpha holds {beyond[0]:g}, more than float32 can hold: strengths go up to {LARGEST:.2g}, and inf "
            "closes every channel."
        )
    if alphas[-1] == inf and "enhance" in config.edit.modes:
        raise UserError("edit.alpha holds an infinite strength, which can only suppress; set edit.modes=[suppress].")
