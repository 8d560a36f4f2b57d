# SPDX-License-Identifier: MIT
"""Checks that artifacts and the records of finished runs are unchanged since they were written.

An artifact's ``DONE.json`` holds the SHA-256 of each of its files, a run's ``manifest.json`` that of its own files and
artifacts; both hold a digest of themselves. Files are read again only when they may have changed
(:func:`salve.files.file_digests`). Disk damage that leaves size, times and inode unchanged is found by
``salve-store verify``, which reads everything.
"""

import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from salve.files import digest_of, digest_of_file, file_digests, flush, move_memory, read_record
from salve.types import UserError

log = logging.getLogger(__name__)

#: Files of an artifact.
DONE, KEY_SETTINGS = "DONE.json", "key.json"
#: Folders of a store: unfinished results with their locks, and damaged artifacts that were set aside.
UNFINISHED, DAMAGED = "unfinished", "damaged"
#: Files of a run.
MANIFEST, SETTINGS, METRICS = "manifest.json", "config.yaml", "metrics.json"
#: File of an artifact that is made of further ones, such as a comparison of its methods: their keys by kind.
USES = "uses.json"
#: Files that file managers leave in any folder that they show; they are ignored.
_IGNORED = (".DS_Store", "Thumbs.db", "desktop.ini")


# -- artifacts


def damage_of(folder: Path, *, reread: bool = False) -> str:
    """What is wrong with an artifact, in a few words that name the file; empty if it is intact.

    Args:
        folder: of the artifact. reread: read all files, also those whose digests are remembered.
    """
    if not folder.is_dir():
        return "it is a link to nowhere" if folder.is_symlink() else "it is no folder"
    try:
        done = read_record(folder / DONE)
    except (OSError, ValueError) as error:
        return _why(error, DONE)
    files = done.get("files")
    if not isinstance(files, dict) or done.get("digest") != digest_of(files) or "key_settings" not in done:
        return f"{DONE} is not what was written"
    expected = {**files, KEY_SETTINGS: done["key_settings"]}
    if extra := sorted(set(_files(folder)) - expected.keys() - {DONE, KEY_SETTINGS}):
        return f"{extra[0]} does not belong to it"
    if wrong := changed(folder, expected, reread=reread):
        return wrong
    return ""


def changed(folder: Path, digests: Mapping[str, str], *, reread: bool = False) -> str:
    """The first of a folder's files that is missing or changed, and what is wrong with it; empty if none is.

    Args:
        folder: of the files. digests: SHA-256 by path relative to it. reread: as for :func:`damage_of`.
    """
    names = sorted(digests)
    for name in names:
        try:
            if not stat.S_ISREG(os.stat(folder / name).st_mode):
                return f"{name} is no file"
        except (OSError, ValueError) as error:
            return _why(error, name)

    def announce(count: int, size: int) -> None:
        log.info("checking %d files of %s (%.1f GB) once, since they are new here", count, folder, size / 10**9)

    try:
        found = file_digests(folder, names, announce=announce, reread=reread)
        for name, digest in zip(names, found, strict=True):
            # The remembered digest may be damaged, too: read the file before blaming it.
            if digest != digests[name] and digest_of_file(folder / name) != digests[name]:
                return f"{name} is not what was written"
    except OSError as error:
        return _why(error, os.path.relpath(error.filename or folder, folder))
    return ""


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files and links in a folder, relative to it; links are not followed."""
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        for name in (*files, *links):
            if name not in _IGNORED and not name.startswith(".nfs"):
                yield os.path.relpath(os.path.join(above, name), folder)


def _why(error: Exception, name: str) -> str:
    if isinstance(error, RecursionError):
        return f"{name} is nested too deeply"
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    if isinstance(error, OSError):
        return f"{name} cannot be read ({error.strerror})"
    return str(error).rstrip(".")


def check_artifact(folder: Path) -> None:
    """Check an artifact that is read by its path, not through a store.

    Raises:
        UserError: it is missing or damaged.
    """
    if not folder.is_dir() and not folder.is_symlink():
        raise UserError(f"There is no artifact {folder}; the command that made it makes it again.")
    if damage := damage_of(folder):
        raise UserError(f"The artifact {folder} is damaged: {damage}; the command that made it makes it again.")


def check_file(path: Path) -> None:
    """Check a file if it belongs to an artifact; any other file is accepted as it is.

    Raises:
        UserError: the file or the artifact's ``DONE.json`` is damaged.
    """
    if not (path.parent / DONE).exists():
        return
    try:
        digest = read_record(path.parent / DONE)["files"].get(path.name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"The artifact {path.parent} is damaged: {damage_of(path.parent)}.") from None
    if digest is not None and (damage := changed(path.parent, {path.name: digest})):
        raise UserError(f"The artifact {path.parent} is damaged: {damage}; the command that made it makes it again.")


def set_aside(root: Path, kind: str, key: str) -> Path:
    """Move a damaged artifact to ``<root>/damaged/<kind>-<key>``, or to ``…-2``, ``…-3``, … if that is taken.

    Returns:
        Its new path.

    Raises:
        OSError: it cannot be moved.
    """
    folder = root / kind / key
    (root / DAMAGED).mkdir(exist_ok=True)
    number, target = 1, root / DAMAGED / f"{kind}-{key}"
    while os.path.lexists(target):
        number += 1
        target = root / DAMAGED / f"{kind}-{key}-{number}"
    os.rename(folder, target)
    os.utime(target, follow_symlinks=False)  # salve-store gc uses this time as its age
    flush(folder.parent)
    move_memory(folder, target)
    return target


# -- runs


class Damaged(ValueError):
    """A record of a run is damaged; the message names the file and what is wrong."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not what was written.
    """
    try:
        record = read_record(folder / MANIFEST)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(_why(error, MANIFEST)) from error
    made = record.get("artifacts")
    if not isinstance(made, dict) or not all(isinstance(entry, dict) for entry in made.values()):
        raise Damaged(f"{MANIFEST} names no artifacts")
    if not isinstance(record.get("versions", {}), dict):
        raise Damaged(f"{MANIFEST} names no versions")
    if not isinstance(record.get("files"), dict) or record.get("digest") != _digest_without_own(record):
        raise Damaged(f"{MANIFEST} is not what was written")
    return record


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of itself added."""
    return {**manifest, "digest": _digest_without_own(manifest)}


def _digest_without_own(manifest: Mapping[str, Any]) -> str:
    return digest_of({name: value for name, value in manifest.items() if name != "digest"})


def damage_of_run(folder: Path, names: Sequence[str] | None = (SETTINGS, METRICS), *, reread: bool = False) -> str:
    """What is wrong with the record of a finished run; empty if it is intact.

    Args:
        folder: of the run. names: files to check besides the manifest; None for all.
        reread: as for :func:`damage_of`.
    """
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except Damaged as error:
        return str(error)
    wanted = {name: digest for name, digest in manifest["files"].items() if names is None or name in names}
    return changed(folder, wanted, reread=reread)


def artifacts_of_run(folder: Path) -> dict[str, Path]:
    """The folders of a run's artifacts by kind, as its manifest names them; raises as :func:`read_manifest`."""
    made = read_manifest(folder)["artifacts"]
    return {
        kind: (folder / entry["path"]).resolve() for kind, entry in made.items() if isinstance(entry.get("path"), str)
    }
