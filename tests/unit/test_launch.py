"""What a launcher is given, and recovery when its jobs are killed, with a launcher that kills jobs on purpose."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from rich.console import Console

from salve.artifacts import write_record
from salve.integrity import sealed
from salve.run.explain import conf_dir
from salve.run.folder import MANIFEST, METRICS, RunFolder
from salve.sweep.handover import JobConfigs
from salve.sweep.launch import submit
from salve.sweep.plan import Run, run_key
from salve.types import UserError
from tests.composing import settings


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    config = settings()
    found = []
    for seed in range(5):
        one = replace(config, seed=seed)
        found.append(Run(run_key(one), {"seed": seed}, one))
        RunFolder(tmp_path / found[-1].key).prepare(one)
    return found


class Launcher:
    """Runs jobs in turn. A deadly job kills the next one with it, which has begun.

    Args:
        folder: the sweep's.
        deadly: given a job's seed and how often it was launched, whether it dies.
    """

    def __init__(self, folder: Path, deadly: Callable[[int, int], bool]) -> None:
        self.folder, self.deadly = folder, deadly
        self.launched: list[list[int]] = []  # seeds

    def __call__(self, jobs: Sequence[Sequence[str]]) -> None:
        keys = [key for (key,) in jobs]
        seeds = [RunFolder(self.folder / key).settings().seed for key in keys]
        self.launched.append(seeds)
        times = sum(seeds[0] in batch for batch in self.launched)
        for position, (seed, key) in enumerate(zip(seeds, keys, strict=True)):
            folder = RunFolder(self.folder / key)
            folder.begin()
            if self.deadly(seed, times):
                for other in keys[position + 1 : position + 2]:
                    RunFolder(self.folder / other).begin()
                raise RuntimeError("A worker process was terminated.\nmore")
            write_record(folder.path / METRICS, {})
            write_record(folder.path / MANIFEST, sealed({"artifacts": {}, "files": {}}))
            folder.finish()


def states(runs: list[Run], folder: Path) -> list[str]:
    return [run.folder(folder).state() for run in runs]


def test_a_job_that_dies_once_is_made_alone_in_the_end(runs: list[Run], tmp_path: Path) -> None:
    died: list[int] = []

    def deadly(seed: int, _: int) -> bool:
        if seed == 1 and not died:
            died.append(seed)
            return True
        return False

    launcher = Launcher(tmp_path, deadly)
    submit(runs, tmp_path, launcher, Console(quiet=True))
    assert states(runs, tmp_path) == ["finished"] * 5
    assert launcher.launched == [[0, 1, 2, 3, 4], [3, 4], [1], [2]]


def test_a_job_that_always_dies_fails_and_the_others_do_not(runs: list[Run], tmp_path: Path) -> None:
    submit(runs, tmp_path, Launcher(tmp_path, lambda seed, _: seed == 1), Console(quiet=True))
    assert states(runs, tmp_path) == ["finished", "failed", "finished", "finished", "finished"]
    reason = runs[1].folder(tmp_path).reason()
    assert reason == "its process was killed, twice (RuntimeError: A worker process was terminated)"


def test_a_launcher_that_cannot_start_anything_is_refused(runs: list[Run], tmp_path: Path) -> None:
    def broken(_: Sequence[Sequence[str]]) -> None:
        raise FileNotFoundError("sbatch")

    with pytest.raises(UserError, match=r"^The launcher gave up: FileNotFoundError: sbatch$"):
        submit(runs, tmp_path, broken, Console(quiet=True))
    assert states(runs, tmp_path) == ["new"] * 5


def test_a_process_that_dies_between_two_jobs_stops_nothing(runs: list[Run], tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, lambda *_: False)

    def dies_first(jobs: Sequence[Sequence[str]]) -> None:
        if not launcher.launched:
            launcher(jobs[:2])
            raise RuntimeError("A worker process was terminated.")
        launcher(jobs)

    submit(runs, tmp_path, dies_first, Console(quiet=True))
    assert states(runs, tmp_path) == ["finished"] * 5


def test_a_run_whose_lock_is_held_is_running_and_one_that_only_says_so_was_interrupted(
    runs: list[Run], tmp_path: Path
) -> None:
    folder = runs[0].folder(tmp_path)
    folder.begin()
    assert folder.state() == "interrupted"
    with folder.lock:
        assert runs[0].folder(tmp_path).state() == "running"
    assert folder.state() == "interrupted"


@pytest.mark.parametrize("key", ["445090e72263", "012345678901", "123456789012", "5b95e43e0b33"])
def test_a_job_gets_its_keys_as_they_are_though_a_command_line_would_read_numbers(runs: list[Run], key: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        master = compose("config", return_hydra_config=True)
    HydraConfig.instance().set_config(master)  # makes hydra's part of the configuration read-only
    config = pickle.loads(pickle.dumps(JobConfigs())).load_sweep_config(master, [key, runs[1].key])
    assert config.hydra.overrides.task == [key, runs[1].key]
    assert config.hydra.sweep.subdir == key
    assert config.hydra.sweep.dir == master.hydra.sweep.dir
    assert master.hydra.overrides.task == []
    with open_dict(config):
        config.hydra.job.num = 3  # as launchers do
