"""A run's folder is its own, whoever wants the same one, and none stays of a run that was refused."""

import errno
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
from filelock import FileLock
from rich.console import Console

from salve.artifacts import Store
from salve.integrity import sealed
from salve.run import manifest
from salve.run.folder import RunFolder, claimed, swept_of
from salve.run.rerun import rerun
from salve.run.schema import Config
from salve.sweep.plan import Run
from salve.sweep.sweeper import Sweep
from salve.system import in_one_sentence
from salve.types import UserError
from tests import composing


@pytest.fixture
def settings() -> Config:
    return composing.settings()


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Path]:
    """The folder of one second, in which the log has been opened as Hydra does it."""
    folder = tmp_path / "runs" / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    handler = logging.FileHandler(folder / "salve.log")
    logging.getLogger().addHandler(handler)
    yield folder
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    wanted, together = tmp_path / "runs" / "now", Barrier(8)

    def one(number: int) -> Path:
        together.wait()
        with claimed(wanted) as folder:
            (folder / "mine").write_text(str(number))
        return folder

    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(one, range(8)))
    assert {folder.name for folder in folders} == {"now", *(f"now_{number}" for number in range(2, 9))}
    assert [(folder / "mine").read_text() for folder in folders] == [str(number) for number in range(8)]


def test_the_log_goes_on_in_the_runs_own_folder(logged: Path) -> None:
    (logged / "config.yaml").write_text("of the other run")
    with claimed(logged) as folder:
        logging.getLogger("salve.test").warning("said by the second")
    assert folder == logged.with_name(f"{logged.name}_2")
    assert "said by the second" in (folder / "salve.log").read_text()
    assert (logged / "salve.log").read_text() == ""
    assert (logged / "config.yaml").read_text() == "of the other run"


def failing(wanted: Path, error: Exception, *, settings: str = "", makes: bool = False) -> None:
    """A run that says something, and ends in an error."""
    with claimed(wanted) as folder:
        logging.getLogger("salve.test").warning("so far so good")
        if settings:
            (folder / "config.yaml").write_text(settings)
        if makes:
            (folder / "logs").mkdir()
        raise error


@pytest.mark.parametrize("settings", ["", "name: x"])
def test_a_refused_run_leaves_no_folder(logged: Path, settings: str) -> None:
    with pytest.raises(UserError):
        failing(logged, UserError("There is no such weight."), settings=settings)
    assert not logged.parent.exists()  # no other run is in it


def test_a_refused_run_that_made_something_keeps_it(logged: Path) -> None:
    with pytest.raises(UserError):
        failing(logged, UserError("It diverged."), makes=True)
    assert {path.name for path in logged.iterdir()} == {"config.yaml", "logs", "salve.log"}


def test_a_crash_leaves_its_traceback_in_the_log(logged: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(logged, ZeroDivisionError("by zero"), settings="name: x")
    assert "so far so good" in (logged / "salve.log").read_text()
    assert "ZeroDivisionError: by zero" in (logged / "salve.log").read_text()


def test_a_crash_before_the_settings_are_checked_leaves_no_folder(logged: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(logged, ZeroDivisionError("by zero"))
    assert not logged.parent.exists()  # no other run is in it


def test_a_folder_that_is_claimed_only_holds_no_settings(tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as folder, pytest.raises(UserError, match=r"no folder of a run.*config\.yaml"):
        RunFolder(folder).settings()


def test_results_are_not_written_through_links_of_an_earlier_attempt(tmp_path: Path, settings: Config) -> None:
    folder, precious = RunFolder(tmp_path / "run"), tmp_path / "precious"
    (folder.path / "wandb").mkdir(parents=True)
    precious.mkdir()
    (precious / "file").write_text("all of it")
    for name, target in (("index.html", precious / "file"), ("tables", precious), ("wandb/latest", folder.path)):
        (folder.path / name).symlink_to(target)
    folder.prepare(settings)
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "wandb"}
    assert (folder.path / "wandb" / "latest").is_symlink()
    assert (precious / "file").read_text() == "all of it"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/a"), r"^/x/a: No space left on device; make room and"),
        (OSError(errno.ENOSPC, "No space left on device"), r"^No space left on device; make room and"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/a"), r"^/x/a: Permission denied; .*output_dir=FOLDER"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/a"), r"^/x/a: Not a directory; .*output_dir=FOLDER"),
        (OSError(errno.EIO, "Input/output error", "/x/a"), r"^/x/a: Input/output error\.$"),
        (TimeoutError("no answer"), r"^no answer\.$"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(error: OSError, says: str, tmp_path: Path) -> None:
    assert re.search(says, in_one_sentence(error))
    without_a_place = error.errno is not None and error.filename is None
    assert RunFolder(tmp_path).fail(error) == (f"{tmp_path}: " if without_a_place else "") + in_one_sentence(error)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file is in the way")
    with pytest.raises(NotADirectoryError):
        failing(tmp_path / "outputs" / "run", ValueError("never reached"))
    with pytest.raises(FileNotFoundError):
        failing(Path("/proc/nowhere/run"), ValueError("never reached"))


# -- what is damaged


def write_a(folder: Path, _: Path) -> None:
    (folder / "a").write_text("a")


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A finished run with one artifact."""
    made = Store(tmp_path / "artifacts").get_or_make("sae", {}, write_a)
    folder = tmp_path / "sweep" / "aaaa"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x")
    (folder / "metrics.json").write_text('{"fve": 0.5}')
    (folder / "figures" / "a.png").write_text("a picture")
    path = os.path.relpath(made.path, folder)
    record = {
        "files": manifest._flushed(folder),
        "artifacts": {"sae": {"key": made.key, "digest": made.digest, "path": path}},
    }
    (folder / "manifest.json").write_text(json.dumps(sealed(record)))
    return RunFolder(folder)


@pytest.mark.parametrize("name", ["manifest.json", "metrics.json", "config.yaml"])
@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_run_whose_record_is_damaged_is_not_finished(finished: RunFolder, name: str, content: str) -> None:
    assert (finished.state(), finished.metrics(), finished.damage()) == ("finished", {"fve": 0.5}, "")
    (finished.path / name).write_text(content)
    assert (finished.state(), finished.metrics()) == ("new", {})
    assert finished.damage().startswith(f"{name} ")
    assert finished.reopen_if_damaged().startswith(f"{name} ")
    assert not (finished.path / "manifest.json").exists()
    assert finished.damage() == ""  # there is nothing that says it is finished


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("figures/a.png", "", "figures/a.png is not what was written"),
        ("../../artifacts/sae/*/a", "b", "The artifact .* is damaged: a is not what was written"),
        ("../../artifacts/sae/*/DONE.json", "", r"The artifact .* is damaged: DONE\.json is empty"),
        ("../../artifacts/sae/*/more", "", "The artifact .* is damaged: more does not belong to it"),
    ],
)
def test_a_run_that_lost_a_page_or_an_artifact_is_opened_again(
    finished: RunFolder, path: str, content: str, said: str
) -> None:
    assert finished.reopen_if_damaged() == ""
    [place] = [*(finished.path).glob(path)] or [next(finished.path.glob(str(Path(path).parent))) / Path(path).name]
    place.write_text(content)
    assert re.fullmatch(said, finished.reopen_if_damaged())
    assert finished.state() == "new"


def test_a_run_whose_artifact_is_gone_is_opened_again_unless_another_process_makes_it(finished: RunFolder) -> None:
    shutil.rmtree(finished.path.parents[1] / "artifacts")
    with finished.lock:
        assert finished.reopen_if_damaged() == ""
    assert finished.state() == "finished"
    assert "There is no artifact" in finished.reopen_if_damaged()
    assert finished.state() == "new"


def test_a_run_that_is_made_again_is_not_vouched_for_by_its_old_manifest(finished: RunFolder) -> None:
    finished.begin()
    assert not (finished.path / "manifest.json").exists()
    assert finished.state() == "interrupted"


@pytest.mark.parametrize("content", ["", "\0", "[]", "{}"])
def test_records_of_failures_and_running_that_cannot_be_read_are_no_obstacle(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "failure.json").write_text(content)
    assert run.state() == "failed"
    assert run.reason() == "its failure.json cannot be read"
    (run.path / "running.json").write_text(content)
    assert run.state() == "interrupted"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": 3}', '{"runs": {"aaaa": {}}}'])
def test_a_plan_that_is_damaged_is_written_anew_with_all_runs_that_are_there(finished: RunFolder, content: str) -> None:
    sweep, said = finished.path.parent, io.StringIO()
    (sweep / "sweep.json").write_text(content)
    assert swept_of(finished.path) == {}
    run = Run("bbbb", {"seed": 1}, None)  # type: ignore[arg-type]
    Sweep._keep_plan([run], sweep, Console(file=said))
    plan = {"aaaa": {"swept": {}}, "bbbb": {"swept": {"seed": 1}}}
    assert json.loads((sweep / "sweep.json").read_text()) == {"name": "sweep", "runs": plan}
    assert "sweep.json cannot be read, and is written anew" in said.getvalue().replace("\n", "")
    assert swept_of(sweep / "bbbb") == {"seed": 1}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- a list", b"text", b"a: [", b"[" * 1500])
def test_settings_that_cannot_be_read_are_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunFolder(tmp_path).settings()


def test_what_lies_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()

    def said(refused: Callable[[], object]) -> str:
        with pytest.raises(OSError) as caught:  # noqa: PT011  (what it says is looked at)
            refused()
        return in_one_sentence(caught.value)

    for place in ("file/runs", "file"):
        assert said(partial((tmp_path / place).mkdir, exist_ok=True)).startswith(
            f"{tmp_path / 'file'} is a file, but must be a folder; remove it, or choose"
        )
    for place in ("link/runs", "link"):
        assert said(partial((tmp_path / place).mkdir, exist_ok=True)).startswith(
            f"{tmp_path / 'link'} is a link to nowhere (nowhere); make its target available, or remove the link."
        )
    assert said(lambda: os.open(tmp_path / "folder", os.O_RDWR)).startswith(
        f"{tmp_path / 'folder'} is a folder, but must be a file; remove it"
    )
    assert said(lambda: os.replace(tmp_path / "file", tmp_path / "folder")).startswith(
        f"{tmp_path / 'folder'} is a folder, but must be a file; remove it"
    )
    with pytest.raises(OSError) as caught:  # noqa: PT011
        FileLock(tmp_path / "folder").acquire(timeout=0)
    assert "is a folder, but must be a file" in in_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml"])
def test_no_run_is_said_to_be_the_same_as_one_that_is_damaged(finished: RunFolder, name: str) -> None:
    (finished.path / name).write_text("name: y")
    with pytest.raises(UserError, match=rf"is damaged.*: {name} is no.*; remove its manifest\.json"):
        rerun([f"rerun={finished.path}"], Console(quiet=True))
