"""Permanent edits: the gate, recipes, and the measurement of an edited network."""

from salve.editing.evaluation import EditEvaluation
from salve.editing.gate import contribution, edited_logits, gate, gates
from salve.editing.recipe import Edit, Recipe, apply_recipe, load_recipe, make_recipe, save_recipe, undo_recipe

__all__ = [
    "Edit",
    "EditEvaluation",
    "Recipe",
    "apply_recipe",
    "contribution",
    "edited_logits",
    "gate",
    "gates",
    "load_recipe",
    "make_recipe",
    "save_recipe",
    "undo_recipe",
]
