"""From settings to objects; the only place that instantiates."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from salve.artifacts import Store
from salve.backbones import find_site, load_backbone, preset
from salve.data.base import ImageData
from salve.data.transforms import Preprocess
from salve.run.ranks import Ranks
from salve.run.schema import Config
from salve.run.trainers import Trainers
from salve.stages import BackboneSettings, Job
from salve.types import UserError

log = logging.getLogger(__name__)


def build_job(config: Config, store: Store, logger: Callable[[str], Logger], console: Console, ranks: Ranks) -> Job:
    """Everything the stages share, checked: data that can be read, weights that fit, a layer that is a site.

    Raises:
        UserError: one of these is not so.
    """
    data = _data(config.data)
    # Built once here for its errors and its preset; stages build their own, after seeding.
    model = _model(config.backbone, len(data.classes))
    site = find_site(model, config.layer)
    data.bind(_preset(config.backbone, model, data.native_size))
    device = torch.device(ranks.accelerator, *(ranks.gpus or [])[:1])
    precision = _precision(config.trainer.precision, device)
    if config.sae.precision == "bf16" and _precision("auto", device) != "bf16-mixed":
        log.warning("sae.precision=bf16: this device does not compute in bf16, so float32 would be faster.")
    trainers = Trainers(ranks.accelerator, ranks.gpus, ranks.local_size, precision, logger, console.is_terminal)

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, advance=done)

    surroundings = (trainers, device, progress, ranks, config.trainer.memory)
    return Job(store, data, config.backbone, site.name, config.seed, *surroundings)


def check_job(config: Config) -> None:
    """What :func:`build_job` checks, without a device; quick for settings that share data and backbone with others.

    Raises:
        UserError: the data cannot be read, the weights do not fit, or the layer is no site.
    """
    plain = asdict(config)
    classes, native_size = _known(_checked_data, json.dumps(plain["data"], sort_keys=True))
    backbone = json.dumps(plain["backbone"], sort_keys=True)
    find_site(_known(_checked_model, backbone, classes, native_size), config.layer)


def _known(check: Callable[..., Any], *args: Any) -> Any:
    """What a cached check found out, or raised."""
    found = check(*args)
    if isinstance(found, UserError):
        raise found
    return found


@lru_cache(maxsize=64)
def _checked_data(settings: str) -> tuple[int, int] | UserError:
    """Number of classes, and pixels; or what is wrong."""
    try:
        data = _data(json.loads(settings))
        return len(data.classes), data.native_size
    except UserError as error:
        return error


@lru_cache(maxsize=64)
def _checked_model(settings: str, classes: int, native_size: int) -> nn.Module | UserError:
    """The backbone without its weights' values; or what is wrong."""
    backbone = BackboneSettings(**json.loads(settings))
    try:
        model = _model(backbone, classes)
        _preset(backbone, model, native_size)
        return model.to("meta")
    except UserError as error:
        return error


def _data(settings: Any) -> ImageData:
    try:
        data = instantiate(settings)
    except InstantiationException as error:  # what Hydra makes of anything that a constructor raises
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if not isinstance(data, ImageData):
        raise UserError(f"data._target_ makes a {type(data).__name__}, which is no salve.data.ImageData.")
    data.check()
    return data


def _model(settings: BackboneSettings, classes: int) -> nn.Module:
    return load_backbone(settings.library, settings.name, settings.weights, classes, settings.args).model


def _preset(settings: BackboneSettings, model: nn.Module, native_size: int) -> Preprocess:
    backbone, overrides = settings, asdict(settings)["preprocess"]
    return preset(
        backbone.library, backbone.name, backbone.weights, model, native_size, overrides, backbone.args
    ).preprocess


def _precision(setting: str, device: torch.device) -> str:
    """``auto`` as the fastest precision that the device computes in natively."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    # Older torch cannot tell; float32 is then the safe answer.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"
