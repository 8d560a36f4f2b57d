"""Each run leases its own GPU; names stand for GPUs."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from salve.processes.gpus import accelerator_of, lease, leased_gpus
from salve.settings import TrainerSettings
from salve.types import UserError

NAMES = ["GPU-a", "GPU-b"]


def test_no_two_runs_hold_a_gpu(tmp_path: Path) -> None:
    held, most, lock = set[int](), list[int](), threading.Lock()

    def run() -> None:
        for _ in range(3):
            with lease(NAMES, 1, tmp_path) as (gpu,):
                with lock:
                    assert gpu not in held
                    held.add(gpu)
                    most.append(len(held))
                time.sleep(0.02)
                with lock:
                    held.remove(gpu)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run) for _ in range(4)]:
            done.result(60)
    assert len(most) == 12
    assert max(most) == 2


def test_a_killed_run_gives_its_gpu_back(tmp_path: Path) -> None:
    holder = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held'); input()"
    locks = [str(tmp_path / f"{name}.lock") for name in NAMES]
    runs = [
        subprocess.Popen(
            [sys.executable, "-uc", holder, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for lock in locks
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "held\n"
    threading.Timer(0.7, runs[1].kill).start()
    begun = time.monotonic()
    with lease(NAMES, 1, tmp_path) as gpus:
        assert gpus == [1]
        assert time.monotonic() - begun > 0.6  # it waited for the kill
    for run in runs:
        run.communicate("\n")


def test_two_are_leased_together_or_not_at_all(tmp_path: Path) -> None:
    with lease(NAMES, 1, tmp_path) as mine:
        got: list[list[int]] = []

        def want() -> None:
            with lease(NAMES, 2, tmp_path) as both:
                got.append(both)

        waiting = threading.Thread(target=want)
        waiting.start()
        waiting.join(1.2)
        assert not got
        with lease(["GPU-b"], 1, tmp_path) as other:  # it is not kept from a run that wants one
            assert (mine, other) == ([0], [0])
    waiting.join(30)
    assert got == [[0, 1]]


def test_there_is_nothing_to_lease_without_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainerSettings("auto", 1, "auto", "auto")
    with leased_gpus(TrainerSettings("cpu", 1, "auto", "auto")) as none:
        assert none is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with leased_gpus(settings) as single:
        assert single is None


def test_a_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU; use trainer=cpu"):
        accelerator_of(TrainerSettings("gpu", 1, "auto", "auto"))
    assert accelerator_of(TrainerSettings("auto", 3, "auto", "auto")) == "cpu"
