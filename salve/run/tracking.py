"""Loggers: CSV files in the run's folder, or one W&B run per job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from salve.artifacts import Artifact
from salve.run.schema import LoggerSettings


class Tracker:
    """Sends what happens in a run to its logger.

    Args:
        settings: which logger. folder: the run's folder. name: of the run. config: the resolved settings, plain.
    """

    def __init__(self, settings: LoggerSettings, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._run: Any = None
        if settings.kind == "wandb":
            import wandb  # slow to import, and not needed for CSV

            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=settings.tags,
                name=name,
                mode=settings.mode,  # type: ignore[arg-type]
                dir=str(folder),
                config=dict(config),
                job_type="run",
                settings=wandb.Settings(console="off", silent=True),
            )

    def logger(self, stage: str) -> Logger:
        """A Lightning logger for a stage; with W&B all stages write to the one run, each under its own name."""
        if self._run is None:
            return CSVLogger(self._folder, name="logs", version=stage)
        return WandbLogger(experiment=self._run, prefix=stage, save_dir=str(self._folder))

    def log_results(self, artifacts: Mapping[str, Artifact]) -> None:
        """What no Trainer has logged: curves of trainings that were found done, tables, figures, the SAE, recipes."""
        if self._run is None:
            return
        import wandb

        stages = {"classifier": "finetune", "sae": "discover"}
        for kind, stage in stages.items():
            artifact = artifacts.get(kind)
            if artifact is not None and artifact.reused and artifact.file("history.csv").is_file():
                for row in _by_epoch(artifact.table("history.csv")):
                    self._run.log({f"{stage}-{name}": value for name, value in row.items()})
        media: dict[str, Any] = {}
        for path in sorted((self._folder / "figures").glob("*.png")):
            media[f"figures/{path.stem}"] = wandb.Image(str(path))
        for kind, artifact in artifacts.items():
            for path in sorted(artifact.path.glob("*.csv")):
                # W&B shows at most 10,000 rows of a table.
                media[f"tables/{kind}-{path.stem}"] = wandb.Table(dataframe=artifact.table(path.name).head(10_000))
        if media:
            self._run.log(media)
        for kind, name in (("sae", "sae"), ("control", "recipe")):
            if kind in artifacts:
                source = artifacts[kind]
                folder = source.path if kind == "sae" else source.file("recipes")
                if folder.is_dir():
                    logged = wandb.Artifact(f"{name}-{source.key}", type=name, metadata={"digest": source.digest})
                    logged.add_dir(str(folder))
                    self._run.log_artifact(logged)

    def finish(self, succeeded: bool) -> None:
        """Close the W&B run, so that the next job of this process starts its own."""
        if self._run is not None:
            self._run.finish(exit_code=0 if succeeded else 1)
            self._run = None


def _by_epoch(history: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a history with the names under which a Trainer logs them; one per epoch, also if split by rows."""
    if "split" not in history:
        return history.to_dict("records")
    rows = []
    for epoch, group in history.groupby("epoch"):
        row: dict[str, Any] = {"epoch": epoch}
        for part in group.to_dict("records"):
            row |= {f"{part['split']}_{name}": part[name] for name in ("loss", "accuracy")}
        rows.append(row)
    return rows
