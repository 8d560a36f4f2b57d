"""How far the work is, as lines: for logs and pipes, where a bar that is drawn over and over shows nothing."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

#: Seconds from line to line: at least, however fast it goes; at most, however slowly.
SOON, LATE = 10.0, 30.0
#: The share of the work after which a line is due, unless it is too soon.
PART = 0.1
#: What an epoch's line says of the model, of what its module logs.
SHOWN = {"select_accuracy": "select accuracy", "fve": "variance explained"}

Say = Callable[[str], None]


class Pace:
    """When the next line is due.

    Args:
        share: of the work that is done at the beginning, 0 to 1. clock: seconds that pass.
    """

    def __init__(self, share: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = share
        self._when = clock()

    def due(self, share: float) -> bool:
        """Whether to say now that this share is done; if so, the next line counts from here."""
        waited = self._clock() - self._when
        if waited < SOON or (share - self._said < PART - 1e-9 and waited < LATE):
            return False
        self._said, self._when = share, self._clock()
        return True

    def late(self) -> bool:
        """Whether nothing was said for so long that a line is due in the middle of things."""
        return self._clock() - self._when >= LATE


def counted(what: str, total: int, say: Say) -> Callable[[int], None]:
    """``advance(n)``, which counts to ``total`` and now and then says how far it is: "capturing: 1,200 of 4,000"."""
    pace, done = Pace(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if pace.due(done / max(1, total)):
            say(f"{what}: {done:,} of {total:,}")

    return advance


class ProgressLines(Callback):
    """A line for about every tenth of a training, with what its last epoch came to.

    Args:
        stage: what is trained, for people. say: given each line.
    """

    def __init__(self, stage: str, say: Say) -> None:
        self._stage, self._say = stage, say
        self._pace = Pace()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count, where a training that is gone on with left off."""
        self._pace = Pace(self._share(trainer, trainer.current_epoch))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Within a long epoch."""
        batches = trainer.num_training_batches
        within = (batch_idx + 1) / batches  # 0 where nobody knows how many there are
        if within < 1 and self._pace.late() and self._pace.due(self._share(trainer, trainer.current_epoch + within)):
            of = f" of {batches:,}" if math.isfinite(batches) else ""
            self._say(f"{self._epoch(trainer)}, batch {batch_idx + 1:,}{of}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epoch's validation."""
        if self._pace.due(self._share(trainer, trainer.current_epoch + 1)):
            measured = [
                f", {title} {100 * float(trainer.callback_metrics[name]):.1f} %"
                for name, title in SHOWN.items()
                if name in trainer.callback_metrics
            ]
            self._say(self._epoch(trainer) + "".join(measured))

    def _epoch(self, trainer: pl.Trainer) -> str:
        # Of an SAE Lightning's epochs are equal parts of its steps.
        unit = "epoch" if self._stage == "finetune" else "part"
        return f"{self._stage}: {unit} {trainer.current_epoch + 1} of {trainer.max_epochs}"

    @staticmethod
    def _share(trainer: pl.Trainer, epochs: float) -> float:
        return epochs / max(1, trainer.max_epochs or 1)
