# SPDX-License-Identifier: MIT
"""The contents of an output folder: artifacts and the runs that use them, scratch, leftovers of killed processes."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from salve.files import read_record
from salve.integrity import DAMAGED, MANIFEST, SETTINGS, UNFINISHED, USES, Damaged, read_manifest
from salve.types import UserError

LOG = "salve.log"
LOCKS = ".locks"
#: How a run's log names the artifacts that it finds or makes.
_NAMED = re.compile(r"\b([a-z]+) ((?:[0-9a-f]{16}(?:, )?)+): ")
#: The name of a file or folder until it is complete; it holds the writer's process id.
_LEFTOVER = re.compile(r"\..*\.(\d+)(?:\.unfinished)?|\.(\d+)\.unfinished")


@dataclass(frozen=True)
class Entry:
    """A file or folder.

    Attributes:
        name: for display. path: where it is. size: in bytes.
        changed: when its newest part was written, in seconds since 1970. Links are never followed.
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
class StoredArtifact:
    """An artifact.

    Attributes:
        kind, key: its address. entry: its folder.
        users: the folders of the runs that use it, relative to the output folder.
    """

    kind: str
    key: str
    entry: Entry
    users: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """The contents of an output folder.

    Attributes:
        output: the folder. root: of the store.
        artifacts: sorted by kind and key.
        runs: folders of the runs. unreadable: runs with a damaged manifest, and what is wrong with it.
        unfinished: scratch. damaged: artifacts that were set aside.
        locks: lock files.
        leftovers: unfinished files of killed writers, with their process ids.
        skipped: links in place of folders, which were not followed.
    """

    output: Path
    root: Path
    artifacts: tuple[StoredArtifact, ...]
    runs: tuple[Path, ...]
    unreadable: dict[Path, str]
    unfinished: tuple[Entry, ...]
    damaged: tuple[Entry, ...]
    locks: tuple[Entry, ...]
    leftovers: tuple[tuple[Entry, int], ...]
    skipped: tuple[Path, ...]


def contents(output: Path) -> Contents:
    """List the contents of an output folder.

    Raises:
        UserError: there is no such folder, or it has no artifacts.
    """
    root = output / "artifacts"
    if not output.is_dir():
        raise UserError(f"There is no folder {output}; give the output_dir of your runs, which is outputs by default.")
    if not root.is_dir():
        raise UserError(f"{output} holds no artifacts, which runs keep in {root}; give the output_dir of your runs.")
    runs, loose = _outside(output, root)
    users, unreadable = _users(output, runs)
    _add_parts(users, root)
    artifacts, skipped = [], []
    for kind in _folders(root):
        if kind.name in (UNFINISHED, DAMAGED) or kind.name.startswith("."):
            continue
        if kind.is_symlink():
            skipped.append(kind)
            continue
        for path in _folders(kind):
            names = tuple(users.get((kind.name, path.name), ()))
            artifacts.append(StoredArtifact(kind.name, path.name, _thing(path, f"{kind.name}/{path.name}"), names))
    inside = {name: _below(root / name, skipped) for name in (UNFINISHED, DAMAGED)}
    locks = [path for path in inside[UNFINISHED] if path.suffix == ".lock"]
    leftovers = [path for path in (*loose, *inside[UNFINISHED], *_below(root, [])) if _LEFTOVER.fullmatch(path.name)]
    scratch = [path for path in inside[UNFINISHED] if path not in locks and path not in leftovers]
    of_runs = [path for path in loose if path.parent.name == LOCKS]

    def entries(paths: list[Path]) -> tuple[Entry, ...]:
        return tuple(_thing(path, os.path.relpath(path, output)) for path in paths)

    return Contents(
        output,
        root,
        tuple(artifacts),
        tuple(runs),
        unreadable,
        entries(scratch),
        entries(inside[DAMAGED]),
        entries([*locks, *of_runs]),
        tuple((entry, _process(entry.path)) for entry in entries(leftovers)),
        tuple(skipped),
    )


def _outside(output: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Folders of runs, and the locks and leftovers in or beside them."""
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
    """The runs that use each artifact, by kind and key; and the runs whose artifacts are unknown, with the reason."""
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
        # An unfinished run will need its artifacts again. Its log names them, or that of another run of its sweep with
        # which it shared a job.
        for artifact in _named(run / LOG) if run.parent in open_ else ():
            name = os.path.relpath(run, output)
            if name not in users[artifact]:
                users[artifact].append(f"{name} (its log)")
    return users, unreadable


def _add_parts(users: dict[tuple[str, str], list[str]], root: Path) -> None:
    """Whoever uses an artifact uses what it is made of, too."""
    for (kind, key), runs in list(users.items()):
        for part in _uses(root / kind / key):
            users[part] += [run for run in runs if run not in users[part]]


def _uses(artifact: Path) -> list[tuple[str, str]]:
    """The further artifacts that an artifact is made of, such as a comparison of its methods; damaged, it has none."""
    try:
        record = read_record(artifact / USES)
    except (OSError, ValueError):
        return []
    return [(kind, str(key)) for kind, keys in record.items() if isinstance(keys, list) for key in keys]


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
    """The entries of a folder; a link is skipped and noted."""
    if folder.is_symlink():
        skipped.append(folder)
        return []
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _process(path: Path) -> int:
    found = _LEFTOVER.fullmatch(path.name)
    assert found is not None
    return int(found[1] or found[2])


def _thing(path: Path, name: str) -> Entry:
    size, changed = 0, 0.0
    for part in _parts(path):
        try:
            stat = os.lstat(part)
        except FileNotFoundError:  # removed meanwhile
            continue
        changed = max(changed, stat.st_mtime)
        if not os.path.isdir(part) or os.path.islink(part):
            size += stat.st_size
    return Entry(name, path, size, changed)


def _parts(path: Path) -> Iterator[str]:
    yield str(path)
    if not path.is_symlink():
        for above, folders, files in os.walk(path):
            yield from (os.path.join(above, name) for name in (*folders, *files))
