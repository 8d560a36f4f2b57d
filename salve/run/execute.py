"""One run: the stages that were asked for, in order, on artifacts that are found or made."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from salve.artifacts import Artifact, NotMade, Store
from salve.report import summary_table
from salve.run.build import build_job
from salve.run.manifest import write_manifest
from salve.run.schema import Config
from salve.run.tracking import Tracker
from salve.stages import Job, capture, control, diagnose, finetune, read_features, train_sae, validate
from salve.stages.report import report
from salve.types import UserError

log = logging.getLogger(__name__)


def execute(config: Config, folder: Path, command: str, console: Console | None = None) -> dict[str, Artifact]:
    """Run the stages of a configuration.

    What a requested stage needs is made when it is not there yet; ``report`` alone only reads what is there.

    Args:
        config: checked settings. folder: the run's folder. command: how the run was started, for the report.
        console: where progress and the summary are shown.

    Returns:
        The artifacts by kind.

    Raises:
        UserError: something about the input is wrong; nothing half-written is left as a result.
    """
    console = console or Console()
    plain = asdict(config)
    store = Store(Path(config.output_dir) / "artifacts", log.info)
    succeeded = False
    tracker = None
    try:
        # The job is built, and with it everything checked, before a logger opens a run of its own.
        job = build_job(config, store, lambda stage: _open(tracker).logger(stage), console)
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        tracker = Tracker(config.logger, folder, config.name, plain)
        artifacts = _run_stages(config, job)
        write_manifest(folder, config.seed, artifacts)
        if "report" in config.stages:
            page = report(
                folder,
                artifacts,
                title=f"salve: {config.name}",
                facts=_facts(config, job),
                config=text,
                commands=[command],
            )
            console.print(summary_table({kind: artifact.path for kind, artifact in artifacts.items()}))
            console.print(f"Report: {page}", soft_wrap=True)
        else:
            for kind, artifact in artifacts.items():
                console.print(f"{kind}: {artifact.path}", soft_wrap=True)
        tracker.log_results(artifacts)
        succeeded = True
    finally:
        if tracker is not None:
            tracker.finish(succeeded)
    return artifacts


def _open(tracker: Tracker | None) -> Tracker:
    assert tracker is not None, "stages run only after the tracker has been opened"
    return tracker


def _run_stages(config: Config, job: Job) -> dict[str, Artifact]:
    wanted = set(config.stages)
    only_found = replace(job, store=job.store.only_found())
    found: dict[str, Artifact] = {}

    def step(kind: str, needed: bool, stage: Callable[[Job], Artifact]) -> None:
        if needed:
            found[kind] = stage(job)
        elif "report" in wanted:
            try:
                found[kind] = stage(only_found)
            except (NotMade, KeyError):  # not made, or something it would be made from was not
                log.info("%s: not there, left out of the report", kind)

    def inputs(*kinds: str) -> list[Artifact]:
        return [found[kind] for kind in kinds]

    behind = bool(wanted - {"finetune", "report"})
    base = ("classifier", "activations", "sae", "features")
    step("classifier", behind or "finetune" in wanted, lambda j: finetune(j, config.finetune))
    step("activations", behind, lambda j: capture(j, *inputs("classifier")))
    step("sae", behind, lambda j: train_sae(j, config.sae, *inputs(*base[:2])))
    step("features", behind, lambda j: read_features(j, config.discover, *inputs(*base[:3])))
    step("validate", "validate" in wanted, lambda j: validate(j, config.validate, *inputs(*base)))
    step("control", "control" in wanted, lambda j: control(j, config.edit, *inputs(*base)))
    step("diagnose", "diagnose" in wanted, lambda j: diagnose(j, config.edit, *inputs(*base)))
    if not found:
        raise UserError(
            f"There is nothing to report for these settings under {config.output_dir}; run their other stages first."
        )
    return found


def _facts(config: Config, job: Job) -> dict[str, str]:
    def described(values: dict[str, Any], *names: str) -> str:
        return ", ".join(f"{name} {values[name]}" for name in names if values[name] is not None)

    sae = asdict(config.sae)
    chosen = ("dictionary_size", "k") if config.sae.variant == "topk" else ("dictionary_size", "sparsity")
    return {
        "backbone": f"{config.backbone.library} {config.backbone.name}, weights {Path(config.backbone.weights).name}",
        "site": job.layer,
        "data": f"{job.data.name}: {len(job.data.labels('train'))} train and {len(job.data.labels('val'))} val images "
        f"of {len(job.classes)} classes",
        "SAE": f"{config.sae.variant}, {described(sae, *chosen)}",
        "edit": described(asdict(config.edit), "scale", "channels") + f", latents chosen by {config.discover.select}",
        "seed": str(config.seed),
    }
