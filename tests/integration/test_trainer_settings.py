"""Arguments of the Trainer and callbacks apply on every rank and change the key of what they train."""

from pathlib import Path

import pandas as pd
import pytest
import pytorch_lightning as pl

from salve.artifacts import Artifact
from salve.run.folder import RunFolder
from salve.types import UserError
from tests.integration.conftest import Start
from tests.integration.test_ddp import TWO, VIT

MINE = "tests.integration.test_trainer_settings.Noting"


class Noting(pl.Callback):
    """Notes, in a folder, the steps and settings of each training that it sees."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write one file for each training and rank."""
        facts = f"{trainer.global_step} {trainer.gradient_clip_val}"
        (self.folder / f"{type(pl_module).__name__} {trainer.global_rank}").write_text(facts)


def keys(artifacts: dict[str, Artifact]) -> dict[str, str]:
    return {kind: artifact.key for kind, artifact in artifacts.items()}


def test_they_apply_to_the_training_of_their_stages_and_are_in_its_key(start: Start, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    only = "stages=[discover]"
    plain = start(tmp_path, only)
    mine = [f"callbacks.mine._target_={MINE}", f"callbacks.mine.folder={tmp_path}/notes"]
    seen = start(tmp_path, only, *mine, "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5")
    # 80 images in batches of 20 and two epochs are 8 steps, and half as many when two batches are one step.
    assert (tmp_path / "notes" / "Classifier 0").read_text() == "4 0.5"
    assert (tmp_path / "notes" / "SparseAutoencoder 0").read_text().endswith(" None")
    assert all(keys(seen)[kind] != key for kind, key in keys(plain).items())
    with pytest.raises(UserError, match=rf"names the class callbacks\.mine\._target_={MINE}, which is none of Lightn"):
        RunFolder(tmp_path / "run").settings()
    assert RunFolder(tmp_path / "run").settings([mine[0]]).callbacks["mine"]["_target_"] == MINE

    monitored = start(tmp_path, only, "callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor",
                      "callbacks.lr._stages_=[discover]")  # fmt: skip
    assert keys(monitored)["classifier"] == keys(plain)["classifier"]
    assert keys(monitored)["sae"] != keys(plain)["sae"]
    assert monitored["sae"].digest != plain["sae"].digest  # its history has the learning rate as well
    assert "lr-Adam" in pd.read_csv(monitored["sae"].file("history.csv"))
    assert monitored["sae"].tensors("sae.safetensors").keys() == plain["sae"].tensors("sae.safetensors").keys()

    stored = RunFolder(tmp_path / "run").settings()
    assert stored.callbacks["lr"]["_stages_"] == ["discover"]
    again = start(tmp_path, only)
    assert {kind: artifact.reused for kind, artifact in again.items()} == dict.fromkeys(plain, True)
    assert keys(again) == keys(plain)


@pytest.mark.usefixtures("_ranks_are_forks")
def test_every_rank_has_them(start: Start, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    mine = [f"callbacks.mine._target_={MINE}", f"callbacks.mine.folder={tmp_path}/notes", "callbacks=learning_rate"]
    start(tmp_path, *VIT, "stages=[finetune]", "trainer.gradient_clip_val=0.25", *mine, *TWO)
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == ["Classifier 0", "Classifier 1"]
    assert {path.read_text().split()[1] for path in (tmp_path / "notes").iterdir()} == {"0.25"}
