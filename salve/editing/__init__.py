"""Permanent edits: the gate, edit files, what they are compared with, and the measurement of an edited network.

What is imported from here is loaded when it is first asked for: ``salve-edit`` needs the arithmetic, and neither
Lightning nor a backbone's library, which take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salve.editing.curves import edit_curves, strength_curves
    from salve.editing.edits import (
        Edit,
        HeldEdit,
        Recipe,
        apply_recipe,
        apply_recipes,
        undo_recipe,
        undo_recipes,
    )
    from salve.editing.evaluation import EditEvaluation
    from salve.editing.files import load_recipe, save_recipe
    from salve.editing.gating import contribution, edited_logits, gate, gates
    from salve.editing.make import make_recipe, make_recipes
    from salve.editing.rivals import ablated_logits, rank_one_logits, rank_one_rows, rank_one_weight, steered_logits

_MODULES = {
    "Edit": "edits",
    "EditEvaluation": "evaluation",
    "HeldEdit": "edits",
    "Recipe": "edits",
    "ablated_logits": "rivals",
    "apply_recipe": "edits",
    "apply_recipes": "edits",
    "contribution": "gating",
    "edit_curves": "curves",
    "edited_logits": "gating",
    "gate": "gating",
    "gates": "gating",
    "load_recipe": "files",
    "make_recipe": "make",
    "make_recipes": "make",
    "rank_one_logits": "rivals",
    "rank_one_rows": "rivals",
    "rank_one_weight": "rivals",
    "save_recipe": "files",
    "steered_logits": "rivals",
    "strength_curves": "curves",
    "undo_recipe": "edits",
    "undo_recipes": "edits",
}

__all__ = [
    "Edit",
    "EditEvaluation",
    "HeldEdit",
    "Recipe",
    "ablated_logits",
    "apply_recipe",
    "apply_recipes",
    "contribution",
    "edit_curves",
    "edited_logits",
    "gate",
    "gates",
    "load_recipe",
    "make_recipe",
    "make_recipes",
    "rank_one_logits",
    "rank_one_rows",
    "rank_one_weight",
    "save_recipe",
    "steered_logits",
    "strength_curves",
    "undo_recipe",
    "undo_recipes",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'salve.editing' has no attribute {name!r}")
    # Kept: the next one is found without asking again.
    globals()[name] = value = getattr(import_module(f"salve.editing.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
