"""From settings to objects; the only place that instantiates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from salve.artifacts import Store
from salve.backbones import find_site, load_backbone, preset
from salve.data.base import ImageData
from salve.run.schema import Config, TrainerSettings
from salve.stages import Job
from salve.types import UserError


def build_job(config: Config, store: Store, logger: Callable[[str], Logger], console: Console) -> Job:
    """Everything the stages share, checked: data that can be read, weights that fit, a layer that is a site.

    Raises:
        UserError: one of these is not so.
    """
    try:
        data = instantiate(config.data)
    except InstantiationException as error:  # what Hydra makes of anything that a constructor raises
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if not isinstance(data, ImageData):
        raise UserError(f"data._target_ makes a {type(data).__name__}, which is no salve.data.ImageData.")
    data.check()
    settings = config.backbone
    # Built once here for its errors and its preset; stages build their own, after seeding.
    model, _ = load_backbone(
        settings.library,
        settings.name,
        settings.weights,
        len(data.classes),
        settings.args,
    )
    site = find_site(model, config.layer)
    data.bind(
        preset(
            settings.library,
            settings.name,
            model,
            data.native_size,
            asdict(settings.preprocess),
            pretrained=settings.weights == "imagenet",
        )
    )
    device = torch.device("cuda" if _accelerator(config.trainer) == "cuda" else "cpu")

    def trainer(stage: str, max_epochs: int, callbacks: list[Callback]) -> pl.Trainer:
        bar: list[Callback] = [_Bar()] if console.is_terminal else []
        return pl.Trainer(
            accelerator=_accelerator(config.trainer),
            devices=config.trainer.devices,
            strategy=config.trainer.strategy,
            # SAEs and measurements keep float32: an edit's size is compared across them.
            precision=_precision(config.trainer, device) if stage == "finetune" else "32-true",
            max_epochs=max_epochs,
            callbacks=[*callbacks, *bar],
            logger=logger(stage),
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=console.is_terminal,
            enable_model_summary=False,
            log_every_n_steps=1_000_000,
            num_sanity_val_steps=0,
        )

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, advance=done)

    return Job(store, data, settings, site.name, config.seed, trainer, device, progress)


class _Bar(RichProgressBar):
    """Lightning's bar without the logger's folder, which it shows as a version number."""

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


def _accelerator(settings: TrainerSettings) -> str:
    if settings.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={settings.accelerator}, but torch finds no GPU; use trainer=cpu.")
    return "cpu" if settings.accelerator == "cpu" else "cuda"


def _precision(settings: TrainerSettings, device: torch.device) -> Any:  # Lightning's own type is a long Literal
    """``auto`` as the fastest precision that the device computes in natively."""
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    # Older torch cannot tell; float32 is then the safe answer.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"
