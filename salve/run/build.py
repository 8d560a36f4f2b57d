# SPDX-License-Identifier: MIT
"""Turn settings into objects. Classes that settings name are called here and nowhere else."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from salve.artifacts import Store
from salve.backbones import Site, find_site, graph_of, head_site, load_backbone, preset
from salve.backbones.load import Loaded, code_of
from salve.backbones.presets import Preset
from salve.data.base import ImageData
from salve.data.evaluation import EvaluationSet, evaluation_sets
from salve.data.marked import MarkedData
from salve.data_settings import NO_MARK, MarkSettings
from salve.named import one_line, repr_of
from salve.processes.progress import counted
from salve.processes.ranks import Ranks
from salve.processes.trainer import TrainerFactory
from salve.run.allowed import of_stage
from salve.run.own_measures import own_measures
from salve.run.schema import DATA_NAMES, Config
from salve.run.target import callback_class, data_class
from salve.settings import TRAINING_STAGES
from salve.stages import BackboneSettings, StageContext
from salve.stages.finetune import classes_without
from salve.stages.grouped import labels_remark
from salve.stages.training import torch_flags_kept
from salve.types import UserError

log = logging.getLogger(__name__)


def build_context(
    config: Config, store: Store, logger: Callable[[str], Logger], console: Console, ranks: Ranks
) -> StageContext:
    """Make and check what all stages share.

    Args:
        config: checked settings.
        store: where artifacts are kept.
        logger: makes the logger of a stage, given its name.
        console: where progress is shown.
        ranks: the processes that train.

    Raises:
        UserError: the data cannot be read, the weights do not fit, the layer is no site, or a callback cannot be made.
    """
    additions = _additions(config)
    own_measures(config.measures)
    data = _data(config.data, config.mark)
    evaluation = _evaluation(config.evaluate, data)
    classes_without(data.classes, config.finetune.without)
    # This copy is for its errors, remarks and preset. Stages build their own, after seeding.
    loaded = _load(config.backbone, len(data.classes), data.outputs)
    chosen = _preset(config.backbone, loaded.model, data.native_size)
    site = find_site(loaded.model.eval(), config.layer, chosen.preprocess.size)
    graphs = [] if site.in_graph is None else [graph_of(loaded.model, chosen.preprocess.size)]
    data.bind(chosen.preprocess)
    preprocessing = chosen.origin
    unmapped = _without_map(loaded.model, site) if "validate" in config.stages else ""
    of_sets = (one.remark for one in evaluation)
    remarks = tuple(one for one in (*data.remarks(), *of_sets, loaded.remark, unmapped) if one)
    log.info("Images: %s", preprocessing)
    device = torch.device(ranks.accelerator, *(ranks.gpus or [])[:1])
    precision = _precision(config.trainer.precision, device)
    if config.sae.precision == "bf16" and _precision("auto", device) != "bf16-mixed":
        log.warning("sae.precision=bf16: this device does not compute in bf16, so float32 would be faster.")
    if config.trainer.profiler is not None:  # Lightning logs what a profiler measured through this logger
        logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)
    trainer_factory = TrainerFactory(
        ranks.accelerator,
        ranks.gpus,
        ranks.local_size,
        precision,
        logger,
        console.is_terminal,
        not console.is_terminal,
        *additions,
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

    machinery = (trainer_factory, device, progress, ranks, config.trainer.memory, precision)
    context = StageContext(
        *(store, data, config.backbone, site.name, config.seed, *machinery, preprocessing, remarks),
        {stage: _trained_with(config, stage, loaded.model) for stage in TRAINING_STAGES},
        evaluation,
        graphs,
    )
    if {"audit", "repair"} & set(config.stages) and (few := labels_remark(context, config.audit.labels)):
        context = replace(context, remarks=(*remarks, few))
    for remark in context.remarks:
        log.warning("Caution: %s", remark)
    return context


def _without_map(model: nn.Module, site: Site) -> str:
    """A sentence about what is left out where no map lies in front of the site; empty if one does."""
    if site.map or site.in_graph is not None:  # at a site of the graph, the stage looks for one itself
        return ""
    return (
        f"This {type(model).__name__} has no spatial map in front of its site {site.name}, so Grad-FAM is left out: "
        "there are no saliency maps, and no scores of them."
    )


def _additions(
    config: Config,
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Callable[[], Callback], ...]]]:
    """The user's arguments for Lightning's Trainer, and what makes the user's callbacks, both by stage.

    Each callback and each Trainer is made once here, so that what they refuse is known before any work.

    Raises:
        UserError: one of them cannot be made.
    """
    # Lightning's own lines say nothing about the run. Importing Lightning sets the level, so this has to come later.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    arguments = {stage: config.trainer.arguments(stage) for stage in TRAINING_STAGES}
    callbacks = _callbacks(config)
    make = TrainerFactory("cpu", None, 1, "32-true", None, bar=False, arguments=arguments, callbacks=callbacks)
    for stage in TRAINING_STAGES:
        if not arguments[stage] and not callbacks[stage]:
            continue
        try:
            with torch_flags_kept():
                make(stage, 1, [Callback()])
        except Exception as error:  # Lightning's own, or what a callback raises
            raise UserError(
                f"Lightning's Trainer cannot be made for stage {stage} with these settings of trainer and callbacks "
                f"({one_line(repr_of(error))})."
            ) from error
    return arguments, callbacks


def _callbacks(config: Config) -> dict[str, tuple[Callable[[], Callback], ...]]:
    made: dict[str, Callable[[], Callback]] = {}
    for name, settings in config.callbacks.items():
        if settings is None:
            continue
        key, target = f"callbacks.{name}._target_", settings["_target_"]
        arguments = {
            argument: value for argument, value in settings.items() if argument not in ("_target_", "_stages_")
        }
        make = partial(callback_class(key, target), **arguments)
        try:
            make()
        except Exception as error:  # the user's own constructor may raise anything
            raise UserError(
                f"{key}={target} cannot be made with the arguments in callbacks.{name} ({one_line(repr_of(error))})."
            ) from error
        made[name] = make
    return {stage: tuple(made[name] for name in of_stage(config.callbacks, stage)) for stage in TRAINING_STAGES}


def _trained_with(config: Config, stage: str, model: nn.Module) -> dict[str, Any]:
    """What the user adds to the training of a stage, for its key; empty where nothing is added.

    To the training of the network belongs the code of one's own.
    """
    added: dict[str, Any] = {
        "trainer": config.trainer.arguments(stage),
        "callbacks": [*of_stage(config.callbacks, stage).values()],
    }
    if stage == "finetune":
        backbone = config.backbone
        added["code"] = code_of(backbone.library, backbone.name, backbone.args, model)
    return {name: value for name, value in added.items() if value}


def check_job(config: Config) -> None:
    """Check what :func:`build_context` checks, without a device. Data and backbones are looked at once for all jobs.

    Raises:
        UserError: see there.
    """
    _additions(config)
    own_measures(config.measures)
    plain = asdict(config)
    images = {name: plain[name] for name in ("data", "mark", "evaluate")}
    names, outputs, native_size = _known(_checked_data, json.dumps(images, sort_keys=True))
    classes_without(names, config.finetune.without)
    classes = len(names)
    backbone = json.dumps(plain["backbone"], sort_keys=True)
    head = head_site(_known(_checked_model, backbone, classes, outputs, native_size))
    if config.layer not in (head.name, *head.aliases):
        model, size = _known(_with_graph, backbone, classes, outputs, native_size)
        find_site(model, config.layer, size)


def _known(check: Callable[..., Any], *args: Any) -> Any:
    """Call a cached check; return what it found, or raise the error that it kept."""
    found = check(*args)
    if isinstance(found, UserError):
        raise found
    return found


@lru_cache(maxsize=64)
def _checked_data(settings: str) -> tuple[tuple[str, ...], tuple[int, ...] | None, int] | UserError:
    """The names of the classes, their outputs, and the size of the images in pixels; or what is wrong."""
    try:
        known = json.loads(settings)
        data = _data(known["data"], MarkSettings(**known["mark"]))
        _evaluation(known["evaluate"], data)
        return data.classes, data.outputs, data.native_size
    except UserError as error:
        return error


@lru_cache(maxsize=64)
def _checked_model(
    settings: str, classes: int, outputs: tuple[int, ...] | None, native_size: int
) -> nn.Module | UserError:
    """The backbone without the values of its weights; or what is wrong."""
    backbone = BackboneSettings(**json.loads(settings))
    try:
        model = _load(backbone, classes, outputs).model
        _preset(backbone, model, native_size)
        return model.to("meta")
    except UserError as error:
        return error


@lru_cache(maxsize=8)
def _with_graph(
    settings: str, classes: int, outputs: tuple[int, ...] | None, native_size: int
) -> tuple[nn.Module, int] | UserError:
    """The backbone without the values of its weights, but with its graph, and the size of its images."""
    backbone = BackboneSettings(**json.loads(settings))
    try:
        model = _load(backbone, classes, outputs).model.eval()
        size = _preset(backbone, model, native_size).preprocess.size
        graph_of(model, size)
        return model.to("meta"), size
    except UserError as error:
        return error


def _data(settings: Any, mark: MarkSettings) -> ImageData:
    """The images, with a mark if there is one."""
    data = _source(settings)
    if mark.kind == NO_MARK:
        return data
    marked = MarkedData(data, mark)
    marked.check()
    return marked


def _evaluation(entries: Sequence[Any], data: ImageData) -> tuple[EvaluationSet, ...]:
    """The evaluation sets, whose mappings name salve's own data sources and their arguments."""

    def source(settings: Mapping[str, Any]) -> ImageData:
        target = DATA_NAMES[settings["data"]]
        arguments = {name: value for name, value in settings.items() if name != "data"}
        return _source({"_target_": target, "batch_size": data.batch_size, **arguments}, "evaluate")

    return evaluation_sets(entries, data, source)


def _source(settings: Any, setting: str = "data") -> ImageData:
    values: dict[str, Any] = asdict(settings) if is_dataclass(settings) else dict(settings)  # type: ignore[arg-type]
    target = values.pop("_target_")
    kind = data_class("data._target_", target)
    try:
        data = kind(**values)
    except UserError:
        raise
    except Exception as error:  # the user's own constructor may raise anything
        raise UserError(
            f"data._target_={target} cannot be made with these settings of {setting} ({one_line(repr_of(error))})."
        ) from error
    data.check()
    return data


def _load(settings: BackboneSettings, classes: int, outputs: tuple[int, ...] | None) -> Loaded:
    return load_backbone(settings.library, settings.name, settings.weights, classes, settings.args, outputs)


def _preset(settings: BackboneSettings, model: nn.Module, native_size: int) -> Preset:
    overrides = asdict(settings)["preprocess"]
    return preset(settings.library, settings.name, settings.weights, model, native_size, overrides, settings.args)


def _precision(setting: str, device: torch.device) -> str:
    """The precision that Lightning computes in: ``auto`` is the fastest that the device computes in natively."""
    if setting == "16-mixed" and device.type == "cpu":
        log.warning("trainer.precision=16-mixed: the CPU does not have it, and takes bf16-mixed instead.")
        return "bf16-mixed"
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    # Older versions of torch cannot tell; float32 is then the safe answer.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"
