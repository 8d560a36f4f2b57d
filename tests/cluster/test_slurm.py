"""Sweeps on a real SLURM of one node: ``tests/cluster/slurm.sh .venv/bin/python -m pytest tests/cluster``."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from salve.artifacts import DONE
from salve.stages.train import PARTS
from tests.integration.conftest import FEW, NARROW, SMALL

if not os.environ.get("SALVE_SLURM"):
    pytest.skip("needs a SLURM: tests/cluster/slurm.sh brings one up", allow_module_level=True)
pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs salve[slurm]")

SETTINGS = [*SMALL, *FEW, *NARROW, "stages=[discover,control,diagnose]", "edit.evaluate=0"]
ON_SLURM = ["cluster=slurm", "hydra.launcher.cpus_per_task=1"]
#: Tens of thousands of small steps, so that there is time to interrupt them.
LONG = "sae.epochs=16000"


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def sweeping(folder: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run the command, with results under ``folder`` and one thread, as in its jobs; then kill it and its jobs."""
    given = {argument.partition("=")[0]: argument for argument in [*SETTINGS, f"output_dir={folder}/out", *arguments]}
    with (folder / "console.txt").open("a") as console:
        command = [sys.executable, "-m", "salve.cli", "-m", *given.values()]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT, text=True, env=alone)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        slurm("scancel", "--me")


def finish(process: "subprocess.Popen[str]", folder: Path, status: int = 0) -> str:
    """Wait for the command; return its output."""
    process.wait(timeout=250)
    shown = (folder / "console.txt").read_text()
    assert process.returncode == status, shown
    return shown


def until(answer: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Wait until ``answer`` is true, while the command runs."""
    end = time.monotonic() + seconds
    while not answer():
        assert process.poll() is None, "the command has ended"
        assert time.monotonic() < end, f"{seconds} s have passed"
        time.sleep(0.05)


def digests(folder: Path) -> dict[str, str]:
    """``kind/key`` → digest of every artifact."""
    done = folder.glob(f"out/artifacts/*/*/{DONE}")
    return {f"{path.parts[-3]}/{path.parts[-2]}": json.loads(path.read_text())["digest"] for path in done}


def made(folder: Path) -> Counter[str]:
    """How often the logs of the runs say that an artifact is being made, by ``kind key``."""
    lines = [line for log in folder.glob("out/sweeps/*/*/salve.log") for line in log.read_text().splitlines()]
    return Counter(line.split("  ")[1].removesuffix(": making") for line in lines if line.endswith(": making"))


def job_of(pid: int) -> str:
    """The SLURM job that a process of this node belongs to."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    env = dict(line.partition("=")[::2] for line in text.split("\0"))
    return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"


def trained(folder: Path) -> dict[str, int]:
    """Finished epochs (of Lightning) of each SAE in training, by its key."""
    found = {}
    for path in folder.glob("out/artifacts/unfinished/sae-*/scratch/checkpoints/last.ckpt"):
        try:
            epoch = torch.load(path, "cpu", weights_only=True)["epoch"]
        except FileNotFoundError:  # finished meanwhile
            continue
        found[path.parts[-4].removeprefix("sae-")] = epoch + 1
    return found


def job_that_trains(folder: Path, sae: str) -> str:
    for log in folder.glob("out/sweeps/*/*/salve.log"):
        if f"sae {sae}: making" in log.read_text():
            return job_of(json.loads((log.parent / "running.json").read_text())["pid"])
    raise AssertionError(f"no run trains {sae}")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep without SLURM and without interruption."""
    folder = tmp_path_factory.mktemp("calm")
    with sweeping(folder, "sae.sparsity=2,5", LONG, "cluster=local") as process:
        finish(process, folder)
    return folder


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(["scontrol", "requeue"], id="preempted"),
        # SLURM sends this signal some time before a job runs out of time.
        pytest.param(["scancel", "--signal=USR2"], id="out of time"),
    ],
)
def test_a_requeued_job_goes_on_as_if_nothing_had_been(tmp_path: Path, calm: Path, interrupt: list[str]) -> None:
    with sweeping(tmp_path, "sae.sparsity=2,5", LONG, *ON_SLURM) as process:
        until(lambda: any(epochs > 20 for epochs in trained(tmp_path).values()), process)
        sae, before = max(trained(tmp_path).items(), key=lambda item: item[1])
        job = job_that_trains(tmp_path, sae)
        slurm(*interrupt, job)
        until(lambda: slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}") == "PENDING", process)
        stopped = trained(tmp_path)[sae]
        assert before <= stopped < PARTS
        # Else SLURM would wait two minutes.
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        seen = [stopped]
        while sae in (now := trained(tmp_path)) or len(set(seen)) == 1:
            seen += [now[sae]] if sae in now else []
            assert process.poll() is None
            time.sleep(0.02)
        finish(process, tmp_path)

    assert seen == sorted(seen), "it started again instead of going on"
    assert digests(tmp_path) == digests(calm)
    assert Counter(name.split("/")[0] for name in digests(tmp_path)) == {
        **{"classifier": 1, "activations": 1},
        **dict.fromkeys(("sae", "features", "control", "diagnose"), 2),
    }
    assert made(tmp_path) == made(calm) + Counter([f"sae {sae}"])


def test_a_cancelled_job_is_noticed_and_made_again(tmp_path: Path) -> None:
    with sweeping(tmp_path, "sae.sparsity=2,5", LONG, *ON_SLURM) as process:
        until(lambda: any(epochs > 5 for epochs in trained(tmp_path).values()), process)
        sae = max(trained(tmp_path).items(), key=lambda item: item[1])[0]
        slurm("scancel", job_that_trains(tmp_path, sae))
        shown = finish(process, tmp_path)
    assert "2 of 2 planned runs finished." in shown
    assert sum(name.startswith("sae ") for name in made(tmp_path).elements()) == 3
    assert not slurm("squeue", "--noheader")


def test_ranks_that_slurm_starts_compute_what_one_process_does(tmp_path: Path) -> None:
    values = {}
    for name, settings in {
        "one": ["cluster=local"],
        "two": [*ON_SLURM, "trainer.devices=2", "trainer.strategy=ddp"],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        with sweeping(folder, "sae.sparsity=2", *settings) as process:
            finish(process, folder)
        (run,) = folder.glob("out/sweeps/*/*/metrics.json")
        values[name] = json.loads(run.read_text())
    ends = [path.read_text() for path in (tmp_path / "two").glob("out/sweeps/*/.submitit/*/*_log.out")]
    assert len(ends) == 2
    assert all("global_rank" in end and "Job completed successfully" in end for end in ends)
    assert values["two"] == pytest.approx(values["one"], rel=1e-3)
