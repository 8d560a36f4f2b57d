"""Checkpoints survive what kills a training: whole or not there, and written in an order that loses nothing."""

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from salve.artifacts import keep
from salve.backbones import Classifier
from salve.processes.trainer import TrainerFactory, _Checkpoints
from salve.stages.resume import resumable
from salve.stages.training import Training, fit_on_rank
from salve.types import UserError
from tests.integration.conftest import Start
from tests.integration.test_resume import Killed, die_after


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, path, plain = _Checkpoints(), tmp_path / "new" / "last.ckpt", torch.save
    writer.save_checkpoint({"epoch": 1}, path)

    def full_disk(value: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        writer.save_checkpoint({"epoch": 2}, path)
    monkeypatch.setattr(torch, "save", plain)
    assert writer.load_checkpoint(path) == {"epoch": 1}
    assert sorted(path.parent.iterdir()) == [path, path.with_name("last.ckpt.sha256")]
    writer.save_checkpoint({"epoch": 2}, path)
    assert writer.load_checkpoint(path) == {"epoch": 2}


def test_the_best_weights_are_kept_before_the_epoch_counts_as_done(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    plain = _Checkpoints.save_checkpoint

    def watch(self: _Checkpoints, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        written.append(f"{Path(path).stem} {checkpoint['epoch']}")
        plain(self, checkpoint, path)

    monkeypatch.setattr(_Checkpoints, "save_checkpoint", watch)
    start(tmp_path, "stages=[finetune]", "finetune.epochs=3")
    best = [place for place, name in enumerate(written) if name.startswith("best")]
    assert best
    assert all(written[place + 1] == written[place].replace("best", "last") for place in best)
    assert [name for name in written if name.startswith("last")] == ["last 0", "last 1", "last 2"]


class Scripted(pl.LightningModule):
    """Its accuracy on select is the epoch's of a list, and its weight counts steps."""

    accuracies = (0.5, 0.9, 0.3, 0.4)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("select_accuracy", self.accuracies[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0)


def scripted(folder: Path) -> list[dict[str, float]]:
    """Train, or go on to train, for four epochs of one step."""
    training = Training(
        "finetune", 0, folder, resumable(folder, "x"), len(Scripted.accuracies), "select_accuracy", None
    )
    rows: Any = torch.zeros(1, 1)
    batches = torch.utils.data.DataLoader[Any](rows)
    data = {"train_dataloaders": batches, "val_dataloaders": batches}
    return fit_on_rank(TrainerFactory("cpu", None, 1, "32-true", None, False), training, Scripted(), data)


@pytest.mark.parametrize("put", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_the_best_epoch_is_known_in_a_folder_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path, Path], Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", die_after(3))
        with pytest.raises(Killed):
            scripted(tmp_path / "there")
    assert torch.load(tmp_path / "there" / "last.ckpt")["epoch"] == 2
    put(tmp_path / "there", tmp_path / "here")
    left = {path: path.read_bytes() for path in tmp_path.glob("there/*")}
    rows = scripted(tmp_path / "here")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    best, last = (torch.load(tmp_path / "here" / f"{name}.ckpt") for name in ("best", "last"))
    # Not the last epoch's, which is the best of those since.
    assert (float(best["state_dict"]["weight"]), float(last["state_dict"]["weight"])) == (2, 4)
    (kept,) = (state for name, state in last["callbacks"].items() if "select_accuracy" in name)
    assert (kept["best_model_path"], float(kept["best_model_score"])) == (
        str(tmp_path / "here" / "best.ckpt"),
        pytest.approx(0.9),
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("there/*")} == left


THREE_EPOCHS = ["stages=[finetune]", "finetune.epochs=3"]


@pytest.fixture(scope="module")
def calm(start: Start, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a classifier that was trained without interruption."""
    return start(tmp_path_factory.mktemp("calm"), *THREE_EPOCHS)["classifier"].digest


@pytest.mark.parametrize(("damaged", "how"), [("last", "cut"), ("best", "changed")])
def test_a_damaged_checkpoint_starts_its_training_again(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calm: str,
    damaged: str,
    how: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", die_after(2))
        with pytest.raises(Killed):
            start(tmp_path, *THREE_EPOCHS)
    (path,) = (tmp_path / "store").rglob(f"{damaged}.ckpt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # which torch would not notice
    path.write_bytes(content if how == "changed" else content[:1000])
    with caplog.at_level(logging.WARNING):
        found = start(tmp_path, *THREE_EPOCHS)
    assert f"{damaged}.ckpt is cut, changed or another training's" in caplog.text
    assert found["classifier"].digest == calm


def test_a_diverged_training_leaves_nothing_that_a_better_one_goes_on_from(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = Classifier.training_step

    def broken(self: Classifier, batch: Any, number: int) -> torch.Tensor:
        loss = plain(self, batch, number)
        if not number:
            seen.append(self.current_epoch)
        self.train_loss.update(torch.tensor(torch.nan), 1)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", broken)
        with pytest.raises(UserError, match="train_loss became NaN or infinite; lower its learning rate"):
            start(tmp_path, *THREE_EPOCHS)
    assert seen == [0]  # it did not go on to the end
    assert not list((tmp_path / "store").rglob("*.ckpt"))
    found = start(tmp_path, *THREE_EPOCHS)
    assert found["classifier"].table("history.csv")["epoch"].max() == 2


def test_a_checkpoint_of_a_diverged_training_is_not_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for loss, expected in ((1.0, tmp_path / "last.ckpt"), (math.nan, None), (math.inf, None)):
        torch.save({"callbacks": {"History": {"rows": [{"epoch": 0, "train_loss": loss}]}}}, tmp_path / "new")
        keep(tmp_path / "new", tmp_path / "last.ckpt")
        assert resumable(tmp_path, None) == expected
    assert "diverged (train_loss)" in caplog.text
