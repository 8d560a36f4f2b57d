"""Killed runs continue: between stages, within a training, and after SIGKILL of the real command."""

import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import pytorch_lightning as pl

from salve.artifacts import DONE
from salve.stages import training
from tests.integration.commands import Command
from tests.integration.conftest import FEW, NARROW, SMALL, Start


class Killed(BaseException):
    """Stands for a kill: not even ``except Exception`` sees it."""


def die_after(epochs: int):  # type: ignore[no-untyped-def]
    """A ``Trainer.fit`` that dies once ``epochs`` of this process's epochs are behind it."""
    plain = pl.Trainer.fit

    class Die(pl.Callback):
        seen = 0

        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.seen += 1
            if self.seen > epochs:
                raise Killed

    def fit(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.callbacks.append(Die())
        return plain(self, *args, **kwargs)

    return fit


@pytest.mark.parametrize(("stage", "kind", "key"), [("finetune", "classifier", "finetune"), ("discover", "sae", "sae")])
def test_a_training_goes_on_from_its_last_epoch_wherever_its_folder_is_now(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, kind: str, key: str
) -> None:
    epochs = [f"{key}.epochs=4"]
    monkeypatch.setattr("salve.stages.train.PARTS", 4)  # what the Trainer calls epochs of an SAE
    if kind == "sae":
        start(tmp_path, *epochs, "stages=[finetune]")
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", die_after(2))
        with pytest.raises(Killed):
            start(tmp_path, *epochs, f"stages=[{stage}]")
    assert not list((tmp_path / "store" / "artifacts").glob(f"{kind}/*"))
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "store").rename(moved / "store")
    begun: list[int] = []
    plain = training.fit

    def watch(context, name, module, *args, **kwargs):  # type: ignore[no-untyped-def]
        hook = module.on_train_epoch_start
        module.on_train_epoch_start = lambda: (begun.append(module.current_epoch), hook())[1]
        return plain(context, name, module, *args, **kwargs)

    for name in ("finetune", "train"):
        monkeypatch.setattr(import_module(f"salve.stages.{name}"), "fit", watch)
    found = start(moved, *epochs, f"stages=[{stage}]")
    assert begun == [2, 3]
    history = found[kind].table("history.csv")
    if kind == "sae":
        assert history["step"].tolist() == [
            found[kind].record("sae.json")["steps"] * part // 4 for part in (1, 2, 3, 4)
        ]
    else:
        assert sorted(set(history["epoch"])) == [0, 1, 2, 3]

    # The interruption leaves no trace: the same bits as a training that was never interrupted.
    (tmp_path / "calm").mkdir()
    calm = start(tmp_path / "calm", *epochs, f"stages=[{stage}]")
    assert calm[kind].digest == found[kind].digest


def test_a_capture_goes_on_from_its_last_shard(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", 30)
    start(tmp_path, "stages=[finetune]")
    module = sys.modules["salve.backbones.cut"]
    real, calls = module.site_activations, list[int]()

    def counted(model, site, images):  # type: ignore[no-untyped-def]
        calls.append(len(images))
        if len(calls) == 4:
            raise Killed
        return real(model, site, images)

    monkeypatch.setattr(module, "site_activations", counted)
    with pytest.raises(Killed):
        start(tmp_path, "stages=[discover]")
    before = len(calls)
    start(tmp_path, "stages=[discover]")
    # Every command first tries itself out on four images. Of the splits, the first shard of 30 was whole at the kill.
    assert sum(calls[before:]) == 4 + 80 + 40 + 40 - 30


def test_sigkill_leaves_nothing_half_written_and_the_same_command_finishes(tmp_path: Path) -> None:
    settings = [*SMALL, *FEW, *NARROW, f"output_dir={tmp_path / 'store'}", "finetune.epochs=12", "stages=[finetune]"]
    process = Command("salve.cli", settings, tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").rglob("last.ckpt")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    artifacts = tmp_path / "store" / "artifacts"
    assert not list(artifacts.rglob(DONE))
    again = Command("salve.cli", settings, tmp_path)
    assert again.wait() == 0, again.communicate()
    assert len(list(artifacts.rglob(DONE))) == 1
    assert not [path for path in (artifacts / "unfinished").iterdir() if path.is_dir()]
