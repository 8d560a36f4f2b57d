"""Training and testing on one rank, and what lets a training that was killed go on where it stopped."""

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint

from salve.artifacts import is_kept

log = logging.getLogger(__name__)

MakeTrainer = Callable[[str, int, list[Callback]], pl.Trainer]

#: Of a training: an ensemble's holds all its SAEs, and would take longer to write than some epochs take.
CHECKPOINTS = 20


@dataclass(frozen=True)
class Training:
    """What :meth:`salve.stages.context.StageContext.fit` is asked for, as every rank needs it."""

    stage: str
    seed: int
    folder: Path
    resume: Path | None
    epochs: int
    best: str | None
    patience: int | None


def fit_here(
    make_trainer: MakeTrainer, training: Training, module: pl.LightningModule, data: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Train on this rank; every epoch's metrics."""
    history = _History(training.seed)
    callbacks: list[Callback] = [history]
    if training.best is not None:
        # Before the last one's: a kill between the two must not leave an epoch that is done without its weights.
        best = ModelCheckpoint(
            training.folder, filename="best", monitor=training.best, mode="max", enable_version_counter=False
        )
        callbacks.append(best)
        if training.patience is not None:
            callbacks.append(EarlyStopping(training.best, mode="max", patience=training.patience))
    every = max(1, training.epochs // CHECKPOINTS)
    last = ModelCheckpoint(training.folder, filename="last", every_n_epochs=every, enable_version_counter=False)
    callbacks.append(last)
    with quiet_lightning():
        trainer = make_trainer(training.stage, training.epochs, callbacks)
        trainer.fit(module, **data, ckpt_path=training.resume)
    _forget_trainer(data.get("datamodule"))
    return history.rows


def test_here(make_trainer: MakeTrainer, stage: str, module: pl.LightningModule, data: pl.LightningDataModule) -> Any:
    """Test on this rank."""
    with quiet_lightning():
        make_trainer(stage, 1, []).test(module, datamodule=data, verbose=False)
    _forget_trainer(data)
    return module.measures()  # type: ignore[operator]


def _forget_trainer(data: pl.LightningDataModule | None) -> None:
    """A DataModule keeps its Trainer, with which it could not be sent to another rank."""
    if data is not None:
        data.trainer = None


def alone(work: Callable[..., Any], /, *args: Any) -> Any:
    """On this process only."""
    return work(*args)


def resumable(folder: Path, best: str | None) -> Path | None:
    """The checkpoint to go on from, if all of it is what was written, and its training has not diverged."""
    last = folder / "last.ckpt"
    if not last.is_file():
        return None
    for path in (last, folder / "best.ckpt") if best is not None else (last,):
        if not is_kept(path):
            log.warning("%s is cut, changed or another training's: this training starts again.", path)
            return None
        try:
            checkpoint = torch.load(path, "cpu", weights_only=True)
        # A damaged file makes the unpickler raise almost anything.
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            log.warning("%s cannot be read (%s): this training starts again.", path, reason)
            return None
        if bad := not_finite(checkpoint.get("callbacks", {}).get(_History.__qualname__, {}).get("rows", ())):
            log.warning("%s is of a training that diverged (%s): this one starts again.", path, ", ".join(bad))
            return None
    return last


def not_finite(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Names of the metrics that became NaN or infinite in any epoch."""
    return sorted({name for row in rows for name, value in row.items() if not math.isfinite(value)})


class _History(Callback):
    """What makes a resumed training the same as one that was never interrupted.

    Every epoch's metrics are kept through checkpoints, and every epoch starts from its own random state, which a
    checkpoint does not hold.
    """

    def __init__(self, seed: int) -> None:
        self.rows: list[dict[str, float]] = []
        self._seed = seed
        self._first = True

    def _start_epoch(self) -> None:
        torch.manual_seed(self._seed * 100_003 + len(self.rows))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._start_epoch()

    def on_train_epoch_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        # Lightning draws the first epoch's order while it sets up, and every later one's after this hook.
        if not self._first:
            self._start_epoch()
        self._first = False

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **metrics})
        if not_finite(self.rows[-1:]):
            trainer.should_stop = True  # the rest of the epochs could only be lost as well

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def on_load_checkpoint(self, trainer: pl.Trainer, _: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # A ModelCheckpoint forgets which epoch was best if its folder has another place than it had.
        for callback in trainer.checkpoint_callbacks:
            assert isinstance(callback, ModelCheckpoint)
            if (kept := checkpoint["callbacks"].get(callback.state_key)) is not None:
                _move(kept, Path(str(callback.dirpath)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._start_epoch()


def _move(kept: dict[str, Any], folder: Path) -> None:
    """Have what a ModelCheckpoint keeps name files of this folder."""

    def here(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    kept["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        kept[name] = here(kept[name])
    kept["best_k_models"] = {here(path): score for path, score in kept["best_k_models"].items()}


class quiet_lightning(warnings.catch_warnings):
    """Without Lightning's advice that does not apply: no workers are a choice, a resumed folder is not empty, and not
    everything on a cluster's machine is a SLURM step."""

    def __enter__(self) -> None:
        super().__enter__()
        for advice in (
            "does not have many workers",
            "exists and is not empty",
            "The number of training batches",
            "LeafSpec",
            "`srun` command is available",
        ):
            warnings.filterwarnings("ignore", f".*{advice}.*")
