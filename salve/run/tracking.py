# SPDX-License-Identifier: MIT
"""Loggers: CSV files in the run's folder, or a W&B run for each run and one for the summary of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from salve.artifacts import Artifact
from salve.report.explorer import NAME as EXPLORER
from salve.report.names import with_values
from salve.report.text import slug
from salve.run.lineage import log_artifacts, log_explorer
from salve.run.schema import STAGES, LoggerSettings
from salve.types import UserError

#: Kinds of artifacts that are trained, and the stage whose Trainer logs the training.
TRAININGS = {"classifier": "finetune", "sae": "discover"}
#: Tables that are logged, by kind. W&B keeps each as an artifact of its own, so these are the few worth comparing.
TABLES = {
    "features": ("classes", "selected", "concepts"),
    "validate": ("localisation",),
    "control": ("summary", "curves"),
    "diagnose": ("summary",),
    "evaluation": ("evaluation",),
}
#: The most rows of a table that W&B shows.
MOST_ROWS = 10_000
SUMMARY = "summary"
#: Stages that run only where they are asked for.
APART = {"compare", "audit", "repair"}


def job_type_of(stages: Sequence[str]) -> str:
    """W&B's job type: ``discover``, ``control+diagnose``, or ``pipeline`` for all but those in :data:`APART`."""
    return "pipeline" if set(stages) >= set(STAGES) - APART else "+".join(sorted(stages, key=STAGES.index))


def run_name(swept: Mapping[str, Any] | None) -> str:
    """The name of a sweep's run: ``sparsity=2 dictionary_size=64``; empty outside a sweep."""
    return with_values(swept or {})


def wandb_id(sweep: str, key: str) -> str:
    """W&B's id of a sweep's run, the same for every attempt at it."""
    return f"{slug(sweep)}-{key}".lstrip("-")


class Tracker:
    """The logger of a run.

    Args:
        settings: which logger.
        folder: the run's folder.
        config: the resolved settings, plain.
        name: the run's name.
        group: the sweep it belongs to; ``settings.group`` takes precedence.
        job_type: see :func:`job_type_of`.
        run_id: the W&B run of this id is continued; None starts a new one.

    Raises:
        UserError: W&B cannot be started, for instance without a key.
    """

    def __init__(
        self,
        settings: LoggerSettings,
        folder: Path,
        config: Mapping[str, Any],
        *,
        name: str,
        group: str | None,
        job_type: str,
        run_id: str | None,
    ) -> None:
        self._folder, self._config = folder, config
        self._run: Any = None
        if settings.kind == "wandb":
            self._run = _start(settings, folder, config, name, group, job_type, run_id)
            for stage in TRAININGS.values():
                self._run.define_metric(f"{stage}-*", step_metric=f"{stage}-epoch")

    def logger(self, stage: str) -> Logger:
        """The Lightning logger of a stage. With W&B all stages write to one run, each with its name as a prefix."""
        if self._run is None:
            return CSVLogger(self._folder, name="logs", version=stage)
        self._claim(stage)
        return WandbLogger(experiment=self._run, prefix=stage, save_dir=str(self._folder))

    def log_results(self, artifacts: Mapping[str, Artifact], metrics: Mapping[str, Any]) -> None:
        """Log what no Trainer has logged: curves of reused trainings, tables, figures, lineage and measures.

        Args:
            artifacts: by kind; those that were not reused are logged as made by this run.
            metrics: as in ``metrics.json``; they become the W&B run's summary.
        """
        if self._run is None:
            return
        import wandb

        for kind, stage in TRAININGS.items():
            artifact = artifacts.get(kind)
            if artifact is not None and artifact.file("history.csv").is_file() and self._claim(stage):
                for row in _by_epoch(artifact.table("history.csv")):
                    self._run.log({f"{stage}-{name}": value for name, value in row.items()})
        media = _images(sorted((self._folder / "figures").glob("*.png")))
        for kind, names in TABLES.items():
            for name in names:
                if kind in artifacts and artifacts[kind].file(f"{name}.csv").is_file():
                    rows = artifacts[kind].table(f"{name}.csv").head(MOST_ROWS)
                    media[f"tables/{kind}-{name}"] = wandb.Table(dataframe=rows)
        explorer = self._folder / EXPLORER
        if explorer.is_file() and "activations" in artifacts:
            # Shown as it is: what W&B would add to it, the page's own policy forbids.
            media["explorer"] = wandb.Html(str(explorer), inject=False)
            log_explorer(self._run, artifacts, self._config, explorer)
        if media:
            self._run.log(media)
        log_artifacts(self._run, artifacts, self._config)
        self._run.summary.update({name: value for name, value in metrics.items() if value is not None})

    def finish(self, succeeded: bool) -> None:
        """Close the W&B run, so that the next run of this process starts its own."""
        if self._run is not None:
            self._run.finish(exit_code=0 if succeeded else 1)
            self._run = None

    def _claim(self, stage: str) -> bool:
        """True the first time for each W&B run and stage, so that a resumed run does not log a curve twice."""
        mark = self._folder / "wandb" / f"curves-of-{stage}-in-{self._run.id}"
        if mark.exists():
            return False
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        return True


def check_login(settings: LoggerSettings) -> None:
    """Check before a sweep that the user is logged in to W&B; on a terminal, W&B asks for the key.

    Raises:
        UserError: the user is not logged in.
    """
    if settings.kind != "wandb" or settings.mode != "online":
        return
    import wandb

    try:
        why = "" if wandb.login() else "no key"
    except wandb.Error as error:
        why = str(error).splitlines()[0].rstrip(".")
    if why:
        raise UserError(
            f"logger=wandb: {why}. Run `wandb login`, set WANDB_API_KEY, or choose logger.mode=offline and sync later."
        )


def log_sweep_summary(
    settings: LoggerSettings, name: str, folder: Path, table: pd.DataFrame, figures: Sequence[Path]
) -> None:
    """Log the summary of a sweep to a W&B run of its own, the same one each time. Other loggers get nothing.

    Args:
        settings: which logger.
        name: the sweep's name.
        folder: W&B keeps its files in ``wandb/`` below it.
        table: one row per run.
        figures: image files, of which the PNG files are logged.

    Raises:
        UserError: W&B cannot be started.
    """
    if settings.kind != "wandb":
        return
    import wandb

    run = _start(settings, folder, {"sweep": name}, f"{name}: summary", name, SUMMARY, wandb_id(name, SUMMARY))
    succeeded = False
    try:
        rows = table.astype(object).where(table.notna(), None)
        run.log({"sweep": wandb.Table(dataframe=rows), **_images([p for p in figures if p.suffix == ".png"])})
        numbers = table.select_dtypes("number")
        run.summary.update({"runs": len(table)})
        run.summary.update(
            {
                f"{column}/{statistic}": float(value)
                for column in numbers.columns
                for statistic, value in numbers[column].agg(["min", "mean", "max"]).items()
                if pd.notna(value)
            }
        )
        succeeded = True
    finally:
        run.finish(exit_code=0 if succeeded else 1)


def _start(
    settings: LoggerSettings,
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    group: str | None,
    job_type: str,
    run_id: str | None,
) -> Any:
    """Start a W&B run, even where this process has another one open."""
    import wandb  # slow to import, and not needed for CSV

    try:
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group or group,
            job_type=job_type,
            name=name,
            tags=settings.tags,
            id=run_id,
            resume="allow" if run_id else None,
            reinit="create_new",
            mode=settings.mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"W&B cannot be started ({reason}); run `wandb login`, or set logger.mode=offline or logger=csv."
        ) from error


def _images(paths: Sequence[Path]) -> dict[str, Any]:
    import wandb

    return {f"figures/{path.stem}": wandb.Image(str(path)) for path in paths}


def _by_epoch(history: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a training's history, one per epoch, under the names that a Trainer logs."""
    if "step" in history:  # of an SAE, whose epochs are parts of its steps
        history = history.drop(columns="step").assign(epoch=range(len(history)))
    if "split" not in history:
        return history.to_dict("records")
    rows = []
    for epoch, group in history.groupby("epoch"):
        row: dict[str, Any] = {"epoch": epoch}
        for part in group.to_dict("records"):
            row |= {f"{part['split']}_{name}": part[name] for name in ("loss", "accuracy")}
        rows.append(row)
    return rows
