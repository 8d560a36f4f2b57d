"""A run's folder is its own, whoever wants the same one, and none stays of a run that was refused."""

import errno
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hydra import compose, initialize_config_dir

from salve.run.explain import conf_dir
from salve.run.folder import RunFolder, claimed
from salve.run.schema import Config, register, resolve
from salve.system import in_one_sentence
from salve.types import UserError


@pytest.fixture
def settings() -> Config:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return resolve(compose("config"))


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
