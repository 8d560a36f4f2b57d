"""Saliency: where a latent looks (its own map, Grad-FAM), which image excites it, and scores for its maps."""

from salve.saliency.activation_max import ActivationMaximum, maximise
from salve.saliency.grad_fam import grad_fam
from salve.saliency.localisation import InsertionDeletion, insertion_deletion_auc, iou, pointing_game
from salve.saliency.own_maps import own_maps

__all__ = [
    "ActivationMaximum",
    "InsertionDeletion",
    "grad_fam",
    "insertion_deletion_auc",
    "iou",
    "maximise",
    "own_maps",
    "pointing_game",
]
