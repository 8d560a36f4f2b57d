# SPDX-License-Identifier: MIT
"""What latents stand for: classes, concepts, and kinds of images."""

from salve.features.classes import ClassMeans, Kind, Selection, class_means, kinds, margins, select_latents, shares
from salve.features.concepts import ConceptAUROC, ConceptDetectors, concept_auroc, concept_detectors
from salve.features.effects import class_effects, effect_scores
from salve.features.monosemanticity import Monosemanticity, monosemanticity
from salve.features.purity import ClassPurity, class_entropy, top_purity
from salve.features.tcav import ConceptTest, concept_test, concept_vector, tcav_scores

__all__ = [
    "ClassMeans",
    "ClassPurity",
    "ConceptAUROC",
    "ConceptDetectors",
    "ConceptTest",
    "Kind",
    "Monosemanticity",
    "Selection",
    "class_effects",
    "class_entropy",
    "class_means",
    "concept_auroc",
    "concept_detectors",
    "concept_test",
    "concept_vector",
    "effect_scores",
    "kinds",
    "margins",
    "monosemanticity",
    "select_latents",
    "shares",
    "tcav_scores",
    "top_purity",
]
