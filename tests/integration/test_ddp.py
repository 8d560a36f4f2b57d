"""Two processes give the results of one, in training, measuring and resuming, also with odd batches."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from salve.artifacts import Artifact
from salve.types import UserError
from tests.integration.commands import Command
from tests.integration.conftest import FEW, SMALL, Start
from tests.integration.test_resume import Killed, die_after

#: Without BatchNorm. 40 images in each split: the last batch of 13 has one row, and one rank none.
VIT = ["backbone=timm", "backbone.name=test_vit", "backbone.weights=random", "+backbone.args.img_size=32"]
VIT += ["+backbone.args.depth=1"]
UNEVEN = [
    "data.train_per_class=4",
    "data.select_per_class=4",
    "data.test_per_class=4",
    "data.batch_size=13",
    "sae.batch_size=13",
]
SETTINGS = [*VIT, *UNEVEN, "edit.evaluate=2", "stages=[discover,control]"]
TWO = ["trainer.devices=2", "trainer.strategy=ddp_spawn"]

PROBE = [*SETTINGS, "finetune=probe", "finetune.epochs=3"]
MODES = {
    "full": [*SETTINGS, "data.train_per_class=5"],
    "probe": PROBE,
    # The activations of 64 channels do not fit: head and SAE are trained on blocks of two batches.
    "streamed": [*PROBE, "trainer.memory=2e-5"],
}

Runs = Callable[[str, bool], dict[str, Artifact]]

pytestmark = pytest.mark.usefixtures("_ranks_are_forks")


@pytest.fixture(scope="module")
def runs(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """``runs(mode, two)``: the artifacts of one run, on one process or two."""
    done: dict[tuple[str, bool], dict[str, Artifact]] = {}

    def run(mode: str, two: bool) -> dict[str, Artifact]:
        if (mode, two) not in done:
            done[mode, two] = start(tmp_path_factory.mktemp(mode), *MODES[mode], *(TWO if two else []))
        return done[mode, two]

    return run


def assert_same(one: Artifact, two: Artifact, *files: str) -> None:
    """Compare tensors and tables of two artifacts, up to the rounding of float32 sums in another order."""
    for file in files:
        if file.endswith(".safetensors"):
            ours, theirs = one.tensors(file), two.tensors(file)
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4)
            continue
        numbers = one.table(file).select_dtypes("number")
        assert len(numbers) > 1
        for column in numbers:
            assert two.table(file)[column].to_list() == pytest.approx(numbers[column].to_list(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", list(MODES))
def test_two_processes_train_and_measure_what_one_does(runs: Runs, mode: str) -> None:
    one, two = runs(mode, False), runs(mode, True)
    assert_same(one["classifier"], two["classifier"], "model.safetensors", "history.csv")
    assert_same(one["sae"], two["sae"], "sae.safetensors", "history.csv")
    assert_same(one["control"], two["control"], "evaluation.csv")
    confusion = two["control"].table("confusion.csv")
    assert confusion.equals(one["control"].table("confusion.csv"))
    # Every test image once, for the untouched network and for each of the two edits.
    assert confusion.groupby("target")["images"].sum().tolist() == [40, 40, 40]
    for artifact, key_settings in (("classifier", "key.json"), ("sae", "key.json"), ("sae", "sae.json")):
        assert one[artifact].record(key_settings).get("shuffled_within") == (26 if mode == "streamed" else None)
    losses = one["sae"].table("history.csv")["loss"]
    assert losses.iloc[-1] < 0.99 * losses.iloc[0]  # they do not just agree on where they began


def test_a_training_of_two_goes_on_from_its_last_epoch(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    arguments = [*MODES["probe"], *TWO]
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", die_after(2))
        with pytest.raises(Killed):
            start(tmp_path, *arguments)
    assert not list((tmp_path / "store" / "artifacts").glob("classifier/*"))
    assert list((tmp_path / "store").rglob("last.ckpt"))
    # The same bits as without the kill.
    assert start(tmp_path, *arguments)["sae"].digest == runs("probe", True)["sae"].digest


def test_batches_that_must_be_normalised_as_a_whole_stay_with_one_process(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = start(tmp_path / "one", "stages=[finetune]")
    with caplog.at_level(logging.WARNING):
        two = start(tmp_path / "two", "stages=[finetune]", *TWO)
    assert two["classifier"].digest == one["classifier"].digest
    assert "BatchNorm cannot be shared by processes on the CPU" in caplog.text


def test_ddp_that_would_run_the_command_again_is_refused(start: Start, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by running the whole command again"):
        start(tmp_path, "trainer.devices=2", "trainer.strategy=ddp")
    assert not (tmp_path / "store").exists()


# -- ranks that torchrun starts


def torchrun(folder: Path, *overrides: str) -> Command:
    """A command whose ranks are forks as well."""
    arguments = [
        *("--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=127.0.0.1:0", "-m", "salve.cli"),
        *(*SMALL, *FEW, f"output_dir={folder / 'store'}", f"hydra.run.dir={folder / 'run'}", *overrides),
    ]
    return Command("torch.distributed.run", arguments, folder, {"TORCH_CPP_LOG_LEVEL": "ERROR"})


def test_torchrun_makes_one_run_of_its_ranks(tmp_path: Path, runs: Runs) -> None:
    done = torchrun(tmp_path, *MODES["full"], "trainer.devices=2", "trainer.strategy=ddp")
    out, errors = done.communicate(200)
    assert done.returncode == 0, errors
    assert out.count("sae: ") == 1  # one of them led
    one = runs("full", False)
    for kind, file, table in (
        ("classifier", "model.safetensors", "history.csv"),
        ("sae", "sae.safetensors", "history.csv"),
        ("control", "confusion.csv", "evaluation.csv"),
    ):
        folder = next((tmp_path / "store" / "artifacts" / kind).iterdir())
        assert_same(one[kind], Artifact(kind, folder.name, folder, "", False), file, table)


def test_followers_end_with_a_leader_that_refuses(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [*SMALL, *FEW, f"output_dir={tmp_path / 'store'}", f"hydra.run.dir={tmp_path / 'run'}"]
    # As torchrun would start them, but with the status of each.
    common = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    leader, follower = (
        Command("salve.cli", [*settings, "trainer.devices=3"], tmp_path, common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    )
    _, said = leader.communicate()
    assert said == "salve: trainer.devices=3, but 2 ranks were started on each node; set trainer.devices=2.\n"
    assert (leader.returncode, follower.wait()) == (2, 1)
    assert follower.communicate() == ("", "")
    assert not (tmp_path / "store").exists()
