"""Lines of progress: often enough to follow, and not so often that they flood a log."""

import logging
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from salve.processes import progress
from salve.processes.progress import LATE, SOON, Pace, ProgressLines, counted
from salve.processes.trainer import TrainerFactory


class Clock:
    """A clock that the tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def said_at(seconds_per_step: float, steps: int) -> list[int]:
    """The steps after which a line is due."""
    clock = Clock()
    pace = Pace(clock=clock)
    due = []
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        if pace.due(step / steps):
            due.append(step)
    return due


def test_short_work_says_nothing() -> None:
    assert said_at(seconds_per_step=0.009, steps=1000) == []


def test_a_tenth_at_a_time() -> None:
    assert said_at(seconds_per_step=0.2, steps=1000) == list(range(100, 1001, 100))


def test_not_more_often_than_every_ten_seconds_though_tenths_pass_faster() -> None:
    assert said_at(seconds_per_step=0.03, steps=1000) == [334, 668]  # of 30 s


def test_long_work_says_a_line_every_half_minute() -> None:
    due = said_at(seconds_per_step=2.0, steps=810)  # 27 minutes
    assert due == list(range(15, 811, 15))
    assert len(due) == 27 * 60 / LATE


def test_resumed_work_counts_from_there() -> None:
    clock = Clock()
    pace = Pace(0.5, clock)
    clock.now += SOON
    assert not pace.due(0.55)
    assert pace.due(0.6)


def test_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(Pace.__init__, "__defaults__", (0.0, clock))
    said: list[str] = []
    advance = counted("capturing avgpool (train)", 4000, said.append)
    for _ in range(40):
        clock.now += 4
        advance(100)
    assert said[:2] == ["capturing avgpool (train): 400 of 4,000", "capturing avgpool (train): 800 of 4,000"]
    assert len(said) == 10
    assert said[-1] == "capturing avgpool (train): 4,000 of 4,000"


class Learner(pl.LightningModule):
    """Learns nothing; the test sets how long the validation of an epoch takes."""

    def __init__(self, clock: Clock, per_batch: float) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.clock, self.per_batch = clock, per_batch

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        self.clock.now += self.per_batch
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("select_accuracy", 0.8123, on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("per_batch", "epochs", "expected"),
    [
        (3.0, 3, [f"finetune: epoch {epoch} of 3, select accuracy 81.2 %" for epoch in (1, 2, 3)]),
        (0.1, 3, []),
        (
            8.0,
            1,
            ["finetune: epoch 1 of 1, batch 4 of 5"],
        ),
    ],
)
def test_a_training_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, per_batch: float, epochs: int, expected: list[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(Pace.__init__, "__defaults__", (0.0, clock))
    said: list[str] = []
    trainer = pl.Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        callbacks=[ProgressLines("finetune", said.append)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(TensorDataset(torch.zeros(5, 1)), batch_size=1)
    trainer.fit(Learner(clock, per_batch), batches, DataLoader(TensorDataset(torch.zeros(1, 1))))
    assert said == expected


@pytest.mark.parametrize("lines", [True, False])
def test_trainers_show_lines_where_there_is_no_terminal(lines: bool, caplog: pytest.LogCaptureFixture) -> None:
    trainer_factory = TrainerFactory("cpu", None, 1, "32-true", None, bar=False, lines=lines)
    with caplog.at_level(logging.ERROR):
        trainer: Any = trainer_factory("finetune", 1, [])
    assert any(isinstance(callback, ProgressLines) for callback in trainer.callbacks) == lines
    assert not TrainerFactory.__getstate__(trainer_factory)["lines"]  # a follower on another rank says nothing
