# SPDX-License-Identifier: MIT
"""Permanent edits: the gate, other methods, edit files, and the evaluation of an edited network.

Names are loaded when they are first used: ``salve-edit`` need not wait seconds for Lightning, torchvision and timm.
"""

from typing import TYPE_CHECKING

from salve.lazy import lazy

if TYPE_CHECKING:
    from salve.editing.additions import AdditionFile
    from salve.editing.applying import apply_edit_file, apply_edit_files, undo_edit_file, undo_edit_files
    from salve.editing.curves import edit_curves, strength_curves
    from salve.editing.edits import Edit, EditFile, GateFile, HeldEdit
    from salve.editing.evaluation import EditEvaluation
    from salve.editing.files import load_edit_file, save_edit_file
    from salve.editing.gating import contribution, edited_logits, gate, gates
    from salve.editing.make import NewWeights, make_addition, make_additions, make_edit_file, make_edit_files

_MODULES = {
    "AdditionFile": "additions",
    "Edit": "edits",
    "EditEvaluation": "evaluation",
    "HeldEdit": "edits",
    "EditFile": "edits",
    "GateFile": "edits",
    "NewWeights": "make",
    "apply_edit_file": "applying",
    "apply_edit_files": "applying",
    "contribution": "gating",
    "edit_curves": "curves",
    "edited_logits": "gating",
    "gate": "gating",
    "gates": "gating",
    "load_edit_file": "files",
    "make_addition": "make",
    "make_additions": "make",
    "make_edit_file": "make",
    "make_edit_files": "make",
    "save_edit_file": "files",
    "strength_curves": "curves",
    "undo_edit_file": "applying",
    "undo_edit_files": "applying",
}

__all__ = [
    "AdditionFile",
    "Edit",
    "EditEvaluation",
    "EditFile",
    "GateFile",
    "HeldEdit",
    "NewWeights",
    "apply_edit_file",
    "apply_edit_files",
    "contribution",
    "edit_curves",
    "edited_logits",
    "gate",
    "gates",
    "load_edit_file",
    "make_addition",
    "make_additions",
    "make_edit_file",
    "make_edit_files",
    "save_edit_file",
    "strength_curves",
    "undo_edit_file",
    "undo_edit_files",
]

__getattr__, __dir__ = lazy(__name__, _MODULES)
