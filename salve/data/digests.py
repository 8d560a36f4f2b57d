"""Digests of many files at a price people accept: a file is read again only when it may have changed."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from salve.artifacts import digest_of_file
from salve.types import UserError

log = logging.getLogger(__name__)

_READERS = 8
#: Reading more bytes than this takes so long that one should know why.
_MUCH = 10**9
#: A file written this short before it is read may be written again without its times telling; in nanoseconds.
_FRESH = 2_000_000_000
_VERSION = 1

State = list[int]


def cache_folder() -> Path:
    """Where digests are remembered: `salve/files` in the user's cache (`$XDG_CACHE_HOME`, or else `~/.cache`).

    Raises:
        RuntimeError: the user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "salve" / "files"


def file_digests(root: Path, paths: Sequence[str]) -> list[str]:
    """Hex SHA-256 of the bytes of every file `root / path`.

    A file is read where its size, times of change or inode differ from when it was last read; what is remembered about
    it lies in `cache_folder`, one JSON file for each root. Where that cannot be read or written, all are read.

    Raises:
        UserError: a file that cannot be read.
    """
    memory = _memory(root)
    known = _recall(memory)
    now = time.time_ns()
    states = [_state(root, path) for path in paths]
    unknown = [
        (path, state) for path, state in zip(paths, states, strict=True) if known.get(path, [None])[:-1] != state
    ]
    if unknown:
        if (size := sum(state[0] for _, state in unknown)) > _MUCH:
            log.info(
                "reading %d images (%.1f GB) once, to find results made from these and no others",
                len(unknown),
                size / 10**9,
            )
        with ThreadPoolExecutor(_READERS) as pool:
            digests = pool.map(lambda item: _digest(root, item[0]), unknown)
            read = {path: [*state, digest] for (path, state), digest in zip(unknown, digests, strict=True)}
        known |= read
        fresh = {path for path, state in unknown if max(state[1:3]) > now - _FRESH}
        _remember(memory, {path: entry for path, entry in known.items() if path not in fresh})
    return [known[path][-1] for path in paths]


def _state(root: Path, path: str) -> State:
    """What tells a changed file: size, time of modification, time of the inode's change (which copying tools cannot
    set back), inode."""
    try:
        stat = os.stat(root / path)
    except OSError as error:  # a link to nowhere
        raise UserError(f"the image {path} of {root} cannot be opened ({error.strerror})") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _digest(root: Path, path: str) -> str:
    try:
        return digest_of_file(root / path)
    except OSError as error:
        raise UserError(f"the image {path} of {root} cannot be read ({error.strerror})") from error


def _memory(root: Path) -> Path | None:
    """The file that remembers a root's digests; None where there is no place for it."""
    try:
        return cache_folder() / f"{hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]}.json"
    except RuntimeError:
        return None


def _recall(memory: Path | None) -> dict[str, list]:
    if memory is None:
        return {}
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        return dict(record["files"]) if record["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: all files are read again
        return {}


def _remember(memory: Path | None, files: dict[str, list]) -> None:
    if memory is None:
        return
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=memory.parent, suffix=".tmp")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "files": files}, file, separators=(",", ":"))
            os.replace(scratch, memory)  # in one step: others may read or write it meanwhile
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError:
        pass  # a cache that cannot be written costs time, and nothing else
