# SPDX-License-Identifier: MIT
"""The edit files of a run's folder, by name, and the classifier that they were made for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salve.integrity import check_file
from salve.types import UserError
from salve.untrusted import parse_json, read_text, shown, slug

#: In the folder of a run.
EDITS, MANIFEST = "edits", "manifest.json"
CLASSIFIER = "model.safetensors"
#: Names that a message lists, at most.
_LISTED = 20


def files_of(paths: Sequence[Path], names: Sequence[str], every: bool = False) -> list[Path]:
    """The edit files that a command line selects.

    Args:
        paths: edit files, and folders of runs. names: edits of these folders, by class or file name.
        every: without names, select all edits of the folders.

    Raises:
        UserError: a name is unknown or ambiguous, or none of a folder's edits is chosen.
    """
    folders = [path for path in paths if path.is_dir()]
    if names and not folders:
        raise UserError("--edit chooses among the edits of a run, but no folder of a run was given.")
    found = [path for path in paths if not path.is_dir()]
    known = {file: name for folder in folders for file, name in edits_of(folder).items()}
    if names:
        found += [_named(name, known, folders) for name in names]
    elif folders and not every and len(known) > 1:
        raise UserError(f"Choose one of the edits of {folders[0]} with --edit: {_list(known)}.")
    else:
        found += list(known)
    return list(dict.fromkeys(found))


def edits_of(folder: Path) -> dict[Path, str]:
    """The edit files in a run's folder, or in a folder of edits, and the name in each ("" if it has none).

    Raises:
        UserError: there are none.
    """
    edits = folder / EDITS if (folder / EDITS).is_dir() else folder
    found = {}
    for path in sorted(edits.glob("*.json")):
        try:
            record = parse_json(read_text(path))
        except ValueError:  # reported when the file is loaded
            record = {"contributions": []} if edits.name == EDITS else {}
        if isinstance(record, dict) and ("contributions" in record or "changed" in record):
            name = record.get("name")
            found[path] = name if isinstance(name, str) else ""
    if not found:
        raise UserError(f"{folder} holds no edit files; a run has them in its folder {EDITS} after the stage control.")
    return found


def classifier_of(paths: Sequence[Path]) -> Path:
    """The weights of a run's classifier.

    Raises:
        UserError: none of the paths is the folder of a run, or its manifest does not lead to a classifier.
    """
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise UserError("Give the WEIGHTS to edit; they can be left out only with the folder of a run.")
    folder = folders[0]
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"Give the WEIGHTS to edit; {folder} is no folder of a finished run (it has no {MANIFEST}).")
    try:
        classifier: Any = parse_json(read_text(path))["artifacts"]["classifier"]["path"]
        weights = folder / classifier / CLASSIFIER
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"Give the WEIGHTS to edit; {path} does not say where the run's classifier is.") from error
    if not weights.is_file():
        raise UserError(f"Give the WEIGHTS to edit; the run's classifier is no longer at {shown(str(weights), 500)}.")
    check_file(weights)
    return weights


def _named(name: str, known: dict[Path, str], folders: Sequence[Path]) -> Path:
    """The edit of a name: as written in the file, else by the file's name, with or without its number."""
    plain = slug(name)
    tests = (
        lambda file: known[file] == name,
        lambda file: name in (file.stem, file.name),
        lambda file: plain and plain in (slug(known[file]), slug(file.stem), slug(file.stem.partition("-")[2])),
    )
    for test in tests:
        hits = [file for file in known if test(file)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise UserError(f"--edit {name} could be {' or '.join(file.stem for file in hits)}; give one of these.")
    raise UserError(f"{folders[0]} has no edit called {name}; its edits are {_list(known)}.")


def _list(known: dict[Path, str]) -> str:
    names = [shown(name or file.stem) for file, name in known.items()]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
