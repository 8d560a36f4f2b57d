"""Files that are there as a whole or not at all, and digests of what is in them, at a price people accept."""

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
#: Reading more bytes than this takes so long that one should know why.
MUCH = 10**9
#: A file written this short before it is read may be written again without its times telling; in nanoseconds.
_FRESH = 2_000_000_000
_VERSION = 1

State = list[int]


# -- written as a whole


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """``with written_whole(path) as unfinished``: what is written there becomes ``path`` at the end, or is removed.

    When ``path`` has its name, its bytes are on the disk: not even a power cut leaves half of it.

    Raises:
        OSError: it cannot be written.
    """
    # Of a long name only a part, since names have a longest length, too.
    unfinished = path.with_name(f".{path.name[:50]}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    finally:
        with suppress(OSError):  # mostly because it is in its place
            unfinished.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 that is there as a whole or not at all; see :func:`written_whole`."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, written to the disk, so that a power cut cannot take them."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
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
        OSError: it cannot be opened. ValueError: it is no JSON object; the message names the file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply.") from error
    except ValueError as error:  # also for bytes that are no UTF-8
        what = "is no JSON" if path.stat().st_size else "is empty"
        raise ValueError(f"{path.name} {what}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} holds no JSON object.")
    return record


# -- scratch that outlives a kill


def keep(unfinished: Path, path: Path) -> None:
    """Rename a finished piece of scratch into its place, with its digest beside it, for :func:`is_kept`.

    Until the digest of the new piece is written the old one stays valid, whenever a kill comes.
    """
    beside = _beside(path)
    before = beside.read_text(encoding="utf-8").split()[:1] if beside.is_file() else []
    write_whole(beside, "\n".join([digest_of_file(unfinished), *before]) + "\n")
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)


def is_kept(path: Path) -> bool:
    """Whether a piece of scratch is what :func:`keep` put there, and neither foreign, nor cut, nor changed."""
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
        OSError: it cannot be read; the error names it.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:  # a disk that fails in the middle says no name
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where digests are remembered: `salve/files` in the user's cache (`$XDG_CACHE_HOME`, or else `~/.cache`).

    Raises:
        RuntimeError: the user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "salve" / "files"


def file_digests(
    root: Path,
    paths: Sequence[str],
    *,
    announce: Callable[[int, int], None] = lambda count, size: None,
    anew: bool = False,
    own: bool = False,
) -> list[str]:
    """Hex SHA-256 of the bytes of every file ``root / path``.

    A file is read where its size, times of change or inode differ from when it was last read; what is remembered about
    it lies in :func:`cache_folder`, one JSON file for each root. Where that cannot be read or written, all are read.

    Args:
        root: their folder. paths: as seen from it. announce: called with how many files and bytes are read, if they
            are more than :data:`MUCH` bytes.
        anew: read all of them, whatever is remembered.
        own: nobody but this process writes them, so that those that were just written are remembered, too.

    Raises:
        OSError: a file that cannot be read.
    """
    memory = _memory(root)
    known = {} if anew else _recall(memory)
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
    """What is remembered of a folder goes with it when it is renamed, and is forgotten where there was one before."""
    old, new = _memory(before), _memory(after)
    if old is not None and new is not None:
        with suppress(OSError):
            new.unlink(missing_ok=True)
            os.replace(old, new)


def forget(root: Path) -> None:
    """Forget a folder that is removed."""
    memory = _memory(root)
    if memory is not None:
        with suppress(OSError):
            memory.unlink(missing_ok=True)


def _state(path: Path) -> State:
    """What tells a changed file: size, time of modification, time of the inode's change (which copying tools cannot
    set back), inode."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


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
        files = record["files"] if record["version"] == _VERSION else {}
        return {path: entry for path, entry in files.items() if isinstance(entry, list)}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # not there, or damaged: all files are read again
        return {}


def _remember(memory: Path | None, files: Mapping[str, Iterable[Any]]) -> None:
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
