# SPDX-License-Identifier: MIT
"""Atomic writes, and digests of files that are remembered until the file changes."""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_READERS = 8
#: Announce reading if it is more than this, in bytes.
MUCH = 10**9
#: In nanoseconds: a file changed more recently could change again without a new time stamp, so it is not remembered.
_FRESH = 2_000_000_000
_VERSION = 1

State = list[int]


# -- atomic writes


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file atomically: ``with written_whole(path) as unfinished`` renames ``unfinished`` at the end.

    After an error ``unfinished`` is removed. The bytes reach the disk before the rename, so that even a power cut
    leaves either the whole file or none.

    Raises:
        OSError: it cannot be written.
    """
    # Long names are cut, since file systems limit the length of a name.
    unfinished = path.with_name(f".{path.name[:50]}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        with suppress(OSError):  # after the rename it no longer exists
            unfinished.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see :func:`written_whole`."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk, so that they survive a power cut."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record with sorted keys."""
    path.write_text(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON record.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object; the message names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply.") from error
    except ValueError as error:  # includes bytes that are no UTF-8
        what = "is no JSON" if path.stat().st_size else "is empty"
        raise ValueError(f"{path.name} {what}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds no JSON object.")
    return record


# -- scratch that outlives a kill


def keep(unfinished: Path, path: Path) -> None:
    """Rename a finished file of scratch to ``path``, and write its digest beside it, for :func:`is_kept`.

    The digest of an older ``path`` is kept until the new file is in place: after a kill, whichever file is there is
    valid.
    """
    beside = _beside(path)
    before = beside.read_text(encoding="utf-8").split()[:1] if beside.is_file() else []
    write_whole(beside, "\n".join([digest_of_file(unfinished), *before]) + "\n")
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)


def is_kept(path: Path) -> bool:
    """Whether a file of scratch is unchanged since :func:`keep` put it there."""
    try:
        return digest_of_file(path) in _beside(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return False


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


# -- digests


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read; the error names the file.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:  # the error of a failing read names no file
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder of remembered digests: ``salve/files`` in ``$XDG_CACHE_HOME``, or else in ``~/.cache``.

    Raises:
        RuntimeError: the user has no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "salve" / "files"


def file_digests(
    root: Path,
    paths: Sequence[str],
    *,
    announce: Callable[[int, int], None] = lambda count, size: None,
    reread: bool = False,
    own: bool = False,
) -> list[str]:
    """Hex SHA-256 of every file ``root / path``.

    A file is read only if its size, times or inode changed since it was last read. Digests are remembered in
    :func:`cache_folder`, in one JSON file per root. Without it all files are read.

    Args:
        root: folder of the files. paths: relative to it.
        announce: called with the number of files and bytes to read, if these are more than :data:`MUCH`.
        reread: read all files.
        own: only this process writes the files, so that even files written just now can be remembered.

    Raises:
        OSError: a file cannot be read.
    """
    memory = _memory(root)
    known = {} if reread else _recall(memory)
    now = time.time_ns()
    states = [_state(root / path) for path in paths]
    unknown = [
        (path, state) for path, state in zip(paths, states, strict=True) if known.get(path, [None])[:-1] != state
    ]
    if unknown:
        if (size := sum(state[0] for _, state in unknown)) > MUCH:
            announce(len(unknown), size)
        with ThreadPoolExecutor(_READERS) as pool:
            digests = pool.map(lambda item: digest_of_file(root / item[0]), unknown)
            read = {path: [*state, digest] for (path, state), digest in zip(unknown, digests, strict=True)}
        known |= read
        fresh = set() if own else {path for path, state in unknown if max(state[1:3]) > now - _FRESH}
        _remember(memory, {path: entry for path, entry in known.items() if path not in fresh})
    return [known[path][-1] for path in paths]


def move_memory(before: Path, after: Path) -> None:
    """Move the remembered digests of a folder that was renamed; forget those of a folder it replaced."""
    old, new = _memory(before), _memory(after)
    if old is not None and new is not None:
        with suppress(OSError):
            new.unlink(missing_ok=True)
            os.replace(old, new)


def forget(root: Path) -> None:
    """Forget the digests of a folder that was removed."""
    memory = _memory(root)
    if memory is not None:
        with suppress(OSError):
            memory.unlink(missing_ok=True)


def _state(path: Path) -> State:
    """What reveals a change: size, modification time, inode change time (which no copying tool can set), and inode."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _memory(root: Path) -> Path | None:
    """The file with a root's remembered digests; None without a home folder."""
    try:
        return cache_folder() / f"{hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]}.json"
    except RuntimeError:
        return None


def _recall(memory: Path | None) -> dict[str, list]:
    if memory is None:
        return {}
    try:
        record = json.loads(memory.read_text(encoding="utf-8"))
        files = record["files"] if record["version"] == _VERSION else {}
        return {path: entry for path, entry in files.items() if isinstance(entry, list)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # missing or damaged: all files are read again


def _remember(memory: Path | None, files: Mapping[str, Iterable[Any]]) -> None:
    if memory is None:
        return
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=memory.parent, suffix=".tmp")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "files": files}, file, separators=(",", ":"))
            os.replace(scratch, memory)  # atomic, since other processes may read or write it meanwhile
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError:
        pass  # without a cache, files are read again
