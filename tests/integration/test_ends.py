"""The command told to end, at every stage: its status, the processes that it started, and what it leaves."""

import os
import shutil
import signal
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from pkgutil import resolve_name

import pytest

from salve.artifacts import DONE, Artifact, read_record
from salve.cli import STOPPED
from salve.run import execute as execute_module
from salve.run.folder import RunFolder
from tests.integration.commands import Command
from tests.integration.conftest import FEW, NARROW, SMALL, Salve
from tests.unit.test_ending import is_gone

SETTINGS = [*SMALL, *FEW, *NARROW]
#: Which call of which function a signal interrupts, in the order of a run.
MOMENTS = {
    "check of the settings": ("salve.run.inputs.check_inputs", 1, signal.SIGTERM),
    "loading": ("salve.run.execute.build_context", 1, signal.SIGINT),
    "training of the classifier": ("salve.backbones.Classifier.training_step", 6, signal.SIGTERM),
    "its validation": ("salve.backbones.Classifier.validation_step", 1, signal.SIGINT),
    "a checkpoint": ("salve.processes.trainer._Checkpoints.save_checkpoint", 2, signal.SIGTERM),
    "capture": ("salve.backbones.cut.site_activations", 2, signal.SIGHUP),
    "training of the SAE": ("salve.sae.SparseAutoencoder.training_step", 5, signal.SIGINT),
    "features": ("salve.run.execute.read_features", 1, signal.SIGTERM),
    "maps": ("salve.stages.localise.grad_fam", 1, signal.SIGTERM),
    "the test of an edit": ("salve.editing.EditEvaluation.test_step", 2, signal.SIGTERM),
    "critical strengths": ("salve.run.execute.diagnose", 1, signal.SIGINT),
    "the report": ("salve.run.execute.report", 1, signal.SIGTERM),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all interrupted runs: each continues where the one before was interrupted."""
    return tmp_path_factory.mktemp("interrupted")


def signal_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: signal.Signals) -> None:
    """Send this process a signal at a call of a function."""
    where, _, attribute = name.rpartition(".")
    owner, plain, calls = resolve_name(where), resolve_name(name), count(1)

    def told(*args: object, **kwargs: object) -> object:
        if next(calls) == call:
            signal.raise_signal(number)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, told)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_told_to_end(
    salve: Salve,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    name, call, number = MOMENTS[moment]
    before = set((folder / "out").rglob("config.yaml"))
    with monkeypatch.context() as patch:
        signal_at(patch, name, call, number)
        assert salve(*SETTINGS, f"output_dir={folder}/out") == 128 + number
    assert capsys.readouterr().err == f"{STOPPED}\n"
    new = set((folder / "out").rglob("config.yaml")) - before
    assert [RunFolder(path.parent).state() for path in new] in ([], ["interrupted"])
    assert bool(new) == (moment not in ("check of the settings", "loading"))


@pytest.mark.usefixtures("no_figures")
def test_after_all_these_the_same_command_ends_as_if_nothing_had_been(
    salve: Salve, folder: Path, whole_run: tuple[Path, dict[str, Artifact]]
) -> None:
    assert not list((folder / "out").rglob("manifest.json"))
    assert salve(*SETTINGS, f"output_dir={folder}/out") == 0
    (done,) = (folder / "out").rglob("manifest.json")
    found = read_record(done)["artifacts"]
    assert {kind: one["digest"] for kind, one in found.items()} == {k: a.digest for k, a in whole_run[1].items()}


def test_a_sweep_that_is_told_to_end_does_not_go_on_with_the_next_run(
    salve: Salve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", *SETTINGS, f"output_dir={tmp_path}/out", "stages=[discover]", "sae.sparsity=1,2"]
    with monkeypatch.context() as patch:
        signal_at(patch, "salve.sweep.plan.run_key", 2, signal.SIGTERM)
        assert salve(*arguments) == 143
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        signal_at(patch, "salve.sae.SparseAutoencoder.training_step", 3, signal.SIGTERM)
        # A library may replace an exception that it does not know.
        plain = execute_module.train_sae

        def broken(*given: object) -> object:
            try:
                return plain(*given)  # type: ignore[arg-type]
            except BaseException as error:
                raise RuntimeError("a worker has gone") from error

        patch.setattr(execute_module, "train_sae", broken)
        assert salve(*arguments) == 143
    assert capsys.readouterr().err == f"{STOPPED}\n" * 2
    folders = [RunFolder(path.parent) for path in tmp_path.glob("out/sweeps/*/*/config.yaml")]
    assert sorted(one.state() for one in folders) == ["interrupted", "new"]
    assert salve(*arguments) == 0
    assert "2 to make (1 interrupted before)" in capsys.readouterr().out


# -- commands in their own processes


def descendants(process: int) -> set[int]:
    """All processes that a process has started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = set[int](), {process}
    while new := {child for child, parent in parents.items() if parent in new} - found:
        found |= new
    return found


def training(folder: Path, process: Command, trainings: int) -> None:
    """Wait until so many trainings of SAEs of a command have checkpoints."""
    end = time.monotonic() + 200
    while len(list(folder.glob("out/artifacts/unfinished/sae-*/scratch/checkpoints/last.ckpt"))) < trainings:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


#: Ten seconds of small steps, or more.
LONG = ["stages=[discover]", "sae.epochs=4000"]
TWO_RANKS = ["trainer.devices=2", "trainer.strategy=ddp_spawn"]
JOBLIB = ["-m", "cluster=joblib", "hydra.launcher.n_jobs=2", "sae.sparsity=1,2"]


@pytest.mark.parametrize(
    ("arguments", "number", "to_all"),
    [
        pytest.param(TWO_RANKS, signal.SIGTERM, False, id="two ranks"),
        pytest.param(JOBLIB, signal.SIGTERM, False, id="joblib", marks=pytest.mark.cluster),
        pytest.param(JOBLIB, signal.SIGINT, True, id="joblib Ctrl-C", marks=pytest.mark.cluster),  # as a terminal does
        pytest.param(JOBLIB, signal.SIGKILL, False, id="joblib killed", marks=pytest.mark.cluster),
    ],
)
def test_a_command_ends_with_all_that_it_has_started(
    tmp_path: Path,
    whole_run: tuple[Path, dict[str, Artifact]],
    arguments: list[str],
    number: signal.Signals,
    to_all: bool,
) -> None:
    sweeps = arguments is JOBLIB
    if sweeps:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    for kind in ("classifier", "activations"):
        one = whole_run[1][kind]
        shutil.copytree(one.path, tmp_path / "out" / "artifacts" / kind / one.key)
    process = Command("salve.cli", [*SETTINGS, *LONG, f"output_dir={tmp_path}/out", *arguments], tmp_path)
    try:
        training(tmp_path, process, 2 if sweeps else 1)
        others = descendants(process.pid)
        assert others
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        _, said = process.communicate(timeout=30)
        end = time.monotonic() + 30
        while not all(is_gone(other) for other in others):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert (process.returncode, said) == (128 + number, f"{STOPPED}\n")
    assert not list(tmp_path.glob(f"out/artifacts/sae/*/{DONE}"))
    if sweeps:
        states = [RunFolder(path.parent).state() for path in tmp_path.glob("out/sweeps/*/*/config.yaml")]
        assert states == ["interrupted"] * 2
