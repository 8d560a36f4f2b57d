"""Files that somebody else may have made: what they claim is compared with their size before they are read.

A file may be damaged, or made to fill the memory of whoever opens it. What passes here is a file of the disk, and takes
no more memory than its size suggests. Imports nothing that takes time.
"""

import json
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from salve.types import UserError

#: Bytes of what is read as a whole and becomes many small objects: a text, the header of a safetensors file, the
#: pickled part of a torch file. The largest networks' take a few megabytes.
MOST_BYTES = 16 * 2**20
#: Letters of a name from a file that a sentence shows.
_SHOWN = 100

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: Path, missing: str = "") -> int:
    """The size of a file in bytes.

    Raises:
        UserError: there is none, which ``missing`` says in a sentence; or it is none that can be read to its end: a
            folder, a named pipe (reading it waits for ever), a device (it has no end), links that lead in a circle.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing or f"There is no file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise UserError(f"{shown(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise UserError(f"{path} is {kind}, and no file.")
    return found.st_size


def read_text(path: Path, missing: str = "") -> str:
    """A text in UTF-8.

    Raises:
        UserError: as :func:`check_file`; it cannot be read, is no text, or is larger than :data:`MOST_BYTES`.
    """
    size = check_file(path, missing)
    if size > MOST_BYTES:
        raise UserError(f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} that a text may have.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or gives a key of an object twice; the message is part of a
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
        raise ValueError(f"it gives {shown(twice)} twice")
    return found


def check_safetensors(path: Path, missing: str = "") -> None:
    """Look at the size of a safetensors file's header. Where the tensors lie is checked by the library that reads them.

    Raises:
        UserError: as :func:`check_file`; the file is cut short, or its header is larger than :data:`MOST_BYTES`.
    """
    size = check_file(path, missing)
    try:
        with path.open("rb") as file:
            first = file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error.strerror or error}.") from error
    header = int.from_bytes(first, "little")
    if len(first) < 8 or (header <= MOST_BYTES and header + 8 > size):
        raise UserError(f"{path} cannot be read as safetensors: it is cut short, or no such file.")
    if header > MOST_BYTES:
        raise UserError(
            f"{path} cannot be read as safetensors: its header claims {header:,} bytes, more than the {MOST_BYTES:,} "
            "that one may have."
        )


def check_torch(path: Path, missing: str = "") -> None:
    """Look at the sizes of what a torch file, which is a zip archive, has in it.

    Raises:
        UserError: as :func:`check_file`; the archive is damaged, has compressed parts, or parts that lie in one
            another, so that it would be larger in memory than on the disk; or its pickled part is larger than
            :data:`MOST_BYTES`.
    """
    size = check_file(path, missing)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # the older format, or none of torch's: a plain pickle
                return
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zipfile raises almost anything for a damaged archive
        raise UserError(f"{path} could not be read as a state_dict: it is a damaged archive.") from error
    if any(part.filename.partition("/")[2] == "constants.pkl" for part in parts):
        return  # a TorchScript model, which torch refuses by its name alone
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UserError(
            f"{path} was not loaded: it is a compressed archive, which torch.save never writes, and may be of any size "
            "once it is unpacked; load it where it comes from and save it again with torch.save."
        )
    if sum(part.file_size for part in parts) > size:
        raise UserError(f"{path} could not be read as a state_dict: its parts claim more bytes than the file has.")
    pickled = max((part.file_size for part in parts if part.filename.endswith(".pkl")), default=0)
    if pickled > MOST_BYTES:
        raise UserError(
            f"{path} was not loaded: besides tensors it holds {pickled:,} bytes of other things, more than the "
            f"{MOST_BYTES:,} that are read; save its state_dict by itself."
        )


def shown(text: str, most: int = _SHOWN) -> str:
    """A name from a file as a sentence shows it: printable, on one line, and not long."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[: most + 1])
    return plain if len(text) <= most else plain[:most] + "…"


def some(names: Iterable[object], most: int = 3) -> str:
    """The first of several names and how many more there are: ``a, b, c and 2 more``."""
    texts = [str(name) for name in names]
    return ", ".join(shown(text) for text in texts[:most]) + (
        f" and {len(texts) - most} more" if len(texts) > most else ""
    )


def reason(error: Exception) -> str:
    """The first sentence of an error's message, on one line and without its full stop."""
    return shown(" ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__, 300)
