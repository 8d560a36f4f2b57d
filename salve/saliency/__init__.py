# SPDX-License-Identifier: MIT
"""Saliency: where a latent looks (its own map, Grad-FAM), which image excites it, and scores for its maps."""

from salve.saliency.activation_max import ActivationMaximum, maximise
from salve.saliency.boxes import box_accuracy, box_hits, max_box_acc_v2
from salve.saliency.controls import centred_gaussian, randomised
from salve.saliency.grad_cam import grad_cam
from salve.saliency.grad_fam import grad_fam
from salve.saliency.localisation import (
    InsertionDeletion,
    insertion_deletion_auc,
    iou,
    map_correlation,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from salve.saliency.own_maps import own_maps
from salve.saliency.road import imputed

__all__ = [
    "ActivationMaximum",
    "InsertionDeletion",
    "box_accuracy",
    "box_hits",
    "centred_gaussian",
    "grad_cam",
    "grad_fam",
    "imputed",
    "insertion_deletion_auc",
    "iou",
    "map_correlation",
    "max_box_acc_v2",
    "maximise",
    "own_maps",
    "pointing_game",
    "randomised",
    "relevance_mass",
    "relevance_rank",
]
