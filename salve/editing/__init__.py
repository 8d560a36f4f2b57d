"""Permanent edits: the gate, recipes, what they are compared with, and the measurement of an edited network."""

from salve.editing.curves import edit_curves, strength_curves
from salve.editing.evaluation import EditEvaluation
from salve.editing.gate import contribution, edited_logits, gate, gates
from salve.editing.recipe import Edit, Recipe, apply_recipe, load_recipe, make_recipe, save_recipe, undo_recipe
from salve.editing.rivals import ablated_logits, rank_one_logits, rank_one_rows, rank_one_weight, steered_logits

__all__ = [
    "Edit",
    "EditEvaluation",
    "Recipe",
    "ablated_logits",
    "apply_recipe",
    "contribution",
    "edit_curves",
    "edited_logits",
    "gate",
    "gates",
    "load_recipe",
    "make_recipe",
    "rank_one_logits",
    "rank_one_rows",
    "rank_one_weight",
    "save_recipe",
    "steered_logits",
    "strength_curves",
    "undo_recipe",
]
