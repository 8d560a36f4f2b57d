# SPDX-License-Identifier: MIT
"""Edit files and the edits that a file of weights holds, matched with each other."""

from collections.abc import Sequence
from pathlib import Path

from salve.editing.edits import EditFile, GateFile, HeldEdit, HeldGates
from salve.editing.files import load_edit_files, load_held
from salve.editing.folders import files_of
from salve.types import UserError


def loaded(files: Sequence[Path], alpha: float | None) -> list[EditFile]:
    """Edits of one network, at the strength ``alpha`` if one is given.

    Raises:
        UserError: a file is damaged, the networks differ, or an edit has no such strength.
    """
    edit_files = load_edit_files(files)
    if len({edit_file.before for edit_file in edit_files}) > 1:
        other = next(k for k, edit_file in enumerate(edit_files) if edit_file.before != edit_files[0].before)
        raise UserError(f"{files[0]} and {files[other]} were made for different networks; apply them separately.")
    return edit_files if alpha is None else [edit_file.at(alpha) for edit_file in edit_files]


def of_held(files: Sequence[Path], given: Sequence[Path], held: Sequence[HeldEdit], weights: Path) -> list[Path]:
    """Those edit files of the given folders whose edits the weights hold, and all edit files that were given.

    Raises:
        UserError: there are none.
    """

    def is_held(file: Path) -> bool:
        said = load_held(file)
        return any(edit.is_same_but_for_strength(said) for edit in held)

    found = [file for file in files if file in given or is_held(file)]
    if not found:
        raise UserError(f"{weights} holds no edit of {given[0]}.")
    return found


def as_held(edit_file: EditFile, held: Sequence[HeldEdit], weights: Path, exactly: bool) -> EditFile:
    """The edit at the strength at which the weights hold it; with ``exactly`` only at its own strength.

    Raises:
        UserError: they do not hold it, or at several strengths.
    """
    same = [edit for edit in held if edit.key == edit_file.key]
    if not same and not exactly:
        same = [edit for edit in held if edit.is_same_but_for_strength(edit_file)]
    if not same:
        raise UserError(f"{weights} does not hold this edit; it holds {'; '.join(edit.title for edit in held)}.")
    if len(same) > 1:
        alphas = ", ".join(f"{edit.strengths[0]:g}" for edit in same)
        raise UserError(f"{weights} holds this edit at several strengths ({alphas}); choose one with --alpha.")
    found = same[0]
    if isinstance(edit_file, GateFile) and isinstance(found, HeldGates) and found.key != edit_file.key:
        return edit_file.with_edits(found.edits)
    return edit_file


def with_weights(held: Sequence[HeldEdit], given: Sequence[Path], weights: Path) -> tuple[list[HeldEdit], list[Path]]:
    """The edits that the weights hold, those of the given edit files and folders with original and new weights.

    Returns:
        The edits in the same order, and the edit files that were read.

    Raises:
        UserError: the weights hold none of the edits of a file or folder.
    """
    files = of_held(files_of(given, (), every=True), given, held, weights) if given else []
    edit_files = load_edit_files(files)
    for file, edit_file in zip(files, edit_files, strict=True):
        if not any(edit.is_same_but_for_strength(edit_file) for edit in held):
            raise UserError(f"{weights} does not list the edit of {file}, which was given with --held.")
    known: dict[str, HeldEdit] = {edit_file.key: edit_file for edit_file in edit_files}
    return [known.get(edit.key, edit) for edit in held], files
