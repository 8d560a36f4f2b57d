"""What an output folder holds: artifacts with the runs that use them, scratch, and what killed processes left."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from salve.integrity import DAMAGED, MANIFEST, SETTINGS, UNFINISHED, Damaged, read_manifest
from salve.types import UserError

LOG = "salve.log"
LOCKS = ".locks"
#: How a run's log names an artifact that the run has found or makes.
_NAMED = re.compile(r"\b([a-z]+) ((?:[0-9a-f]{16}(?:, )?)+): ")
#: What a writer calls a file or folder until it is whole; its process is named in it.
_LEFTOVER = re.compile(r"\..*\.(\d+)(?:\.unfinished)?|\.(\d+)\.unfinished")


@dataclass(frozen=True)
class Thing:
    """A file or folder.

    Attributes:
        name: for people. path: where it is. size: bytes in it. changed: seconds since 1970 at which the newest part of
            it was written. Links are things of their own, and never followed.
    """

    name: str
    path: Path
    size: int
    changed: float

    @property
    def age(self) -> float:
        """Seconds since it was written to."""
        return max(0.0, time.time() - self.changed)


@dataclass(frozen=True)
class Stored:
    """An artifact.

    Attributes:
        thing: its folder. users: the runs that use it, by their folders as seen from the output folder.
    """

    kind: str
    key: str
    thing: Thing
    users: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """All that lies under an output folder.

    Attributes:
        root: the store. artifacts: by kind, key. runs: the folders of runs. unreadable: those whose manifest is
            damaged, by what is wrong. unfinished: scratch, and damaged: what was set aside. locks: the files that
            processes lock. leftovers: of writers that were killed, by the number of the process. skipped: links in
            place of folders, that were not looked into.
    """

    output: Path
    root: Path
    artifacts: tuple[Stored, ...]
    runs: tuple[Path, ...]
    unreadable: dict[Path, str]
    unfinished: tuple[Thing, ...]
    damaged: tuple[Thing, ...]
    locks: tuple[Thing, ...]
    leftovers: tuple[tuple[Thing, int], ...]
    skipped: tuple[Path, ...]


def contents(output: Path) -> Contents:
    """Look through an output folder.

    Raises:
        UserError: it is none.
    """
    root = output / "artifacts"
    if not output.is_dir():
        raise UserError(f"There is no folder {output}; give the output_dir of your runs, which is outputs by default.")
    if not root.is_dir():
        raise UserError(f"{output} holds no artifacts, which runs keep in {root}; give the output_dir of your runs.")
    runs, loose = _outside(output, root)
    users, unreadable = _users(output, runs)
    artifacts, skipped = [], []
    for kind in _folders(root):
        if kind.name in (UNFINISHED, DAMAGED) or kind.name.startswith("."):
            continue
        if kind.is_symlink():
            skipped.append(kind)
            continue
        for path in _folders(kind):
            names = tuple(users.get((kind.name, path.name), ()))
            artifacts.append(Stored(kind.name, path.name, _thing(path, f"{kind.name}/{path.name}"), names))
    inside = {name: _below(root / name, skipped) for name in (UNFINISHED, DAMAGED)}
    locks = [path for path in inside[UNFINISHED] if path.suffix == ".lock"]
    leftovers = [path for path in (*loose, *inside[UNFINISHED], *_below(root, [])) if _LEFTOVER.fullmatch(path.name)]
    scratch = [path for path in inside[UNFINISHED] if path not in locks and path not in leftovers]
    of_runs = [path for path in loose if path.parent.name == LOCKS]

    def things(paths: list[Path]) -> tuple[Thing, ...]:
        return tuple(_thing(path, os.path.relpath(path, output)) for path in paths)

    return Contents(
        output,
        root,
        tuple(artifacts),
        tuple(runs),
        unreadable,
        things(scratch),
        things(inside[DAMAGED]),
        things([*locks, *of_runs]),
        tuple((thing, _process(thing.path)) for thing in things(leftovers)),
        tuple(skipped),
    )


def _outside(output: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """The folders of runs, and the locks and leftovers beside and in them."""
    runs, loose = [], []
    for above, folders, files in os.walk(output):
        here = Path(above)
        if here == root:
            folders.clear()
            continue
        loose += [here / name for name in (*files, *folders) if _LEFTOVER.fullmatch(name)]
        folders[:] = sorted(name for name in folders if not _LEFTOVER.fullmatch(name))
        if here.name == LOCKS:
            loose += [here / name for name in sorted(files) if name.endswith(".lock")]
        if SETTINGS in files or MANIFEST in files:
            runs.append(here)
    return runs, loose


def _users(output: Path, runs: list[Path]) -> tuple[dict[tuple[str, str], list[str]], dict[Path, str]]:
    """By kind and key, the runs that use an artifact, and the runs of which that cannot be said."""
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    unreadable, open_ = dict[Path, str](), set[Path]()
    for run in runs:
        try:
            for kind, entry in read_manifest(run)["artifacts"].items():
                users[kind, str(entry.get("key"))].append(os.path.relpath(run, output))
        except FileNotFoundError:
            open_.add(run.parent)
        except Damaged as error:
            unreadable[run] = str(error)
            open_.add(run.parent)
    for run in runs:
        # A run that has not finished wants again what it had. A log names that: its own, or that of the run of its
        # sweep with which it shared a job.
        for artifact in _named(run / LOG) if run.parent in open_ else ():
            name = os.path.relpath(run, output)
            if name not in users[artifact]:
                users[artifact].append(f"{name} (its log)")
    return users, unreadable


def _named(log: Path) -> set[tuple[str, str]]:
    """The artifacts that a run's log names."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {(found[1], key) for found in _NAMED.finditer(text) for key in found[2].split(", ")}


def _folders(above: Path) -> list[Path]:
    return sorted(path for path in above.iterdir() if path.is_dir() or path.is_symlink())


def _below(folder: Path, skipped: list[Path]) -> list[Path]:
    """What lies in a folder that is no link."""
    if folder.is_symlink():
        skipped.append(folder)
        return []
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _process(path: Path) -> int:
    found = _LEFTOVER.fullmatch(path.name)
    assert found is not None
    return int(found[1] or found[2])


def _thing(path: Path, name: str) -> Thing:
    size, changed = 0, 0.0
    for part in _parts(path):
        try:
            stat = os.lstat(part)
        except FileNotFoundError:  # removed meanwhile
            continue
        changed = max(changed, stat.st_mtime)
        if not os.path.isdir(part) or os.path.islink(part):
            size += stat.st_size
    return Thing(name, path, size, changed)


def _parts(path: Path) -> Iterator[str]:
    yield str(path)
    if not path.is_symlink():
        for above, folders, files in os.walk(path):
            yield from (os.path.join(above, name) for name in (*folders, *files))
