# SPDX-License-Identifier: MIT
"""Errors of the operating system, such as a full disk: found behind any library's error, and put into one sentence."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

#: Error numbers after which nothing more can be written. They may be hidden behind the error of a library.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EROFS, errno.EIO)
#: Parts of torch's messages about files that could not be written completely; torch drops the system's reason.
CUT_SHORT = ("unexpected pos", "PytorchStreamWriter failed", "iostream error")


def refused_by_system(error: BaseException, folder: str | os.PathLike[str] = "") -> OSError | None:
    """Find the operating system's error behind an error.

    Args:
        error: of any library. folder: the folder that was written into, for an error that names no file.

    Returns:
        The error itself if it is an OSError, or the one that led to it because nothing more could be written, or None.
    """
    if isinstance(error, OSError):
        return _named(error, folder)
    for behind in _chain(error):
        if isinstance(behind, OSError) and behind.errno in UNWRITABLE:
            return _named(behind, folder)
    texts = [str(behind) for behind in _chain(error)]
    for code in UNWRITABLE:  # errors of safetensors and of other processes are only texts
        if any(os.strerror(code) in text for text in texts):
            return OSError(code, os.strerror(code), os.fspath(folder) or None)
    if any(part in text for part in CUT_SHORT for text in texts):
        return OSError(errno.ENOSPC, "a file could not be written completely", os.fspath(folder) or None)
    return None


def first_line(error: BaseException) -> str:
    """An error's type, and the first line of its message without a full stop, if it has one."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def in_one_sentence(error: OSError) -> str:
    """A sentence: what the system refused, where, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return f"{where}{what}; make room and give the same command again: it continues where this one stopped."
    if error.filename is not None and (in_the_way := _in_the_way(Path(os.fsdecode(error.filename)), error)):
        return in_the_way
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{where}{what}; choose a folder that you may write to with output_dir=FOLDER, or a file you may read."
    return f"{where}{what}."


def _in_the_way(path: Path, error: OSError) -> str:
    """A sentence about a file or broken link in the place of a folder, or a folder in that of a file; else empty."""
    if error.errno == errno.EISDIR:
        # In a renaming, the second name is the one that exists.
        return f"{error.filename2 or path} is a folder, but must be a file; remove it and give the same command again."
    for part in [*reversed(path.parents), path]:
        if part.is_symlink() and not part.exists():
            return f"{part} is a link to nowhere ({os.readlink(part)}); make its target available, or remove the link."
        if error.errno in (errno.ENOTDIR, errno.EEXIST) and part.is_file():
            return f"{part} is a file, but must be a folder; remove it, or choose another one with output_dir=FOLDER."
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        yield behind
        behind = behind.__cause__ or behind.__context__


def _named(error: OSError, folder: str | os.PathLike[str]) -> OSError:
    if error.filename is not None or error.errno is None or not os.fspath(folder):
        return error
    return OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(folder))
