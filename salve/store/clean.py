"""What of an output folder can go, and removing it without touching what a running process works on."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from salve.files import forget
from salve.integrity import DONE, UNFINISHED, set_aside
from salve.store.contents import Contents, Thing

LOCK = "a lock that nobody holds"


@dataclass(frozen=True)
class Removable:
    """Something that can go.

    Attributes:
        thing: what. why: in a few words. artifact: its kind and key, if it is one. locks: which a process that works
            on it holds.
    """

    thing: Thing
    why: str
    artifact: tuple[str, str] | None = None
    locks: tuple[Path, ...] = ()


class Busy(Exception):
    """A running process works on it, or that cannot be told."""


def removable(found: Contents, older: float) -> list[Removable]:
    """What nobody needs and has not been written to for ``older`` seconds.

    Where the manifest of a run is damaged, it is not known which artifacts the run uses, and none can go.
    """
    guard = found.root / UNFINISHED
    items = []
    if not found.unreadable:
        items += [
            Removable(one.thing, "no run uses it", (one.kind, one.key), (guard / f"{one.kind}-{one.key}.lock",))
            for one in found.artifacts
            if not one.users and not one.thing.path.is_symlink()
        ]
    every = [lock.path for lock in found.locks]
    for thing in found.unfinished:
        kind = thing.path.name.rpartition("-")[0]
        own = guard / f"{thing.path.name}.lock"
        # Scratch of several artifacts that are made together is worked on by who holds the locks of them all.
        locks = [own] if own in every else [lock for lock in every if lock.name.startswith(f"{kind}-")]
        items.append(Removable(thing, "unfinished, and nobody works on it", None, tuple(locks)))
    items += [Removable(thing, "set aside as damaged") for thing in found.damaged]
    items += [
        Removable(thing, "left by a writer that was killed") for thing, pid in found.leftovers if not _is_alive(pid)
    ]
    items += [Removable(lock, LOCK, None, (lock.path,)) for lock in found.locks]
    return [item for item in items if item.thing.age >= older]


def in_use(item: Removable) -> bool:
    """Whether a running process holds a lock of it."""
    try:
        with held(item.locks):
            return False
    except Busy:
        return True


def remove(item: Removable, root: Path) -> None:
    """Remove it.

    Raises:
        Busy: a process has begun to work on it. OSError: it cannot be removed.
    """
    with held(item.locks):
        path = item.thing.path
        if item.artifact is not None:
            # It is gone in one step: a kill must not leave half of an artifact in its place.
            path = set_aside(root, *item.artifact)
        if path.is_dir() and not path.is_symlink():
            for done in (path / DONE, path / "result" / DONE):  # what is half removed must not look whole
                done.unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        forget(path)


@contextmanager
def held(locks: Sequence[Path]) -> Iterator[None]:
    """Hold locks; raises Busy where a process has one of them, or that cannot be told."""
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
