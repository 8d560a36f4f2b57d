# SPDX-License-Identifier: MIT
"""Execute one run: its stages in order. Artifacts that are there are reused, others are made."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console

from salve.activations.capture import SPLITS
from salve.artifacts import Artifact, NotMade, Store, write_record, written_whole
from salve.data_settings import NO_MARK
from salve.edit_settings import GATE
from salve.integrity import METRICS
from salve.processes.ranks import gathered
from salve.report import answers, repair_ending, summary_table
from salve.report.metrics import SELECT, Metric, run_metrics
from salve.run.build import build_context
from salve.run.folder import RunFolder, swept_of
from salve.run.manifest import write_manifest
from salve.run.own_measures import own_metrics
from salve.run.schema import Config
from salve.run.tracking import Tracker, job_type_of, run_name, wandb_id
from salve.run.tryout import try_out
from salve.sae import remarks as sae_remarks
from salve.stages import (
    SAESettings,
    StageContext,
    atlas,
    audit,
    capture,
    compare,
    control,
    diagnose,
    evaluate_sets,
    finetune,
    read_features,
    repair,
    train_sae,
    train_saes,
    validate,
)
from salve.stages.compare import Makers
from salve.stages.grouped import grouped
from salve.stages.report import report
from salve.stages.retraining import Retraining
from salve.types import UserError
from salve.variants import traits_of

log = logging.getLogger(__name__)


def execute(
    config: Config,
    folder: Path,
    command: str,
    console: Console | None = None,
    *,
    group: str | None = None,
    gpus: list[int] | None = None,
    made: Collection[str] = (),
) -> dict[str, Artifact]:
    """Run the stages that the settings name.

    What a stage needs and is not there is made first. With ``stages=[report]`` nothing is made: the report shows what
    is there. ``manifest.json`` is written last, so a folder that has it holds a finished run.

    Args:
        config: checked settings.
        folder: the run's folder.
        command: how the run was started, for the report.
        console: where progress and the summary are shown.
        group: the sweep that the run belongs to.
        gpus: indices of the GPUs to use, as torch counts them; None uses the first ones.
        made: keys of artifacts that the same job made before, with those of other runs (:func:`train_together`). They
            are recorded as made by this run and not as reused.

    Returns:
        The artifacts by kind.

    Raises:
        UserError: something about the input is wrong. Nothing half-written is left as a result.
    """
    console = console or Console(markup=False, emoji=False)
    plain = asdict(config)
    store = Store(Path(config.output_dir) / "artifacts", log.info)
    succeeded = False
    tracker = None
    with gathered(config.trainer, gpus) as ranks:
        try:
            # Everything is checked and tried before a logger opens a run of its own, such as W&B's.
            context = build_context(config, store, lambda stage: _open(tracker).logger(stage), console, ranks)
            try_out(config, context)
            if set(config.stages) != {"report"}:
                store.check_writable()
            text = RunFolder(folder).prepare(config)
            tracker = Tracker(
                config.logger,
                folder,
                plain,
                name=(run_name(swept_of(folder)) if group else "") or config.name,
                group=group,
                job_type=job_type_of(config.stages),
                run_id=wandb_id(group, folder.name) if group else None,
            )
            found = _run_stages(config, context)
            artifacts = {kind: replace(a, reused=a.reused and a.key not in made) for kind, a in found.items()}
            folders = {kind: artifact.path for kind, artifact in artifacts.items()}
            metrics = run_metrics(folders) | own_metrics(config.measures, folders)
            with written_whole(folder / METRICS) as unfinished:
                write_record(unfinished, metrics)
            if "report" in config.stages:
                _report(config, context, artifacts, folder, text, command, console)
            else:
                _list(artifacts, metrics, console)
            tracker.log_results(artifacts, metrics)
            succeeded = True
        finally:
            if tracker is not None:
                tracker.finish(succeeded)
    write_manifest(folder, config, context, artifacts)
    return artifacts


def _report(
    config: Config,
    context: StageContext,
    artifacts: dict[str, Artifact],
    folder: Path,
    text: str,
    command: str,
    console: Console,
) -> None:
    """Write the report's page, and print the summary."""
    title, facts = f"salve: {config.name}", _facts(config, context)
    remarks = (*context.remarks, *(sae_remarks(artifacts["sae"].record("sae.json")) if "sae" in artifacts else ()))
    page = report(folder, artifacts, title=title, facts=facts, config=text, commands=[command], remarks=remarks)
    console.print(summary_table({kind: artifact.path for kind, artifact in artifacts.items()}, remarks))
    _end_of_repair(artifacts, console)
    console.print(f"Report: {page}", soft_wrap=True, markup=False)


def _list(artifacts: dict[str, Artifact], metrics: dict[str, Metric], console: Console) -> None:
    """Print measures and artifacts, for a run without a report.

    A measure on select images is left out where the same measure on test images is known.
    """
    known = {name: value for name, value in metrics.items() if value is not None}
    told = {name: value for name, value in known.items() if not _is_told_by_test(name, known)}
    for name, value in told.items():
        console.print(f"{name}: {value:.4g}", highlight=False, markup=False)
    for kind, artifact in artifacts.items():
        console.print(f"{kind}: {artifact.path}", soft_wrap=True, highlight=False, markup=False)
    if artifacts.keys() & {"audit", "repair"}:
        console.print(answers({kind: artifact.path for kind, artifact in artifacts.items()}))
    _end_of_repair(artifacts, console)


def _end_of_repair(artifacts: dict[str, Artifact], console: Console) -> None:
    """Print whether a repair helped, and where its files lie."""
    if "repair" in artifacts:
        for line in repair_ending({kind: artifact.path for kind, artifact in artifacts.items()}):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _is_told_by_test(name: str, known: Collection[str]) -> bool:
    return name.startswith(SELECT) and name.removeprefix(SELECT) in known


def train_together(configs: Sequence[Config], console: Console, gpus: list[int] | None = None) -> set[str]:
    """Train the SAEs of several runs as one batched computation. The runs find them when they are executed.

    Args:
        configs: settings that differ only in what :func:`salve.stages.can_share` allows.
        console, gpus: see :func:`execute`.

    Returns:
        The keys of the SAEs that were made and not reused.
    """
    first = configs[0]
    store = Store(Path(first.output_dir) / "artifacts", log.info)
    with gathered(first.trainer, gpus) as ranks:
        context = build_context(first, store, lambda _: DummyLogger(), console, ranks)
        try_out(first, context)
        classifier = finetune(context, first.finetune)
        activations = capture(context, first.capture, classifier)
        saes = train_saes(context, [config.sae for config in configs], classifier, activations)
    return {sae.key for sae in saes if not sae.reused}


def _open(tracker: Tracker | None) -> Tracker:
    assert tracker is not None, "stages run only after the tracker has been opened"
    return tracker


def _run_stages(config: Config, context: StageContext) -> dict[str, Artifact]:
    wanted = set(config.stages)
    only_found = replace(context, store=context.store.only_found())
    found: dict[str, Artifact] = {}

    def step(kind: str, needed: bool, stage: Callable[[StageContext], Artifact]) -> None:
        if needed:
            found[kind] = stage(context)
        elif "report" in wanted:
            try:
                found[kind] = stage(only_found)
            except (NotMade, KeyError):  # neither it nor, perhaps, what it would be made from is there
                log.info("%s: not there, left out of the report", kind)

    def inputs(*kinds: str) -> list[Artifact]:
        return [found[kind] for kind in kinds]

    seed = config.sae.seed
    behind = bool(wanted - {"finetune", "report"})
    base = ("classifier", "activations", "sae", "features")
    step("classifier", behind or "finetune" in wanted, lambda c: finetune(c, config.finetune))
    step("activations", behind, lambda c: capture(c, config.capture, *inputs("classifier")))
    step("sae", behind, lambda c: train_sae(c, config.sae, *inputs(*base[:2])))
    pool = config.sae.pool
    # An audit and a repair do not need them, but the explorer of their report does.
    of_classes = bool(wanted - {"finetune", "audit", "repair", "report"}) or (behind and "report" in wanted)
    step("features", of_classes, lambda c: read_features(c, config.discover, pool, *inputs(*base[:3])))
    pictured = of_classes and "report" in wanted
    step("atlas", pictured, lambda c: atlas(c, pool, *inputs(*base)))
    step("validate", "validate" in wanted, lambda c: validate(c, config.validate, pool, *inputs(*base)))
    step("control", "control" in wanted, lambda c: control(c, config.edit, seed, *inputs(*base)))
    gated = config.edit.method == GATE
    if "diagnose" in wanted and not gated:
        log.info("diagnose: left out, since critical strengths are of the gate, not of %s", config.edit.method)
    step("diagnose", "diagnose" in wanted and gated, lambda c: diagnose(c, config.edit, *inputs(*base)))
    step("compare", "compare" in wanted, lambda c: _compare(config, c, inputs(*base)))
    audited, repaired = bool(wanted & {"audit", "repair"}), "repair" in wanted
    step("audit", audited, lambda c: audit(c, config.audit, pool, config.validate.pictures, *inputs(*base[:3])))
    step("repair", repaired, lambda c: _repair(config, c, inputs(*base[:3], "audit")))
    if config.evaluate:
        step(
            "evaluation",
            wanted != {"report"},
            lambda c: evaluate_sets(c, found["classifier"], found.get("control"), found.get("repair")),
        )
    if not found:
        raise UserError(
            f"There is nothing to report for these settings under {config.output_dir}; run their other stages first."
        )
    return found


def _repair(config: Config, context: StageContext, inputs: Sequence[Artifact]) -> Artifact:
    """Stage ``repair``, with what trains its rivals."""
    retraining = Retraining(context, config.finetune, finetune)
    return repair(context, config.repair, config.audit.labels, retraining, *inputs)


def _compare(config: Config, context: StageContext, inputs: Sequence[Artifact]) -> Artifact:
    """Stage ``compare``, with what makes further SAEs and classifiers where it needs them."""
    classifier, activations, *_ = inputs
    training = config.finetune

    def sae_of(settings: SAESettings) -> tuple[Artifact, Artifact]:
        sae = train_sae(context, settings, classifier, activations)
        return sae, read_features(context, config.discover, settings.pool, classifier, activations, sae)

    def without(name: str) -> Artifact:
        return finetune(context, replace(training, without=[*training.without, name]))

    makers = Makers(lambda there: capture(there, config.capture, classifier), sae_of, without)
    return compare(context, config.compare, config.sae, makers, *inputs)


def _facts(config: Config, context: StageContext) -> dict[str, str]:
    def described(values: dict[str, Any], *names: str) -> str:
        return ", ".join(f"{name} {values[name]}" for name in names if values[name] is not None)

    sae, edit = asdict(config.sae), config.edit
    how = described(asdict(edit), "scale", "channels") if edit.method == GATE else edit.method
    chosen = ("dictionary_size", "k" if "k" in traits_of(config.sae.variant).takes else "sparsity")
    # In a run that was made for an audit or a repair, edits of the classes' own latents are nowhere.
    answered = {"audit", "repair"} & set(config.stages) and not {"control", "diagnose", "compare"} & set(config.stages)
    labels = config.audit.labels if grouped(context, "select") is not None else 0
    audits = {"labels": f"at most {labels} select images of each group" if labels else "none"}
    mark = config.mark
    marked = ", ".join(f"{rate:g} of {name}" for name, rate in mark.rates.items())
    marks = {"mark": f"{mark.kind}, on a share of train images: {marked or 'of no class'}, {mark.rate:g} of others"}
    return {
        "backbone": f"{config.backbone.library} {config.backbone.name}, weights {Path(config.backbone.weights).name}",
        "site": context.layer,
        "preprocessing": context.preprocessing,
        "data": f"{context.data.name}: {len(context.classes)} classes; images to train, select and test: "
        + ", ".join(str(len(context.data.labels(split))) for split in SPLITS),
        **({} if mark.kind == NO_MARK else marks),
        "SAE": f"{config.sae.variant}, {described(sae, *chosen)}",
        **(audits if answered else {"edit": f"{how}, latents chosen by {config.discover.select}"}),
        "seed": str(config.seed),
    }
