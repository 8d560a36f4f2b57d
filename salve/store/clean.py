# SPDX-License-Identifier: MIT
"""Find and remove what nobody needs, without touching what a running process works on."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from salve.files import forget
from salve.integrity import DONE, UNFINISHED, set_aside
from salve.store.contents import Contents, Entry

#: The reason for removing a lock file.
LOCK = "a lock that nobody holds"


@dataclass(frozen=True)
class Removable:
    """Something that can be removed.

    Attributes:
        entry: the file or folder. why: in a few words. artifact: its kind and key, if it is one.
        locks: those that a process holds while it works on it.
    """

    entry: Entry
    why: str
    artifact: tuple[str, str] | None = None
    locks: tuple[Path, ...] = ()


class Busy(Exception):
    """A running process works on it, or it cannot be told whether one does."""


def removable(found: Contents, older: float) -> list[Removable]:
    """What nobody needs and nobody has written to for ``older`` seconds.

    While the manifest of a run is damaged, it is unknown which artifacts the run uses, so no artifact is removable.
    """
    guard = found.root / UNFINISHED
    items = []
    if not found.unreadable:
        items += [
            Removable(one.entry, "no run uses it", (one.kind, one.key), (guard / f"{one.kind}-{one.key}.lock",))
            for one in found.artifacts
            if not one.users and not one.entry.path.is_symlink()
        ]
    every = [lock.path for lock in found.locks]
    for entry in found.unfinished:
        kind = entry.path.name.rpartition("-")[0]
        own = guard / f"{entry.path.name}.lock"
        # Scratch of several artifacts made together has no lock of its own: its process holds those of the artifacts.
        locks = [own] if own in every else [lock for lock in every if lock.name.startswith(f"{kind}-")]
        items.append(Removable(entry, "unfinished, and nobody works on it", None, tuple(locks)))
    items += [Removable(entry, "set aside as damaged") for entry in found.damaged]
    items += [
        Removable(entry, "left by a writer that was killed") for entry, pid in found.leftovers if not _is_alive(pid)
    ]
    items += [Removable(lock, LOCK, None, (lock.path,)) for lock in found.locks]
    return [item for item in items if item.entry.age >= older]


def in_use(item: Removable) -> bool:
    """Whether a running process holds one of its locks."""
    try:
        with held(item.locks):
            return False
    except Busy:
        return True


def remove(item: Removable, root: Path) -> None:
    """Remove it.

    Raises:
        Busy: a process works on it.
        OSError: it cannot be removed.
    """
    with held(item.locks):
        path = item.entry.path
        if item.artifact is not None:
            # Renamed first: a kill must not leave half of an artifact in the store.
            path = set_aside(root, *item.artifact)
        if path.is_dir() and not path.is_symlink():
            for done in (path / DONE, path / "result" / DONE):  # a half-removed folder must not look complete
                done.unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        forget(path)


@contextmanager
def held(locks: Sequence[Path]) -> Iterator[None]:
    """Hold locks; raises Busy if a process holds one of them, or a lock cannot be opened."""
    with ExitStack() as inner:
        for lock in locks:
            new = not lock.exists()
            try:
                inner.enter_context(FileLock(lock).acquire(timeout=0))
            except (Timeout, OSError) as error:
                raise Busy from error
            if new:
                inner.callback(lock.unlink, missing_ok=True)
        yield


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
