"""From settings to objects; the only place that makes what settings name."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from salve.artifacts import Store
from salve.backbones import find_site, load_backbone, preset
from salve.backbones.load import Loaded
from salve.backbones.presets import Preset
from salve.data.base import ImageData
from salve.processes.progress import counted
from salve.processes.ranks import Ranks
from salve.processes.trainer import TrainerFactory
from salve.run.schema import Config
from salve.run.target import data_class, one_line, repr_of
from salve.stages import BackboneSettings, StageContext
from salve.types import UserError

log = logging.getLogger(__name__)


def build_context(
    config: Config, store: Store, logger: Callable[[str], Logger], console: Console, ranks: Ranks
) -> StageContext:
    """Everything the stages share, checked: data that can be read, weights that fit, a layer that is a site.

    Raises:
        UserError: one of these is not so.
    """
    # Its own lines say nothing about the run. It sets this level when it is imported.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    data = _data(config.data)
    # Built once here for its errors, remarks and preset; stages build their own, after seeding.
    loaded = _load(config.backbone, len(data.classes), data.outputs)
    site = find_site(loaded.model, config.layer)
    chosen = _preset(config.backbone, loaded.model, data.native_size)
    data.bind(chosen.preprocess)
    preprocessing = chosen.origin
    remarks = tuple(one for one in (*data.remarks(), loaded.remark) if one)
    log.info("Images: %s", preprocessing)
    for remark in remarks:
        log.warning("Caution: %s", remark)
    device = torch.device(ranks.accelerator, *(ranks.gpus or [])[:1])
    precision = _precision(config.trainer.precision, device)
    if config.sae.precision == "bf16" and _precision("auto", device) != "bf16-mixed":
        log.warning("sae.precision=bf16: this device does not compute in bf16, so float32 would be faster.")
    trainer_factory = TrainerFactory(
        ranks.accelerator, ranks.gpus, ranks.local_size, precision, logger, console.is_terminal, not console.is_terminal
    )

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        if not console.is_terminal:
            yield counted(what, total, log.info)
            return
        described = TextColumn("{task.description}", markup=False)
        columns = (described, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, advance=done)

    surroundings = (trainer_factory, device, progress, ranks, config.trainer.memory, precision)
    return StageContext(store, data, config.backbone, site.name, config.seed, *surroundings, preprocessing, remarks)


def check_job(config: Config) -> None:
    """What :func:`build_context` checks, without a device; quick for settings that share data and backbone with others.

    Raises:
        UserError: the data cannot be read, the weights do not fit, or the layer is no site.
    """
    plain = asdict(config)
    classes, outputs, native_size = _known(_checked_data, json.dumps(plain["data"], sort_keys=True))
    backbone = json.dumps(plain["backbone"], sort_keys=True)
    find_site(_known(_checked_model, backbone, classes, outputs, native_size), config.layer)


def _known(check: Callable[..., Any], *args: Any) -> Any:
    """What a cached check found out, or raised."""
    found = check(*args)
    if isinstance(found, UserError):
        raise found
    return found


@lru_cache(maxsize=64)
def _checked_data(settings: str) -> tuple[int, tuple[int, ...] | None, int] | UserError:
    """Number of classes, their outputs, and pixels; or what is wrong."""
    try:
        data = _data(json.loads(settings))
        return len(data.classes), data.outputs, data.native_size
    except UserError as error:
        return error


@lru_cache(maxsize=64)
def _checked_model(
    settings: str, classes: int, outputs: tuple[int, ...] | None, native_size: int
) -> nn.Module | UserError:
    """The backbone without its weights' values; or what is wrong."""
    backbone = BackboneSettings(**json.loads(settings))
    try:
        model = _load(backbone, classes, outputs).model
        _preset(backbone, model, native_size)
        return model.to("meta")
    except UserError as error:
        return error


def _data(settings: Any) -> ImageData:
    values: dict[str, Any] = asdict(settings) if is_dataclass(settings) else dict(settings)  # type: ignore[arg-type]
    target = values.pop("_target_")
    kind = data_class("data._target_", target)
    try:
        data = kind(**values)
    except UserError:
        raise
    except Exception as error:  # one's own constructor may raise anything
        raise UserError(
            f"data._target_={target} cannot be made with these settings of data ({one_line(repr_of(error))})."
        ) from error
    data.check()
    return data


def _load(settings: BackboneSettings, classes: int, outputs: tuple[int, ...] | None) -> Loaded:
    return load_backbone(settings.library, settings.name, settings.weights, classes, settings.args, outputs)


def _preset(settings: BackboneSettings, model: nn.Module, native_size: int) -> Preset:
    overrides = asdict(settings)["preprocess"]
    return preset(settings.library, settings.name, settings.weights, model, native_size, overrides, settings.args)


def _precision(setting: str, device: torch.device) -> str:
    """What Lightning computes in: ``auto`` is the fastest precision that the device computes in natively."""
    if setting == "16-mixed" and device.type == "cpu":
        log.warning("trainer.precision=16-mixed: there is no such thing on the CPU, which takes bf16-mixed instead.")
        return "bf16-mixed"
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    # Older torch cannot tell; float32 is then the safe answer.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"
