"""What the system refuses, such as a write on a full disk: one error, in one sentence, whichever library met it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

#: Reasons for which nothing more can be written, and one looks for them behind another error that they led to.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EROFS, errno.EIO)
#: What torch says of a file that came out shorter than what it wrote; it drops the system's reason.
CUT_SHORT = ("unexpected pos", "PytorchStreamWriter failed", "iostream error")


def refused_by_system(error: BaseException, place: str | os.PathLike[str] = "") -> OSError | None:
    """The system's reason for an error.

    Args:
        error: of any library. place: the folder that was written into, for an error that names no file.

    Returns:
        The OSError that the error is, or that led to it because nothing more could be written; None if there is none.
    """
    if isinstance(error, OSError):
        return _named(error, place)
    for behind in _chain(error):
        if isinstance(behind, OSError) and behind.errno in UNWRITABLE:
            return _named(behind, place)
    texts = [str(behind) for behind in _chain(error)]
    for code in UNWRITABLE:  # safetensors' own errors, and those of other processes, are texts
        if any(os.strerror(code) in text for text in texts):
            return OSError(code, os.strerror(code), os.fspath(place) or None)
    if any(part in text for part in CUT_SHORT for text in texts):
        return OSError(errno.ENOSPC, "a file could not be written to its end", os.fspath(place) or None)
    return None


def in_one_sentence(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return f"{where}{what}; make room and give the same command again, which goes on where this one stopped."
    if error.filename is not None and (in_the_way := _in_the_way(Path(os.fsdecode(error.filename)), error)):
        return in_the_way
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"{where}{what}; choose a folder that you may write to with output_dir=FOLDER, or a file you may read."
    return f"{where}{what}."


def _in_the_way(path: Path, error: OSError) -> str:
    """One sentence, where a file or a link to nowhere lies where a folder should be, or the other way round."""
    if error.errno == errno.EISDIR:
        # Of a renaming the second name is the one that is taken.
        return (
            f"{error.filename2 or path} is a folder, where a file should be; remove it and give the same command again."
        )
    for place in [*reversed(path.parents), path]:
        if place.is_symlink() and not place.exists():
            return (
                f"{place} is a link to nowhere ({os.readlink(place)}); make what it leads to available, or remove it."
            )
        if error.errno in (errno.ENOTDIR, errno.EEXIST) and place.is_file():
            return f"{place} is a file, where a folder should be; remove it, or choose another with output_dir=FOLDER."
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        yield behind
        behind = behind.__cause__ or behind.__context__


def _named(error: OSError, place: str | os.PathLike[str]) -> OSError:
    if error.filename is not None or error.errno is None or not os.fspath(place):
        return error
    return OSError(error.errno, error.strerror or os.strerror(error.errno), os.fspath(place))
