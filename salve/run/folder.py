# SPDX-License-Identifier: MIT
"""A run's folder: the state of the run, as its files tell it, and the settings that it was made with."""

import json
import logging
import os
import platform
import shutil
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout

from salve.artifacts import is_own, read_record, write_whole
from salve.ending import is_told
from salve.integrity import MANIFEST, METRICS, SETTINGS, artifacts_of_run, check_artifact, damage_of_run
from salve.results.run import FAILURE, PLAN, RUNNING
from salve.run.schema import PATHS, Config, change_path
from salve.run.stored import stored_settings
from salve.system import in_one_sentence, refused_by_system
from salve.types import Diverged, UserError

State = Literal["new", "running", "interrupted", "failed", "finished"]

LOG = "salve.log"
#: How many times a folder may vanish while it is claimed, before it counts as one that cannot be made.
MOST_VANISHED = 100


class RunFolder:
    """One run on disk.

    Args:
        path: the folder. In a sweep its name is the run's key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock(self) -> FileLock:
        """The lock that the process holds which makes the run. The system releases it when that process ends."""
        folder = self.path.parent / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.path.name}.lock")

    def state(self) -> State:
        """The state of the run.

        A run that says it is running, while nobody holds its lock, was interrupted. One with a damaged record is not
        finished, and is made again.
        """
        if not self.damage() and (self.path / MANIFEST).is_file():
            return "finished"
        if (self.path / RUNNING).is_file():
            try:
                with self.lock.acquire(timeout=0):
                    return "interrupted"
            except Timeout:
                return "running"
        return "failed" if (self.path / FAILURE).is_file() else "new"

    def damage(self) -> str:
        """What is wrong with a finished run's record; empty if nothing is, or if the run is not finished."""
        return damage_of_run(self.path) if os.path.lexists(self.path / MANIFEST) else ""

    def reopen_if_damaged(self) -> str:
        """Check all files and artifacts of a finished run; if one is damaged, mark the run as not finished.

        Returns:
            What is wrong, in a few words; empty if nothing is, or if another process is making the run.
        """
        if not os.path.lexists(self.path / MANIFEST):
            return ""
        damage = damage_of_run(self.path, names=None)
        if not damage:
            try:
                for folder in artifacts_of_run(self.path).values():
                    check_artifact(folder)
            except UserError as error:
                damage = str(error).partition(";")[0]
        if damage:
            try:
                with self.lock.acquire(timeout=0):
                    (self.path / MANIFEST).unlink(missing_ok=True)
            except Timeout:
                return ""
        return damage

    def prepare(self, settings: Config) -> str:
        """Make the folder, write the settings into it, and return their text.

        Input paths are written as absolute paths, so that the run can be repeated from another folder. The key of a run
        is made of the settings as they were given.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.rglob("*"):  # links of an earlier attempt may lead out of the folder
            if path.is_symlink() and not is_own(self.path, path):
                path.unlink()
        kept = asdict(settings)
        for group, name in PATHS:
            change_path(kept[group], name, _whole_path)
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        write_whole(self.path / SETTINGS, text)
        return text

    def forget_failure(self) -> None:
        """Remove the record of a failure, before the next attempt."""
        (self.path / FAILURE).unlink(missing_ok=True)

    def begin(self) -> None:
        """Mark the run as running. The caller holds the lock."""
        self.forget_failure()
        (self.path / MANIFEST).unlink(missing_ok=True)  # its digests are of files that are about to change
        write_whole(self.path / RUNNING, json.dumps({"pid": os.getpid(), "host": platform.node()}))

    def fail(self, error: BaseException | str) -> str:
        """Write down why the run failed, and return the reason as one line."""
        first = (str(error).strip().splitlines() or [""])[0]
        known = isinstance(error, UserError | str)
        refused = None if isinstance(error, UserError | str) else refused_by_system(error, self.path)
        if refused is not None:
            known, first = True, in_one_sentence(refused)
        reason = first if known else f"{type(error).__name__}: {first}".removesuffix(": ")
        kind = "interrupted" if isinstance(error, str) else type(error).__name__
        try:
            write_whole(self.path / FAILURE, json.dumps({"reason": reason, "kind": kind}, ensure_ascii=False))
            (self.path / RUNNING).unlink(missing_ok=True)
        except OSError:  # the disk may be full, which may be why the run failed
            pass
        return reason

    def finish(self) -> None:
        """Mark the run as no longer running."""
        (self.path / RUNNING).unlink(missing_ok=True)

    def reason(self) -> str:
        """Why the last attempt failed; empty if it did not."""
        path = self.path / FAILURE
        try:
            return str(read_record(path)["reason"]) if path.is_file() else ""
        except (OSError, ValueError, KeyError):
            return f"its {FAILURE} cannot be read"

    def diverged(self) -> bool:
        """Whether the last attempt failed because a training diverged, which the same settings will repeat."""
        path = self.path / FAILURE
        try:
            return path.is_file() and read_record(path).get("kind") == Diverged.__name__
        except (OSError, ValueError):
            return False

    def metrics(self) -> dict[str, Any]:
        """The measures of a finished run by name; empty for a run that is not finished."""
        return read_record(self.path / METRICS) if self.state() == "finished" else {}

    def settings(
        self,
        changes: Sequence[str] = (),
        *,
        classes: Collection[str] = (),
        instead: Mapping[str, Any] | None = None,
    ) -> Config:
        """The settings that the run was made with; see :func:`salve.run.stored.stored_settings`."""
        return stored_settings(self.path / SETTINGS, changes, classes=classes, instead=instead)


def _whole_path(path: str) -> str:
    """Make a path absolute if it exists; keep other words, such as ``imagenet``."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def swept_of(folder: Path) -> dict[str, Any]:
    """The values that a run has of the settings which its sweep varies, by setting."""
    return dict(planned_in(folder.parent / PLAN).get(folder.name, {}).get("swept", {}))


def planned_in(plan: Path) -> dict[str, dict[str, Any]]:
    """The runs that a sweep planned, by key; empty where the plan is missing or damaged."""
    try:
        runs = read_record(plan)["runs"]
        return {key: {"swept": dict(entry["swept"])} for key, entry in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def runs_in(sweep: Path) -> list[str]:
    """The keys of all runs in a sweep's folder."""
    return sorted(path.parent.name for path in sweep.glob(f"*/{SETTINGS}"))


@contextmanager
def claimed(wanted: Path) -> Iterator[Path]:
    """Claim a folder for a run: ``wanted``, or the first of ``wanted_2``, ``wanted_3``, … that is free.

    Two runs that start in the same second want the same folder. The one that creates ``config.yaml`` in it first has
    it; the file stays empty until the settings are checked. The other run's log moves to that run's own folder.

    If the run ends in an error before it made anything, its folder is removed. Otherwise the log keeps the traceback,
    except that of a UserError. A run that is told to end is marked as interrupted.

    Yields:
        The folder.
    """
    folder = _claim(wanted)
    _move_log(wanted, folder)
    try:
        yield folder
    except BaseException as error:
        refused = isinstance(error, UserError)
        with suppress(OSError):  # the disk may be full, which may be the error
            made = {path.name for path in folder.iterdir()} - {LOG, SETTINGS}
            if not made and (refused or not (folder / SETTINGS).stat().st_size):
                _remove(folder)
            elif isinstance(error, Exception) and not refused:
                with (folder / LOG).open("a", encoding="utf-8") as log:
                    traceback.print_exception(error, file=log)
            elif is_told():
                RunFolder(folder).begin()  # running, with a lock that nobody holds, means interrupted
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
        except FileNotFoundError:  # a refused run has just removed the folder, or no folder can be made there
            vanished += 1
            if vanished > MOST_VANISHED:
                raise
        else:
            return folder


def _move_log(old: Path, new: Path) -> None:
    """Move the log file to a folder. It is reopened even if that is the same one, which may have been made anew."""
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
    """Remove a folder; rename it first, in case another run claims the same name meanwhile."""
    away = folder.with_name(f".{folder.name}.{os.getpid()}")
    os.replace(folder, away)
    shutil.rmtree(away, ignore_errors=True)
    with suppress(OSError):  # not empty: there are other runs
        for above in folder.parents[:2]:
            above.rmdir()
