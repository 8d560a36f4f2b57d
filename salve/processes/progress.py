# SPDX-License-Identifier: MIT
"""Show progress as lines, for logs and pipes, where a progress bar cannot be redrawn."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

#: Seconds between two lines: at least SOON, and at most about LATE.
SOON, LATE = 10.0, 30.0
#: The share of the work after which the next line is due, once SOON has passed.
PART = 0.1
#: Measures that a line shows after an epoch, by the name under which they are logged.
SHOWN = {"select_accuracy": "select accuracy", "fve": "variance explained"}

Say = Callable[[str], None]


class Pace:
    """Decides when the next line is due.

    Args:
        share: the share of the work that is done at the start, 0 to 1.
        clock: returns seconds.
    """

    def __init__(self, share: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = share
        self._when = clock()

    def due(self, share: float) -> bool:
        """Whether a line is due now that this share is done; if so, the time to the next line starts here."""
        waited = self._clock() - self._when
        if waited < SOON or (share - self._said < PART - 1e-9 and waited < LATE):
            return False
        self._said, self._when = share, self._clock()
        return True

    def late(self) -> bool:
        """Whether LATE seconds have passed since the last line."""
        return self._clock() - self._when >= LATE


def counted(what: str, total: int, say: Say) -> Callable[[int], None]:
    """Return ``advance(n)``, which counts to ``total`` and says lines such as "capturing: 1,200 of 4,000"."""
    pace, done = Pace(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if pace.due(done / max(1, total)):
            say(f"{what}: {done:,} of {total:,}")

    return advance


class ProgressLines(Callback):
    """Lightning callback: a line for about every tenth of a training, with the measures of its last epoch.

    Args:
        stage: ``finetune`` or ``discover``; begins each line.
        say: called with each line.
    """

    def __init__(self, stage: str, say: Say) -> None:
        self._stage, self._say = stage, say
        self._pace = Pace()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting; a resumed training starts at its epoch."""
        self._pace = Pace(self._share(trainer, trainer.current_epoch))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say a line within a long epoch."""
        batches = trainer.num_training_batches
        within = (batch_idx + 1) / batches  # 0 if the number of batches is unknown, and so infinite
        if within < 1 and self._pace.late() and self._pace.due(self._share(trainer, trainer.current_epoch + within)):
            of = f" of {batches:,}" if math.isfinite(batches) else ""
            self._say(f"{self._epoch(trainer)}, batch {batch_idx + 1:,}{of}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say a line with the epoch's measures; its validation is over."""
        if self._pace.due(self._share(trainer, trainer.current_epoch + 1)):
            measured = [
                f", {title} {100 * float(trainer.callback_metrics[name]):.1f} %"
                for name, title in SHOWN.items()
                if name in trainer.callback_metrics
            ]
            self._say(self._epoch(trainer) + "".join(measured))

    def _epoch(self, trainer: pl.Trainer) -> str:
        # For an SAE, an epoch of Lightning is an equal part of its steps.
        unit = "epoch" if self._stage == "finetune" else "part"
        return f"{self._stage}: {unit} {trainer.current_epoch + 1} of {trainer.max_epochs}"

    @staticmethod
    def _share(trainer: pl.Trainer, epochs: float) -> float:
        return epochs / max(1, trainer.max_epochs or 1)
