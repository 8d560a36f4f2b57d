"""A run's folder: what its files say about the run, and the settings it was made with."""

import errno
import json
import logging
import os
import platform
import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from salve.artifacts import read_record, write_record
from salve.ending import is_told
from salve.run.explain import explain
from salve.run.schema import PATHS, Config, change_path, resolve
from salve.types import UserError

#: What a sweep planned, in the folder that holds its runs.
PLAN = "sweep.json"

State = Literal["new", "running", "interrupted", "failed", "finished"]

SETTINGS, MANIFEST, METRICS, RUNNING, FAILURE = (
    *("config.yaml", "manifest.json", "metrics.json"),
    *("running.json", "failure.json"),
)
LOG = "salve.log"
#: Times that a folder is taken away while it is claimed, from which on it counts as one that cannot be made.
MOST_VANISHED = 100


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; its name is the run's key in a sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock(self) -> FileLock:
        """Held by the process that makes the run; the operating system lets go of it when that process ends."""
        folder = self.path.parent / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.path.name}.lock")

    def state(self) -> State:
        """What the files say. A run that says it is running, while nobody holds its lock, was interrupted."""
        if (self.path / MANIFEST).is_file():
            return "finished"
        if (self.path / RUNNING).is_file():
            try:
                with self.lock.acquire(timeout=0):
                    return "interrupted"
            except Timeout:
                return "running"
        return "failed" if (self.path / FAILURE).is_file() else "new"

    def prepare(self, settings: Config) -> str:
        """Make the folder with the settings in it, resolved, and return their text.

        What they read is named by its whole path there, so that the run can be repeated from another folder. The key of
        a run is that of the settings as they were given.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        kept = asdict(settings)
        for group, name in PATHS:
            change_path(kept[group], name, _whole_path)
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        write_whole(self.path / SETTINGS, text)
        return text

    def forget_failure(self) -> None:
        """Before the next attempt."""
        (self.path / FAILURE).unlink(missing_ok=True)

    def begin(self) -> None:
        """Say that the run is being made; call it with the lock held."""
        self.forget_failure()
        write_record(self.path / RUNNING, {"pid": os.getpid(), "host": platform.node()})

    def fail(self, error: BaseException | str) -> str:
        """Keep the reason of a failure, and return it as one line."""
        first = (str(error).strip().splitlines() or [""])[0]
        known = isinstance(error, UserError | str)
        if isinstance(error, OSError):
            known, first = True, in_one_sentence(error)
        reason = first if known else f"{type(error).__name__}: {first}".removesuffix(": ")
        kind = "interrupted" if isinstance(error, str) else type(error).__name__
        try:
            write_whole(self.path / FAILURE, json.dumps({"reason": reason, "kind": kind}, ensure_ascii=False))
            (self.path / RUNNING).unlink(missing_ok=True)
        except OSError:  # a full disk, which may well be the reason
            pass
        return reason

    def finish(self) -> None:
        """Say that nobody is making the run any more."""
        (self.path / RUNNING).unlink(missing_ok=True)

    def reason(self) -> str:
        """Why the last attempt failed; empty if it did not."""
        path = self.path / FAILURE
        return str(read_record(path)["reason"]) if path.is_file() else ""

    def metrics(self) -> dict[str, Any]:
        """The measures of a finished run by name."""
        path = self.path / METRICS
        return read_record(path) if path.is_file() else {}

    def settings(self, changes: Sequence[str] = ()) -> Config:
        """The settings that the run was made with, checked as if they had just been typed.

        Args:
            changes: ``key=value``, instead of what the folder has.

        Raises:
            UserError: the folder holds no settings, or some that this version does not know; a change of no setting.
        """
        path = self.path / SETTINGS
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{self.path} is no folder of a run: it holds no {SETTINGS}.")
        config = OmegaConf.structured(Config)
        try:
            config.merge_with(yaml.safe_load(path.read_text(encoding="utf-8")))
            if missing := sorted(OmegaConf.missing_keys(config)):
                raise UserError(f"{path} says nothing of {', '.join(missing)}: another version of salve wrote it.")
            for override in OverridesParser.create().parse_overrides(list(changes)):
                key = override.get_key_element()
                if OmegaConf.is_dict(OmegaConf.select(config, key)):
                    raise UserError(f"{key} names a group; a rerun changes single settings, such as output_dir=FOLDER.")
                OmegaConf.update(config, key, override.value())
        except HydraException as error:  # only the changes are Hydra's to read
            raise UserError(explain(error)) from error
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}.") from error
        return resolve(config)


def _whole_path(path: str) -> str:
    """Of what is there; other words, such as ``imagenet``, are kept."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def swept_of(folder: Path) -> dict[str, Any]:
    """The values of the settings that a run's sweep varies, by setting."""
    plan = folder.parent / PLAN
    runs = read_record(plan)["runs"] if plan.is_file() else {}
    return dict(runs.get(folder.name, {}).get("swept", {}))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either there as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


@contextmanager
def claimed(wanted: Path) -> Iterator[Path]:
    """A folder that no other run has: ``wanted``, or the first of ``wanted_2``, ``wanted_3``, … that is free.

    Two runs that start in the same second want the same folder. It is the one's who creates its ``config.yaml``, empty
    until the settings are checked; the other's log, which was opened in it, goes on in the other's own folder.

    A run that ends in an error leaves no folder if it made nothing; of an error that is no UserError the log keeps the
    traceback. One that is told to end is interrupted.
    """
    folder = _claim(wanted)
    _move_log(wanted, folder)
    try:
        yield folder
    except BaseException as error:
        refused = isinstance(error, UserError)
        with suppress(OSError):  # a full disk, which may well be the error
            made = {path.name for path in folder.iterdir()} - {LOG, SETTINGS}
            if not made and (refused or not (folder / SETTINGS).stat().st_size):
                _remove(folder)
            elif isinstance(error, Exception) and not refused:
                with (folder / LOG).open("a", encoding="utf-8") as log:
                    traceback.print_exception(error, file=log)
            elif is_told():
                RunFolder(folder).begin()  # the lock is nobody's, and so the run's state is "interrupted"
        raise


def _claim(wanted: Path) -> Path:
    number, vanished = 1, 0
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).touch(exist_ok=False)
        except FileExistsError:
            number += 1
        except FileNotFoundError:  # its run was refused, and took the folder away just now; or none can be made there
            vanished += 1
            if vanished > MOST_VANISHED:
                raise
        else:
            return folder


def _move_log(old: Path, new: Path) -> None:
    """Have the log's handler go on in a folder; also if it is the same one, which may have been made anew."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == Path(os.path.abspath(old)):
            handler.acquire()
            try:
                handler.baseFilename = os.path.abspath(new / Path(handler.baseFilename).name)
                if (before := handler.setStream(handler._open())) is not None:
                    before.close()
            finally:
                handler.release()


def _remove(folder: Path) -> None:
    """Renamed first, so that whoever claims the same name meanwhile does not lose what is theirs."""
    away = folder.with_name(f".{folder.name}.{os.getpid()}")
    os.replace(folder, away)
    shutil.rmtree(away, ignore_errors=True)
    with suppress(OSError):  # not empty: there are other runs
        for above in folder.parents[:2]:
            above.rmdir()


def in_one_sentence(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}{what}; make room and give the same command again, which goes on where this one stopped."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{where}{what}; choose a folder that you may write to with output_dir=FOLDER, or a file you may read."
    return f"{where}{what}."
