# SPDX-License-Identifier: MIT
"""How a killed training resumes with the same bits: checked checkpoints, kept metrics, one random state per epoch."""

import logging
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from salve.artifacts import is_kept

log = logging.getLogger(__name__)


def resumable(folder: Path, best: str | None) -> Path | None:
    """The checkpoint to resume from, or None to start again.

    A checkpoint counts only if it is unchanged since it was written and its training has not diverged.

    Args:
        folder: holds ``last.ckpt``, and ``best.ckpt`` where a metric chooses the best epoch.
        best: that metric, or None.
    """
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
        if bad := not_finite(checkpoint.get("callbacks", {}).get(History.__qualname__, {}).get("rows", ())):
            log.warning("%s is of a training that diverged (%s): this one starts again.", path, ", ".join(bad))
            return None
    return last


def not_finite(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Names of the metrics that are NaN or infinite in any epoch, sorted."""
    return sorted({name for row in rows for name, value in row.items() if not math.isfinite(value)})


class History(Callback):
    """Keep every epoch's metrics and random state, so that a resumed training equals one that was never interrupted.

    The metrics are part of each checkpoint. The random state is not: every epoch sets its own, from the seed and the
    number of epochs done.

    Attributes:
        rows: one dict per finished epoch, of its number and all logged metrics.
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
            trainer.should_stop = True  # further epochs would only waste time

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def on_load_checkpoint(self, trainer: pl.Trainer, _: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # ModelCheckpoint forgets the best epoch when its folder has moved.
        for callback in trainer.checkpoint_callbacks:
            assert isinstance(callback, ModelCheckpoint)
            if (kept := checkpoint["callbacks"].get(callback.state_key)) is not None:
                _move(kept, Path(str(callback.dirpath)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._start_epoch()


def _move(kept: dict[str, Any], folder: Path) -> None:
    """Make the saved state of a ModelCheckpoint name files in this folder."""

    def here(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    kept["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        kept[name] = here(kept[name])
    kept["best_k_models"] = {here(path): score for path, score in kept["best_k_models"].items()}
