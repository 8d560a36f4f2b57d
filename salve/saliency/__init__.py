"""Where a latent looks, what it wants to see, and how well its maps agree with the truth."""

from salve.saliency.activation_max import ActivationMaximum, maximise
from salve.saliency.grad_fam import grad_fam
from salve.saliency.localisation import InsertionDeletion, insertion_deletion_auc, iou, overlay, pointing_game

__all__ = [
    "ActivationMaximum",
    "InsertionDeletion",
    "grad_fam",
    "insertion_deletion_auc",
    "iou",
    "maximise",
    "overlay",
    "pointing_game",
]
