"""Sweeps as a user starts them: nothing twice, nothing lost, nothing mixed up."""

import errno
import json
import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from salve.artifacts import DONE, read_record, read_table, write_record
from salve.integrity import sealed
from salve.run.folder import RunFolder
from salve.run.schema import Config
from salve.stages import train
from salve.sweep import jobs, sweeper
from salve.sweep.plan import Run, run_key
from tests.composing import settings
from tests.integration.commands import Command
from tests.integration.conftest import FEW, NARROW, SMALL, Salve

pytestmark = pytest.mark.usefixtures("no_figures")

SETTINGS = [*SMALL, *FEW, *NARROW, "stages=[discover,control,diagnose]", "edit.evaluate=0"]


def in_order(*arguments: str) -> list[str]:
    """Arguments with the later of two settings for one key, and with flags in their middle."""
    chosen = list({argument.partition("=")[0]: argument for argument in arguments if argument[0] != "-"}.values())
    return [*chosen[:1], *(argument for argument in arguments if argument[0] == "-"), *chosen[1:]]


@pytest.fixture
def salve(salve: Salve, tmp_path: Path) -> Salve:
    """The command with small settings and everything under ``tmp_path``, unless it repeats a run."""

    def run(*arguments: str) -> int:
        given = [] if any(a.startswith("rerun=") for a in arguments) else [*SETTINGS, f"output_dir={tmp_path}/out"]
        return salve(*in_order(*given, *arguments))

    return run


def started(folder: Path, *arguments: str) -> Command:
    """The command in a process group of its own, which can be killed as a whole."""
    return Command("salve.cli", in_order(*SETTINGS, f"output_dir={folder}/out", *arguments), folder)


def artifacts(folder: Path) -> dict[str, str]:
    """``kind/key`` → digest of every artifact that is there."""
    return {
        str(done.parent.relative_to(folder)): read_record(done)["digest"]
        for done in folder.glob(f"out/artifacts/*/*/{DONE}")
    }


def count(folder: Path, kind: str) -> int:
    return sum(name.startswith(f"out/artifacts/{kind}/") for name in artifacts(folder))


def runs(folder: Path, name: str = "quickstart") -> dict[str, Path]:
    """The run folders of a sweep by key."""
    return {
        path.name: path for path in (folder / "out" / "sweeps" / name).iterdir() if (path / "config.yaml").is_file()
    }


def table(folder: Path, name: str = "quickstart") -> pd.DataFrame:
    return read_table(folder / "out" / "sweeps" / name / "sweep.csv")


@dataclass
class Seen:
    """What a sweep composes, plans and executes.

    Attributes:
        compositions: overrides of each configuration that was composed.
        planned, executed: settings by the key of the run.
        together: settings of the runs whose SAEs were trained together.
    """

    compositions: list[list[str]] = field(default_factory=list)
    planned: dict[str, Config] = field(default_factory=dict)
    executed: dict[str, Config] = field(default_factory=dict)
    together: list[Config] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Filled by the sweeps of a test, whose runs compute nothing."""
    seen = Seen()
    compose_plainly, plan_plainly = ConfigLoaderImpl.load_configuration, sweeper.plan

    def composing(*given: Any, **more: Any) -> Any:
        seen.compositions.append(more["overrides"])
        return compose_plainly(*given, **more)

    def planning(*given: Any) -> list[Run]:
        runs = plan_plainly(*given)
        seen.planned.update({run.key: run.config for run in runs})
        return runs

    def executing(config: Config, folder: Path, *_: Any, **__: Any) -> None:
        seen.executed[folder.name] = config
        write_record(folder / "metrics.json", {})
        write_record(folder / "manifest.json", sealed({"artifacts": {}, "files": {}}))

    def training(configs: list[Config], *_: Any) -> set[str]:
        seen.together.extend(configs)
        return set()

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", composing)
    monkeypatch.setattr(sweeper, "plan", planning)
    monkeypatch.setattr(jobs, "execute", executing)
    monkeypatch.setattr(jobs, "train_together", training)
    return seen


# -- nothing twice


@pytest.mark.parametrize("ensemble", [1, 4])
def test_each_run_is_composed_once_and_its_job_reads_what_was_planned(salve: Salve, seen: Seen, ensemble: int) -> None:
    extremes = ["edit.alpha=[0,1e-30,inf]", "edit.modes=[suppress]", "sae.learning_rate=1e-7"]
    assert salve("-m", "sae.sparsity=1,2", "sae.seed=0,1", f"sae.ensemble={ensemble}", *extremes) == 0
    # The command's own configuration has the sweep in its overrides.
    of_runs = [overrides for overrides in seen.compositions if "sae.sparsity=1,2" not in overrides]
    assert len(of_runs) == len(seen.planned) == 4
    assert seen.executed == seen.planned
    assert sorted(run_key(config) for config in seen.together) == (sorted(seen.planned) if ensemble == 4 else [])


def test_a_job_trusts_the_classes_of_images_that_the_command_names(
    salve: Salve, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_images.py").write_text("from salve.data import ConceptsData\nclass Images(ConceptsData): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert salve("-m", "data._target_=salve.data.ConceptsData,own_images.Images") == 0
    # Settings of one's own class are stored as plain values.
    assert {key: asdict(config) for key, config in seen.executed.items()} == {
        key: asdict(config) for key, config in seen.planned.items()
    }
    assert len(seen.planned) == 2


def test_recipes_that_set_their_own_name_are_runs_of_one_sweep(salve: Salve, seen: Seen, tmp_path: Path) -> None:
    assert salve("-m", "experiment=salve2025/seeds,salve2025/critical") == 0
    assert {config.name for config in seen.executed.values()} == {"salve2025-seeds", "salve2025-critical"}
    assert runs(tmp_path).keys() == seen.executed.keys()


def test_a_sweep_makes_once_what_its_runs_share_and_later_only_what_is_new(
    salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    discover = "stages=[discover]"
    assert salve("-m", "sae.sparsity=1,2", "seed=0,1", discover) == 0
    assert "4 runs, 0 of them finished: 4 to make." in capsys.readouterr().out
    assert (count(tmp_path, "classifier"), count(tmp_path, "activations"), count(tmp_path, "sae")) == (2, 2, 4)
    first = artifacts(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/sweeps/*/*/manifest.json")}
    assert len(times) == 4

    assert salve("-m", "sae.sparsity=1,2", "seed=0,1", discover) == 0
    assert "4 runs, 4 of them finished: 0 to make." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/sweeps/*/*/manifest.json")} == times

    assert salve("-m", "sae.sparsity=1,2,3", "seed=0", discover) == 0
    assert "3 runs, 2 of them finished: 1 to make." in capsys.readouterr().out
    assert (count(tmp_path, "classifier"), count(tmp_path, "activations"), count(tmp_path, "sae")) == (2, 2, 5)
    assert first.items() <= artifacts(tmp_path).items()

    found = table(tmp_path)
    assert sorted(zip(found["sae.sparsity"], found["seed"], strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert found["fve"].between(-1, 1).all()


def test_what_was_damaged_since_is_named_and_made_again_by_the_same_command(
    salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", "sae.sparsity=1,2", "stages=[discover,report]"]
    assert salve(*sweep) == 0
    before = artifacts(tmp_path)
    emptied, bent = sorted(runs(tmp_path).values())
    kept = {path: path.read_bytes() for path in (emptied / "metrics.json", emptied / "index.html")}
    capsys.readouterr()
    (emptied / "metrics.json").write_text("")
    sae = (bent / read_record(bent / "manifest.json")["artifacts"]["sae"]["path"] / "sae.safetensors").resolve()
    content = bytearray(sae.read_bytes())
    content[-1] ^= 1
    sae.write_bytes(content)
    assert salve(*sweep) == 0
    said = capsys.readouterr().out
    assert f"{emptied.name} is made again: metrics.json is not what was written." in said
    assert f"{bent.name} is made again: The artifact {sae.parent} is damaged: sae.safetensors is not what" in said
    assert "2 runs, 0 of them finished: 2 to make." in said
    assert "2 of 2 planned runs finished." in said
    assert "set aside as" in (bent / "salve.log").read_text()
    [aside] = (tmp_path / "out" / "artifacts" / "damaged").iterdir()
    assert (aside / "sae.safetensors").read_bytes() == content
    assert {name: digest for name, digest in artifacts(tmp_path).items() if "damaged" not in name} == before
    assert {path: path.read_bytes() for path in kept} == kept


def test_an_ensemble_is_the_same_sweep(salve: Salve, tmp_path: Path) -> None:
    sweep = ["-m", "sae.sparsity=1,4", "sae.dictionary_size=8,24", "stages=[discover]"]
    assert salve(*sweep, "sweep.name=alone") == 0
    alone, keys = table(tmp_path, "alone"), runs(tmp_path, "alone").keys()
    assert salve(*sweep, "sweep.name=together", "sae.ensemble=4", f"output_dir={tmp_path}/other/out") == 0
    assert runs(tmp_path / "other", "together").keys() == keys
    assert count(tmp_path / "other", "sae") == 4
    together = table(tmp_path / "other", "together")
    pd.testing.assert_frame_equal(
        alone.sort_values("run", ignore_index=True)[["run", "fve", "l0"]],
        together.sort_values("run", ignore_index=True)[["run", "fve", "l0"]],
        rtol=1e-3,
    )
    logs = [path.read_text() for path in (tmp_path / "other").rglob("salve.log")]
    assert not any("could not be trained together" in log for log in logs)


# -- nothing lost


def test_one_run_that_fails_does_not_stop_the_others_and_is_tried_again(
    salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", "sae.learning_rate=1e30,0.003", "sae.sparsity=1,2", "stages=[discover]"]
    for again in ("", " (2 failed before)"):
        assert salve(*sweep) == 1
        shown = capsys.readouterr()
        assert f"to make{again}." in shown.out
        failed = [line for line in shown.out.splitlines() if line.startswith("  failed")]
        assert len(failed) == 2
        assert all("learning_rate=1e+30 sparsity=" in line and "diverged" in line for line in failed)
        assert shown.err.strip() == "salve: 2 of 4 runs did not finish; the same command tries them again."
    states = {path.name: sorted(p.name for p in path.glob("*.json")) for path in runs(tmp_path).values()}
    assert sorted(states.values()) == [["failure.json"]] * 2 + [["manifest.json", "metrics.json"]] * 2
    assert len(table(tmp_path)) == 2


def test_a_full_disk_fails_the_run_and_leaves_nothing_half_written(
    salve: Salve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = train.save_sae
    full = [True]

    def disk(path: Path, *arguments: Any) -> None:
        if full:
            path.write_bytes(b"the first bytes of")
            full.clear()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *arguments)

    monkeypatch.setattr(train, "save_sae", disk)
    assert salve("-m", "sae.sparsity=1,2") == 1
    (failure,) = [
        read_record(path / "failure.json") for path in runs(tmp_path).values() if (path / "failure.json").is_file()
    ]
    assert "No space left on device" in failure["reason"]
    assert count(tmp_path, "sae") == 1
    assert salve("-m", "sae.sparsity=1,2") == 0
    assert count(tmp_path, "sae") == 2


def test_a_sweep_killed_at_random_moments_ends_as_if_it_had_not_been(salve: Salve, tmp_path: Path) -> None:
    sweep = ["-m", "sae.sparsity=1,2", "seed=3", "finetune.epochs=4", "sae.epochs=30"]
    assert salve(*sweep, f"output_dir={tmp_path}/whole/out") == 0
    drawn = random.Random(time.time_ns())
    killed = 0
    for _ in range(2):
        begun = time.time()
        job = started(tmp_path, *sweep)
        while job.poll() is None and not any(
            path.stat().st_mtime > begun for path in tmp_path.glob("out/sweeps/*/*/running.json")
        ):
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 2))  # of the three seconds or more that the two runs take together
        killed += job.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
    job = started(tmp_path, *sweep)
    said = "".join(job.communicate())
    assert job.returncode == 0, said
    assert killed
    assert artifacts(tmp_path) == artifacts(tmp_path / "whole")
    assert not list(tmp_path.glob("out/artifacts/unfinished/*/*"))


@pytest.mark.cluster
def test_jobs_that_start_together_make_once_what_they_share_and_a_killed_one_is_made_again(tmp_path: Path) -> None:
    """And a run that raises does not stop its neighbours, as with the other launchers in ``tests/cluster``."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    joblib = ["-m", "cluster=joblib", "hydra.launcher.n_jobs=2"]
    sweep = started(tmp_path, *joblib, "stages=[discover]", "sae.learning_rate=0.002,0.003,1e30", "sae.epochs=100")
    while sweep.poll() is None and not list(tmp_path.glob("out/artifacts/unfinished/sae-*")):
        time.sleep(0.02)
    running = next(iter(tmp_path.glob("out/sweeps/quickstart/*/running.json")))
    killed = json.loads(running.read_text())["pid"]
    assert killed != sweep.pid
    os.kill(killed, signal.SIGKILL)
    out, errors = sweep.communicate()
    assert sweep.returncode == 1, out + errors
    assert "The launcher stopped early" in out + errors
    assert errors.splitlines()[-1].startswith("salve: 1 of 3 runs did not finish")
    (failed,) = tmp_path.glob("out/sweeps/*/*/failure.json")
    assert "diverged" in read_record(failed)["reason"]
    assert len(table(tmp_path)) == 2
    assert (count(tmp_path, "classifier"), count(tmp_path, "activations"), count(tmp_path, "sae")) == (1, 1, 2)
    logs = "".join(path.read_text() for path in tmp_path.glob("out/sweeps/*/*/salve.log"))
    made = Counter(kind for kind in re.findall(r"  (\w+) \w+: making", logs))
    assert (made["classifier"], made["activations"]) == (1, 1)
    assert made["sae"] in (4, 5)  # the killed one twice, and perhaps that of its neighbour, which joblib ends with it


# -- what cannot be


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["sae=topk", "sae.k=2,99"],
            ["1 of 2 combinations cannot be run, so none was started:", "  sae.k=99: sae.variant"],
        ),
        (["layer=last,nowhere"], ["1 of 2 combinations", "  layer=nowhere: layer=nowhere is no site"]),
        (["backbone.weights=a,b"], ["2 of 2 combinations", "  backbone.weights=a: ", "  backbone.weights=b: "]),
        (["sae=linear_l1,nothing"], ["1 of 2 combinations", "  sae=nothing: sae=nothing is no choice; sae can be"]),
        (["cluster=local,joblib"], ["cluster cannot be swept"]),
        (["trainer.strategy=ddp", "trainer.devices=2", "seed=0,1"], ["2 of 2 combinations", "trainer=ddp", "torchrun"]),
        (["sae.sparsity=interval(1,2)"], ["sae.sparsity is given as an interval"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_starts(
    salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert salve("-m", *arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert all(part in shown for part in said), shown
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_w_and_b_would_not_take_is_refused(
    salve: Salve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb, "login", lambda: False)
    assert salve("-m", "sae.sparsity=1,2", "logger=wandb") == 2
    assert capsys.readouterr().err.startswith("salve: logger=wandb: no key. Run `wandb login`")
    assert not (tmp_path / "out").exists()


# -- again


def test_settings_of_another_version_are_refused(
    salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(settings())
    path = folder.path / "config.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("  ensemble: 1\n", ""))
    assert salve(f"rerun={folder.path}") == 2
    assert f"{path} has no value for sae.ensemble" in capsys.readouterr().err
    path.write_text(whole + "future: 1\n")
    assert salve(f"rerun={folder.path}") == 2
    assert "future is no setting; the top level has name, stages" in capsys.readouterr().err


def test_a_rerun_gives_the_same_bits(salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert salve() == 0
    (folder,) = (tmp_path / "out" / "runs" / "quickstart").iterdir()
    capsys.readouterr()
    assert salve(f"rerun={folder}", f"output_dir={tmp_path}/out") == 0
    lines = capsys.readouterr().out.splitlines()
    same = [line for line in lines if "the same bits" in line]
    assert [line.partition(":")[0] for line in same] == [
        *("classifier", "activations", "sae", "features", "control", "diagnose"),
    ]
    assert all("found and not made again" in line for line in same)
    # In another folder everything is made again, with the same bits.
    assert salve(f"rerun={folder}", f"output_dir={tmp_path}/other/out") == 0
    lines = capsys.readouterr().out.splitlines()
    same = [line for line in lines if "the same bits" in line]
    assert len(same) == 6
    assert not any("found" in line for line in same)
    assert artifacts(tmp_path) == artifacts(tmp_path / "other")
    # Other settings give another result, and the status says so.
    assert salve(f"rerun={folder}", f"output_dir={tmp_path}/out", "sae.sparsity=1") == 1
    assert "sae: DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rerun=nowhere"], "nowhere is no folder of a run"),
        (["rerun={folder}", "sae.foo=1"], "sae.foo is no setting; sae has variant, "),
        (["rerun={folder}", "sae=topk"], "sae names a group"),
        (["rerun={folder}", "sae.epochs=0"], "sae.epochs=0 must be above 0"),
    ],
)
def test_a_rerun_of_what_is_not_there_is_refused(
    salve: Salve, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    folder = tmp_path / "run"
    RunFolder(folder).prepare(settings())
    assert salve(*(argument.format(folder=folder) for argument in arguments)) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
