"""Ranks: how they are found and refused, and pieces of work that fail."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from salve.activations.rows import rows_loader
from salve.backbones import Classifier
from salve.distributed import batch_share, rank_and_world_size
from salve.processes.followers import StartedFollowers
from salve.processes.ranks import Ranks, _OutsideRank, check_ranks, gathered
from salve.processes.trainer import TrainerFactory, _SharedBatchNorm
from salve.settings import TrainerSettings
from salve.stages.training import quiet_lightning
from salve.types import UserError
from tests.integration.commands import Command, ranks_are_forks
from tests.unit.test_ending import is_gone

TWO = TrainerSettings("cpu", 2, "ddp_spawn", "32-true")

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"}
SRUN = {**SRUN, "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, _OutsideRank(3, 4, 1, 2)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (SRUN, _OutsideRank(3, 4, 1, 2)),
        (BATCH_SCRIPT, None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({**TORCHRUN, "SALVE_RANK_PROCESS": "1"}, None),
    ],
    ids=["alone", "torchrun", "one of one", "srun", "sbatch without srun", "one task", "started by a leader"],
)
def test_a_rank_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], expected: _OutsideRank | None
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _OutsideRank.found() == expected


def test_ranks_that_would_run_the_whole_sweep_are_refused() -> None:
    ddp = TrainerSettings("cpu", 2, "ddp", "32-true")
    with pytest.raises(UserError, match=r"whole command again.*trainer=ddp .*torchrun --nproc-per-node=2.*slurm"):
        check_ranks(ddp)
    with pytest.raises(UserError, match="whole command again"), gathered(ddp):
        pass
    check_ranks(ddp, from_outside=True)
    check_ranks(TrainerSettings("cpu", 1, "ddp", "32-true"))
    check_ranks(TWO)


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    three = TrainerSettings("auto", 3, "auto", "auto")
    with pytest.raises(UserError, match=r"trainer\.devices=3, but each rank sees 2"), gathered(three):
        pass
    with gathered(TrainerSettings("auto", 2, "auto", "auto"), [4, 5]) as ranks:
        assert (ranks.accelerator, ranks.gpus, ranks.several) == ("cuda", [4, 5], True)


# -- pieces of work on two processes


def rank_and_sum(number: float) -> tuple[int, float]:
    total = torch.tensor(number + distributed.get_rank())
    distributed.all_reduce(total)
    return distributed.get_rank(), float(total)


def gradient_of_shares(sizes: list[int]) -> float:
    """DDP's gradient of ``mean((w · x)²)`` at w = 1; this rank has as many rows as its size, all of its number + 1."""
    rank = distributed.get_rank()
    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(weight.weight)
    rows = torch.full((sizes[rank], 1), rank + 1.0)
    (
        (weight(rows) ** 2).mean() * batch_share(len(rows)) if len(rows) else 0 * weight(torch.zeros(1, 1)).sum()
    ).backward()
    if not len(rows):
        batch_share(0)
    assert weight.weight.grad is not None
    distributed.all_reduce(weight.weight.grad)
    return float(weight.weight.grad) / distributed.get_world_size()


def fail(rank: int, kind: type[Exception], sentence: str) -> None:
    if distributed.get_rank() == rank:
        raise kind(sentence)
    distributed.barrier()


def die(rank: int) -> None:
    if distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def threads() -> int:
    return torch.get_num_threads()


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes, shared by the tests of this module: after a piece that fails they can do the next one."""
    with pytest.MonkeyPatch.context() as patch:
        ranks_are_forks(patch)
        with gathered(TWO) as ranks:
            yield ranks
            assert isinstance(ranks._followers, StartedFollowers)
            (follower,) = ranks._followers._followers
        assert not follower.is_alive()


def test_all_ranks_do_a_piece_and_the_leader_answers(two: Ranks) -> None:
    assert two(rank_and_sum, 3.0) == (0, 7.0)
    assert not distributed.is_initialized()


@pytest.mark.parametrize("sizes", [[2, 2], [3, 2], [1, 0]])
def test_the_average_of_shares_is_the_gradient_of_the_whole_batch(two: Ranks, sizes: list[int]) -> None:
    rows = torch.tensor([1.0] * sizes[0] + [2.0] * sizes[1])
    assert two(gradient_of_shares, sizes) == pytest.approx(float((2 * rows**2).mean()))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_any_rank_is_raised_by_the_leader(two: Ranks, rank: int) -> None:
    with pytest.raises(UserError, match=r"^the image 7 is damaged$"):
        two(fail, rank, UserError, "the image 7 is damaged")
    with pytest.raises(RuntimeError, match="out of memory"):
        two(fail, rank, RuntimeError, "out of memory")
    assert two(rank_and_sum, 0.0) == (0, 1.0)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_replaced(two: Ranks) -> None:
    with pytest.raises(RuntimeError, match="status -9"):
        two(die, 1)
    assert two(rank_and_sum, 0.0) == (0, 1.0)


def test_the_ranks_share_the_cores(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert two(threads) == 2
        assert torch.get_num_threads() == 4
        assert "OMP_NUM_THREADS" not in os.environ
    finally:
        torch.set_num_threads(before)


class Forgetful(torch.nn.Module):
    """A classifier with a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.forgotten = torch.nn.Parameter(torch.ones(3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(rows)
        return out


def trained(trainer_factory: TrainerFactory, module: Classifier, loaders: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    with quiet_lightning():
        trainer_factory("finetune", 2, []).fit(module, **loaders)
    return module.model.state_dict()


def test_a_parameter_without_a_gradient_stays_as_it_is(two: Ranks) -> None:
    rows, labels = torch.randn(21, 4), torch.arange(21) % 3  # the last batch has one row
    loaders = {f"{name}_dataloaders": rows_loader(rows, labels, batch_size=5) for name in ("train", "val")}
    states = []
    for ranks, size in ((Ranks("cpu"), 1), (two, 2)):
        torch.manual_seed(1)
        trainer_factory = TrainerFactory("cpu", None, size, "32-true", None, False)
        states.append(ranks(trained, trainer_factory, Classifier(Forgetful(), torch.arange(3), 0.1, 0.1), loaders))
    assert torch.equal(states[1]["forgotten"], torch.ones(3))
    torch.testing.assert_close(states[1], states[0])


def test_batchnorm_over_ranks_keeps_the_activations_inside_timms(tiny: Callable[[str], torch.nn.Module]) -> None:
    images = torch.randn(2, 3, 32, 32)
    for name in ("resnet18", "timm efficientnet"):
        model = tiny(name)
        before, keys = model(images), list(model.state_dict())
        shared = _SharedBatchNorm().apply(model)
        assert any(isinstance(part, torch.nn.SyncBatchNorm) for part in shared.modules())
        torch.testing.assert_close(shared(images), before)
        assert list(_SharedBatchNorm().revert(shared).state_dict()) == keys


def lead(told: Path) -> None:
    """Write the process id of a follower, and wait."""
    with gathered(TWO) as ranks:
        assert ranks(rank_and_world_size) == (0, 2)
        assert isinstance(ranks._followers, StartedFollowers)
        told.with_suffix(".new").write_text(str(ranks._followers._followers[0].pid))
        told.with_suffix(".new").rename(told)
        time.sleep(60)


@pytest.mark.slow
def test_followers_end_with_a_leader_that_is_killed(tmp_path: Path) -> None:
    """The follower is not a fork: it is spawned, as users have it."""
    leader = Command("tests.unit.test_ranks", [str(tmp_path / "told")], tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "told").exists():
        assert leader.poll() is None, leader.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    follower = int((tmp_path / "told").read_text())
    os.kill(follower, 0)
    leader.send_signal(signal.SIGKILL)
    leader.wait(60)
    deadline = time.monotonic() + 30
    while not is_gone(follower) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(follower)
    assert leader.communicate()[1] == ""


if __name__ == "__main__":
    lead(Path(sys.argv[1]))
