"""Types of every setting: an unknown key or a wrong type is an error before anything starts."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from salve.stages import (
    BackboneSettings,
    DiscoverSettings,
    EditSettings,
    FinetuneSettings,
    SAESettings,
    ValidateSettings,
)
from salve.types import UserError

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
    val_per_class: int = MISSING
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


@dataclass
class ImagenetteConfig(FolderConfig):
    """Arguments of :class:`salve.data.ImagenetteData`."""

    _target_: str = "salve.data.ImagenetteData"
    size: str = MISSING
    download: bool = MISSING


@dataclass
class Cifar100Config(FolderConfig):
    """Arguments of :class:`salve.data.Cifar100Data`."""

    _target_: str = "salve.data.Cifar100Data"
    download: bool = MISSING


@dataclass
class TrainerSettings:
    """Where things run; the fields are those of Lightning's Trainer."""

    accelerator: str = MISSING
    devices: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING


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


def register() -> None:
    """Make the types known to Hydra; called by the entry point, not on import."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
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
        UserError: a value is missing, out of range or impossible together with another.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"No value was given for {', '.join(missing)}.")
    resolved = OmegaConf.to_object(config)
    assert isinstance(resolved, Config)
    _check(resolved)
    return resolved


def _check(config: Config) -> None:
    _among("stages", config.stages, STAGES)
    if not config.stages:
        raise UserError(f"stages is empty; choose from {', '.join(STAGES)}.")
    _among("edit.modes", config.edit.modes, ("suppress", "enhance"))
    _among("backbone.library", [config.backbone.library], ("torchvision", "timm"))
    _among("finetune.mode", [config.finetune.mode], ("auto", "full", "probe", "none"))
    _among("sae.variant", [config.sae.variant], ("linear_l1", "relu_l1", "topk"))
    _among("discover.select", [config.discover.select], ("margin", "largest"))
    _among("edit.scale", [config.edit.scale], ("unit", "max"))
    _among("edit.channels", [config.edit.channels], ("all", "aligned"))
    _among("logger.kind", [config.logger.kind], ("csv", "wandb"))
    _among("logger.mode", [config.logger.mode], ("online", "offline"))
    _among("trainer.accelerator", [config.trainer.accelerator], ("auto", "cpu", "gpu", "cuda"))
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} must lie between 0 and 2**32 − 1.")
    if not 0 < config.discover.threshold <= 1:
        raise UserError(f"discover.threshold={config.discover.threshold} must lie above 0 and at most at 1.")
    if config.sae.sparsity < 0:
        raise UserError(f"sae.sparsity={config.sae.sparsity} must not be negative.")
    if config.sae.variant == "topk" and not 1 <= (config.sae.k or 0) <= config.sae.dictionary_size:
        raise UserError(
            f"sae.variant=topk needs sae.k between 1 and sae.dictionary_size={config.sae.dictionary_size}, "
            f"not {config.sae.k}."
        )
    positive = {
        "sae.dictionary_size": config.sae.dictionary_size,
        "sae.batch_size": config.sae.batch_size,
        "sae.epochs": config.sae.epochs,
        "sae.learning_rate": config.sae.learning_rate,
        "finetune.epochs": config.finetune.epochs,
        "finetune.learning_rate": config.finetune.learning_rate,
        "discover.dominant": config.discover.dominant,
        "validate.top_images": config.validate.top_images,
        "validate.localise_images": config.validate.localise_images,
        "trainer.devices": config.trainer.devices,
    }
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"{key}={value} must be above 0.")
    alphas = config.edit.alpha
    if not alphas or alphas[0] != 0 or any(b <= a for a, b in pairwise(alphas)):
        raise UserError(f"edit.alpha must increase from 0, which is the model without an edit; it is {alphas}.")
    if alphas[-1] == float("inf") and "enhance" in config.edit.modes:
        raise UserError("edit.alpha holds an infinite strength, which can only suppress; set edit.modes=[suppress].")


def _among(key: str, values: list[str], choices: tuple[str, ...]) -> None:
    for value in values:
        if value not in choices:
            raise UserError(f"{key} has {value}, which is none of {', '.join(choices)}.")
