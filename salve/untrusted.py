# SPDX-License-Identifier: MIT
"""Check files that somebody else may have made, before they are read.

A file may be damaged, or made to fill the memory of whoever opens it. A file that passes is a regular file and takes no
more memory than its size suggests. Imports nothing that takes time.
"""

import json
import os
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from salve.types import UserError

#: Bytes of a text, of the header of a safetensors file, or of the pickled part of a torch file, at most: these become
#: many small objects. Those of the largest networks have a few megabytes.
MOST_BYTES = 16 * 2**20
#: Letters of a name from a file that a message shows, at most.
_SHOWN = 100

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: Path, missing: str = "") -> int:
    """Check that a path is a regular file.

    Args:
        path: the file. missing: the message if there is no such file.

    Returns:
        Its size in bytes.

    Raises:
        UserError: it is missing, or a folder, a named pipe (reading it may wait for ever), a device (it may have no
            end), or a circle of links.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing or f"There is no file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise UserError(f"{shown(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise UserError(f"{path} is {kind}, not a file.")
    return found.st_size


def read_text(path: Path, missing: str = "") -> str:
    """Read a text file in UTF-8.

    Raises:
        UserError: as :func:`check_file`; or it cannot be read, is not UTF-8, or is larger than :data:`MOST_BYTES`.
    """
    size = check_file(path, missing)
    if size > MOST_BYTES:
        raise UserError(f"{path} has {size:,} bytes, but a text may have at most {MOST_BYTES:,}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has a key of an object twice; the message is part of a
            sentence.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has {shown(twice)} twice")
    return found


def check_safetensors(path: Path, missing: str = "") -> None:
    """Check the size of a safetensors file's header; the library itself checks the offsets of tensors.

    Raises:
        UserError: as :func:`check_file`; or the file is cut short, or its header is larger than :data:`MOST_BYTES`.
    """
    size = check_file(path, missing)
    try:
        with path.open("rb") as file:
            first = file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error.strerror or error}.") from error
    header = int.from_bytes(first, "little")
    if len(first) < 8 or (header <= MOST_BYTES and header + 8 > size):
        raise UserError(f"{path} cannot be read as safetensors: it is cut short, or of another format.")
    if header > MOST_BYTES:
        raise UserError(
            f"{path} cannot be read as safetensors: its header claims {header:,} bytes, but may have at most "
            f"{MOST_BYTES:,}."
        )


def check_torch(path: Path, missing: str = "") -> None:
    """Check the sizes of the parts of a torch file, which is a zip archive.

    Raises:
        UserError: as :func:`check_file`; or the archive is damaged, has compressed or overlapping parts, so that it
            would be larger in memory than on the disk, or its pickled part is larger than :data:`MOST_BYTES`.
    """
    size = check_file(path, missing)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # torch's format without an archive, or another one
                return
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zipfile raises almost anything for a damaged archive
        raise UserError(f"{path} could not be read as a state_dict: it is a damaged archive.") from error
    if any(part.filename.partition("/")[2] == "constants.pkl" for part in parts):
        return  # a TorchScript model, which torch refuses itself
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UserError(
            f"{path} was not loaded: it is a compressed archive, which torch.save never writes and which may unpack to "
            "any size; load it where it was made and save it again with torch.save."
        )
    if sum(part.file_size for part in parts) > size:
        raise UserError(f"{path} could not be read as a state_dict: its parts claim more bytes than the file has.")
    pickled = max((part.file_size for part in parts if part.filename.endswith(".pkl")), default=0)
    if pickled > MOST_BYTES:
        raise UserError(
            f"{path} was not loaded: besides tensors it holds {pickled:,} bytes of other things, but at most "
            f"{MOST_BYTES:,} are read; save only its state_dict."
        )


def slug(text: object) -> str:
    """Letters, digits and hyphens of a text, at most 40: safe as a file name and in a link; may be empty."""
    plain = unicodedata.normalize("NFKD", str(text)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].rstrip("-")


def shown(text: str, most: int = _SHOWN) -> str:
    """A name from a file as a message shows it: printable, on one line, and of at most ``most`` letters."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[: most + 1])
    return plain if len(text) <= most else plain[:most] + "…"


def some(names: Iterable[object], most: int = 3) -> str:
    """The first ``most`` names and how many more there are: ``a, b, c and 2 more``."""
    texts = [str(name) for name in names]
    return ", ".join(shown(text) for text in texts[:most]) + (
        f" and {len(texts) - most} more" if len(texts) > most else ""
    )


def reason(error: Exception) -> str:
    """The first sentence of an error's message, on one line and without its full stop."""
    return shown(" ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__, 300)
