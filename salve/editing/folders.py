"""The edit files of a run's folder, by name, and the classifier that they were made for."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salve.integrity import check_file
from salve.types import UserError
from salve.untrusted import parse_json, read_text, shown

#: Of a run's folder.
EDITS, MANIFEST = "edits", "manifest.json"
CLASSIFIER = "model.safetensors"
#: Names that a refusal lists.
_LISTED = 20


def files_of(paths: Sequence[Path], names: Sequence[str], every: bool = False) -> list[Path]:
    """The edit files that a command line names.

    Args:
        paths: edit files, and folders of runs. names: which edits of the folders, by class or by file's name.
        every: without names, take all edits of a folder.

    Raises:
        UserError: an unknown name, or one that could be several edits; a folder whose edits are not chosen from.
    """
    folders = [path for path in paths if path.is_dir()]
    if names and not folders:
        raise UserError("--edit chooses of the edits of a run's folder, and no folder was given.")
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
    """The edit files of a run's folder (or of the folder of edits itself), and the name in each; "" if it has none.

    Raises:
        UserError: there are none.
    """
    place = folder / EDITS if (folder / EDITS).is_dir() else folder
    found = {}
    for path in sorted(place.glob("*.json")):
        try:
            record = parse_json(read_text(path))
        except ValueError:  # loading it will say what is wrong
            record = {"contributions": []} if place.name == EDITS else {}
        if isinstance(record, dict) and "contributions" in record:
            name = record.get("name")
            found[path] = name if isinstance(name, str) else ""
    if not found:
        raise UserError(
            f"{folder} holds no edit files: those of a run lie in its folder {EDITS}, once stage control ran."
        )
    return found


def classifier_of(paths: Sequence[Path]) -> Path:
    """The classifier's weights that the manifest of a run's folder leads to.

    Raises:
        UserError: no folder of a run is among the paths, or its manifest does not lead to a classifier.
    """
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise UserError("Give the weights to edit: only a run's folder has a classifier of its own.")
    folder = folders[0]
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"Give the weights to edit: {folder} is no folder of a finished run (it has no {MANIFEST}).")
    try:
        classifier: Any = parse_json(read_text(path))["artifacts"]["classifier"]["path"]
        weights = folder / classifier / CLASSIFIER
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"Give the weights to edit: {path} does not say where the run's classifier lies.") from error
    if not weights.is_file():
        raise UserError(f"Give the weights to edit: the run's classifier is no longer at {shown(str(weights), 500)}.")
    check_file(weights)
    return weights


def _named(name: str, known: dict[Path, str], folders: Sequence[Path]) -> Path:
    """The one edit that a name means: as it is written in the file, else by the file's name, with or without number."""
    tests = (
        lambda file: known[file] == name,
        lambda file: name in (file.stem, file.name),
        lambda file: _slug(name) in (_slug(known[file]), _slug(file.stem), _slug(file.stem.partition("-")[2])),
    )
    for test in tests:
        hits = [file for file in known if test(file)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise UserError(f"--edit {name} could be {' or '.join(file.stem for file in hits)}; give the file's name.")
    raise UserError(f"{folders[0]} has no edit called {name}; its edits are {_list(known)}.")


def _list(known: dict[Path, str]) -> str:
    names = [shown(name or file.stem) for file, name in known.items()]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
