# SPDX-License-Identifier: MIT
"""Fitting and evaluating a LightningModule on all ranks, with checkpoints from which a killed training resumes."""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from salve.stages.context import MakeTrainer, StageContext
from salve.stages.resume import History, not_finite, resumable
from salve.types import Diverged

log = logging.getLogger(__name__)

#: Checkpoints of one training at most: that of an ensemble holds all its SAEs, and can take longer than an epoch.
CHECKPOINTS = 20


@dataclass(frozen=True)
class Training:
    """What every rank must know of a training; see :func:`fit` for most fields.

    Attributes:
        folder: of the checkpoints. resume: the checkpoint to resume from, or None.
    """

    stage: str
    seed: int
    folder: Path
    resume: Path | None
    epochs: int
    best: str | None
    patience: int | None


def fit(
    context: StageContext,
    stage: str,
    module: pl.LightningModule,
    data: Mapping[str, Any],
    scratch: Path,
    *,
    epochs: int,
    best: str | None = None,
    patience: int | None = None,
) -> pd.DataFrame:
    """Train a module on all ranks, resuming a killed training; it ends with its best or last weights.

    Args:
        context: has the Trainer, the ranks and the seed.
        stage: names the logger's section.
        module: what is trained.
        data: arguments of ``Trainer.fit``: a datamodule or loaders.
        scratch: where checkpoints live until the artifact is complete.
        epochs: of the Trainer.
        best: the metric (larger is better) that chooses the epoch whose weights are kept; None keeps the last epoch's.
        patience: epochs without improvement of ``best`` after which training stops; None never stops early.

    Returns:
        One row per epoch with every logged metric.

    Raises:
        Diverged: a metric became NaN or infinite. Its checkpoints are removed.
    """
    checkpoints = scratch / "checkpoints"
    training = Training(stage, context.seed, checkpoints, resumable(checkpoints, best), epochs, best, patience)
    rows = _ranks_for(context, stage, module)(fit_on_rank, context.trainer, training, module, data)
    if bad := not_finite(rows):
        # The next attempt, perhaps with better settings, must not resume from them.
        shutil.rmtree(checkpoints, ignore_errors=True)
        half = stage == "finetune" and context.precision.startswith("16")
        advice = "set trainer.precision=32-true or lower" if half else "lower"
        raise Diverged(
            f"The training of stage {stage} diverged: {', '.join(bad)} became NaN or infinite; {advice} its "
            "learning rate."
        )
    if best is not None:
        checkpoint = torch.load(checkpoints / "best.ckpt", "cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"])
    return pd.DataFrame(rows)


def evaluate(context: StageContext, stage: str, module: pl.LightningModule) -> Any:
    """Run ``Trainer.test`` over the test split on all ranks; returns what the module's ``measures()`` gives then."""
    return context.ranks(evaluate_on_rank, context.trainer, stage, module, context.data)


def fit_on_rank(
    make_trainer: MakeTrainer, training: Training, module: pl.LightningModule, data: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Train on this rank; returns every epoch's metrics."""
    history = History(training.seed)
    callbacks: list[Callback] = [history]
    if training.best is not None:
        # Before the last checkpoint: a kill between the two must not leave a finished epoch without its weights.
        best = ModelCheckpoint(
            training.folder, filename="best", monitor=training.best, mode="max", enable_version_counter=False
        )
        callbacks.append(best)
        if training.patience is not None:
            callbacks.append(EarlyStopping(training.best, mode="max", patience=training.patience))
    every = max(1, training.epochs // CHECKPOINTS)
    last = ModelCheckpoint(training.folder, filename="last", every_n_epochs=every, enable_version_counter=False)
    callbacks.append(last)
    with quiet_lightning(), torch_flags_kept():
        trainer = make_trainer(training.stage, training.epochs, callbacks)
        trainer.fit(module, **data, ckpt_path=training.resume)
    _forget_trainer(data.get("datamodule"))
    return history.rows


def evaluate_on_rank(
    make_trainer: MakeTrainer, stage: str, module: pl.LightningModule, data: pl.LightningDataModule
) -> Any:
    """Test on this rank."""
    with quiet_lightning():
        make_trainer(stage, 1, []).test(module, datamodule=data, verbose=False)
    _forget_trainer(data)
    return module.measures()  # type: ignore[operator]


def _ranks_for(context: StageContext, stage: str, module: nn.Module) -> Callable[..., Any]:
    """All ranks; this process alone for a network with BatchNorm on the CPU, which torch cannot synchronise there."""
    normalises = any(isinstance(part, _BatchNorm) for part in module.modules())
    if context.ranks.several and context.device.type == "cpu" and normalises:
        log.warning("%s: BatchNorm cannot be shared by processes on the CPU; one of them trains alone.", stage)
        return _alone
    return context.ranks


def _alone(work: Callable[..., Any], /, *args: Any) -> Any:
    """Call ``work`` on this process only."""
    return work(*args)


def _forget_trainer(data: pl.LightningDataModule | None) -> None:
    """Drop a DataModule's reference to its Trainer, which cannot be pickled for another rank."""
    if data is not None:
        data.trainer = None


@contextmanager
def torch_flags_kept() -> Iterator[None]:
    """Restore the flags that a Trainer with ``deterministic`` or ``benchmark`` sets for the whole process."""
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark


class quiet_lightning(warnings.catch_warnings):
    """Turn off Lightning's advice that does not apply here.

    Loaders without workers are a choice, a folder of a resumed training is not empty, and not every process on a
    cluster's machine is a SLURM step.
    """

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
