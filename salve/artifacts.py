# SPDX-License-Identifier: MIT
"""Content-addressed, immutable results on disk.

``Store.get_or_make(kind, key_settings, make)`` returns the artifact in the folder ``<root>/<kind>/<key>``. The key is
the hash of ``key_settings``: the settings that the result depends on, and the digests of the artifacts it was made
from. A result is written to a temporary folder, checksummed, marked with ``DONE.json`` and renamed into place, so a
folder that exists is complete. A second process that wants the same result waits for the first.
``Store.get_or_make_many`` does the same for results that are made together.

All files of a result are checked before any is read (:func:`salve.integrity.damage_of`), since stages open them in many
places, some only when they need a row. A damaged result is set aside and made again.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from salve.cells import for_spreadsheets, from_spreadsheets
from salve.files import digest_of as digest_of
from salve.files import digest_of_file as digest_of_file
from salve.files import file_digests, flush, forget, move_memory
from salve.files import is_kept as is_kept
from salve.files import keep as keep
from salve.files import read_record as read_record
from salve.files import write_record as write_record
from salve.files import write_whole as write_whole
from salve.files import written_whole as written_whole
from salve.integrity import DONE as DONE
from salve.integrity import KEY_SETTINGS, UNFINISHED, damage_of, set_aside
from salve.system import refused_by_system
from salve.types import UserError

if TYPE_CHECKING:  # importing them takes seconds, and settings are checked without them
    import pandas as pd
    from torch import Tensor

#: Part of every key. Raise it when the same settings give another result; otherwise old results would be reused.
REVISION = 2


def digest_of_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """Hex SHA-256 of named tensors: names, dtypes, shapes and bits, independent of their order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class NotMade(LookupError):
    """The artifact is not there, and the store may not make it (:meth:`Store.only_found`)."""


@dataclass(frozen=True)
class Artifact:
    """One finished result: its address, its folder, the digest of its content, and whether it was found, not made."""

    kind: str
    key: str
    path: Path
    digest: str
    reused: bool

    def file(self, name: str) -> Path:
        """Path of one of its files."""
        return self.path / name

    def table(self, name: str) -> "pd.DataFrame":
        """One of its tables."""
        return read_table(self.path / name)

    def tensors(self, name: str) -> "dict[str, Tensor]":
        """One of its safetensors files."""
        return load_tensors(self.path / name)

    def record(self, name: str) -> dict[str, Any]:
        """One of its JSON records."""
        return read_record(self.path / name)


class Store:
    """The folder that holds every artifact.

    Args:
        root: folder of the artifacts; made when the first one is written.
        announce: called with a sentence each time an artifact is found or made.
    """

    def __init__(self, root: Path, announce: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self._announce = announce
        self._may_make = True

    def only_found(self) -> "Store":
        """The same store, but it raises :class:`NotMade` instead of making anything."""
        store = Store(self.root, self._announce)
        store._may_make = False
        return store

    def check_writable(self) -> None:
        """Raise OSError if the store cannot be written to; leaves at most an empty folder."""
        unfinished = self.root / UNFINISHED
        unfinished.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=unfinished) as file:
            file.write(b"\0" * 4096)

    @staticmethod
    def _key(key_settings: Mapping[str, Any]) -> str:
        return digest_of({"revision": REVISION, "key_settings": dict(key_settings)})[:16]

    def find(self, kind: str, key_settings: Mapping[str, Any]) -> Artifact | None:
        """The finished artifact of these settings; None if there is none or it is damaged."""
        return self._look(kind, self._key(key_settings))[0]

    def _look(self, kind: str, key: str) -> tuple[Artifact | None, str]:
        """An intact artifact, or what is wrong with it; ``(None, "")`` where there is none."""
        folder = self.root / kind / key
        if not os.path.lexists(folder):
            return None, ""
        if damage := damage_of(folder):
            return None, damage if os.path.lexists(folder) else ""  # another process may have set it aside just now
        return Artifact(kind, key, folder, read_record(folder / DONE)["digest"], reused=True), ""

    def get_or_make(self, kind: str, key_settings: Mapping[str, Any], make: Callable[[Path, Path], None]) -> Artifact:
        """Find the artifact of these settings, or make it.

        Args:
            kind: such as ``sae``; the name of the folder above.
            key_settings: JSON-like; everything that the content depends on.
            make: called as ``make(folder, scratch)`` to write the result into ``folder``. What it keeps in ``scratch``,
                such as checkpoints or finished shards, survives a kill and is there when it is called again; it is
                removed once the artifact is complete.

        Returns:
            The artifact. Its ``digest`` covers names and bytes of all files that ``make`` wrote.
        """

        def make_one(folders: Mapping[int, Path], scratch: Path) -> None:
            make(folders[0], scratch)

        [artifact] = self.get_or_make_many(kind, [key_settings], make_one)
        assert artifact is not None, "make removed its folder"
        return artifact

    def get_or_make_many(
        self, kind: str, keys_settings: Sequence[Mapping[str, Any]], make: Callable[[Mapping[int, Path], Path], None]
    ) -> list[Artifact | None]:
        """Find several artifacts, and make the missing ones together.

        Args:
            kind: of all of them. keys_settings: one for each.
            make: called as ``make({index of the settings: folder}, scratch)`` for the missing ones. It writes each
                result into its folder; a folder that it removes becomes no artifact. ``scratch`` survives a kill for
                the next call with the same ones missing.

        Returns:
            An artifact for each of the settings; None where ``make`` removed the folder.

        Raises:
            UserError: an artifact is damaged and cannot be set aside.
        """
        keys = [self._key(key_settings) for key_settings in keys_settings]
        wanted = {key: i for i, key in enumerate(keys)}
        answers: dict[str, Artifact | None] = {}
        damaged: dict[str, str] = {}

        def look(how: str) -> list[str]:
            """Find what is there; returns the sorted keys of what is missing or damaged."""
            damaged.clear()
            for key in [key for key in wanted if key not in answers]:
                found, reason = self._look(kind, key)
                if reason:
                    damaged[key] = reason
                elif found:
                    self._announce(f"{kind} {key}: {how}")
                    answers[key] = found
            return sorted(wanted.keys() - answers.keys())

        missing = look("found, not made again")
        # Damaged artifacts are made again even by a store that only finds: they would silently be missing otherwise.
        if not self._may_make and (absent := [key for key in missing if key not in damaged]):
            raise NotMade(f"{kind} {', '.join(absent)} is not there.")
        unfinished = self.root / UNFINISHED
        folders = {key: unfinished / f"{kind}-{key}" for key in missing}
        with ExitStack() as held:
            with self._saying_what_is_damaged(kind, damaged):
                for key in missing:  # all processes take locks in this order, which avoids deadlock
                    unfinished.mkdir(parents=True, exist_ok=True)
                    (self.root / kind).mkdir(exist_ok=True)  # before hours of work, not after them
                    # Beside the folder that it guards, which is removed while the lock is held.
                    held.enter_context(FileLock(unfinished / f"{kind}-{key}.lock"))
            if missing and (missing := look("made meanwhile by another process")):
                with self._saying_what_is_damaged(kind, damaged):
                    for key, reason in damaged.items():
                        aside = set_aside(self.root, kind, key)
                        self._announce(f"{kind} {key}: damaged ({reason}), set aside as {aside}")
                results = {key: folders[key] / "result" for key in missing}
                alone = len(missing) == 1
                scratch = folders[missing[0]] / "scratch" if alone else unfinished / f"{kind}-{digest_of(missing)[:16]}"
                # If all results are intact, a kill came between sealing and publishing them.
                if making := any(damage_of(result) for result in results.values()):
                    self._announce(f"{kind} {', '.join(missing)}: making")
                    for result in results.values():
                        _emptied(result)
                    if not scratch.is_dir():
                        _emptied(scratch)
                    make({wanted[key]: results[key] for key in missing}, scratch)
                    # After a kill in this loop the same ones are missing, with the same scratch.
                    for key, result in results.items():
                        if result.is_dir():
                            _seal(result, keys_settings[wanted[key]])
                shutil.rmtree(scratch, ignore_errors=True)
                for key, result in results.items():
                    answers[key] = None
                    if result.is_dir():
                        digest = read_record(result / DONE)["digest"]
                        answers[key] = Artifact(kind, key, self._publish(result, kind, key), digest, reused=not making)
                    shutil.rmtree(folders[key], ignore_errors=True)
        return [answers[key] for key in keys]

    def _publish(self, result: Path, kind: str, key: str) -> Path:
        """Rename a complete result into its place."""
        final = self.root / kind / key
        os.replace(result, final)
        flush(final.parent)
        move_memory(result, final)
        return final

    @contextmanager
    def _saying_what_is_damaged(self, kind: str, damaged: Mapping[str, str]) -> Iterator[None]:
        """Turn an OSError, such as of a read-only disk, into a UserError that names the damaged artifact."""
        try:
            yield
        except OSError as error:
            for key, reason in damaged.items():
                raise UserError(
                    f"The artifact {self.root / kind / key} is damaged: {reason}; it cannot be set aside "
                    f"({error.strerror}): remove it, or choose another folder with output_dir=FOLDER."
                ) from error
            raise


def _seal(folder: Path, key_settings: Mapping[str, Any]) -> None:
    """Flush a result's files to the disk, checksum them, and mark the result as complete."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in paths]
    write_record(folder / KEY_SETTINGS, dict(key_settings))
    for path in [*paths, folder / KEY_SETTINGS, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush(path)
    *digests, of_key = file_digests(folder, [*names, KEY_SETTINGS], own=True)
    files = dict(zip(names, digests, strict=True))
    with written_whole(folder / DONE) as unfinished:
        write_record(unfinished, {"digest": digest_of(files), "files": files, "key_settings": of_key})


def _remove(path: Path) -> None:
    """Remove a file, folder or link of scratch."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        (path / DONE).unlink(missing_ok=True)  # a half-removed folder must not look complete
        shutil.rmtree(path)
    forget(path)


def _emptied(folder: Path) -> None:
    """Make an empty scratch folder, replacing whatever lies there."""
    _remove(folder)
    if not folder.parent.is_dir():
        _remove(folder.parent)
    folder.mkdir(parents=True)


def is_own(folder: Path, path: Path) -> bool:
    """Whether a file of an artifact lies in its folder: a link to another file is not shown, copied or uploaded."""
    return path.resolve().is_relative_to(folder.resolve())


def write_table(path: Path, frame: "pd.DataFrame") -> None:
    """Write a table as CSV, for :func:`read_table`; infinite values are written as ``inf``."""
    for_spreadsheets(frame).to_csv(path, index=False)


#: Columns that hold names and are read as text: a class may be called "01", "inf" or "NA".
TEXT_COLUMNS = (
    *("class", "classes", "top_class", "worst_class", "target", "label", "concept", "true", "predicted"),
    *("latents", "kind", "mode", "split", "reason", "edit_file", "run", "run_a", "run_b"),
    *("set", "attribute", "attribute_value"),
)


def read_table(path: Path) -> "pd.DataFrame":
    """Read a table of :func:`write_table`. Empty names are ""; in other columns only an empty cell is missing."""
    import pandas as pd

    dtype = dict.fromkeys(TEXT_COLUMNS, str)
    # Below 3.1 pandas needs this option to read numbers exactly; from 3.1 on it always does and refuses the option.
    exact = {"float_precision": "round_trip"} if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1) else {}
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dtype, **exact)
    for column in frame.columns.intersection(list(TEXT_COLUMNS)):
        frame[column] = frame[column].fillna("").astype(str)
    return from_spreadsheets(frame)


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", header: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, with an optional text header of one entry.

    Raises:
        ValueError: the header has several entries, which safetensors writes in no fixed order, so that the file's
            digest would change.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    if header and len(header) > 1:
        raise ValueError(f"A header must have one entry, so that its bytes are fixed, not {', '.join(header)}.")
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata=dict(header or {}))
        path.chmod(mode)  # safetensors makes it readable for its owner only
    except SafetensorError as error:  # its only reason is the system's, such as a full disk
        raise refused_by_system(error, path) or OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Read named tensors."""
    from safetensors.torch import load_file

    return load_file(path)


def read_header(path: Path) -> dict[str, str]:
    """The text header of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
