# SPDX-License-Identifier: MIT
"""The settings of the audit and of the repair; see :mod:`salve.settings`."""

from dataclasses import dataclass
from typing import Annotated, Any

from salve.values import ABOVE_ZERO, NOT_NEGATIVE, SHARE, OneOf, Takes, Unit

#: What a repair can use: edits of latents, and with labels an eraser of the attribute itself (LEACE) and a head that is
#: trained anew (DFR).
REPAIRS = ("latent_eraser", "gate", "ablation", "steering", "leace", "dfr")
#: What it can be compared with: an eraser of several directions, latents muted and the SAE kept at inference, the SAE's
#: reconstruction alone, and pruned channels (COAR-Edit); and networks that are trained again (:data:`RETRAINED`).
RIVALS = ("inlp", "mute", "reconstruction", "pruning", "jtt", "group_dro", "bound")
#: Those that train the network again: JTT, group DRO, and the bound, a network that never met the shortcut.
RETRAINED = ("jtt", "group_dro", "bound")


@dataclass
class AuditSettings:
    """How suspects are found: latents that push images towards a class which they are not of.

    Attributes:
        labels: images of each group (class × value of the attribute), drawn by the seed, whose attribute ranks the
            suspects; 0 ranks without labels, as where the data know no attribute.
        suspects: that are listed for each class.
        top_images: of each suspect that are shown.
    """

    labels: Annotated[int, NOT_NEGATIVE, Unit("images of a group")]
    suspects: Annotated[int, ABOVE_ZERO, Unit("latents of a class")]
    top_images: Annotated[int, ABOVE_ZERO, Unit("images of a suspect")]


@dataclass
class RepairSettings:
    """How suspects are taken out of the network. All is chosen on select images.

    Attributes:
        methods: edit methods that are tried, of :data:`REPAIRS`.
        sizes: how many of the suspects are edited together; each number is tried.
        strengths: of each method, as shares of its natural full size; each is tried.
        max_accuracy_loss: how much may be lost of the accuracy on select images; and with labels of the average that
            weighs groups as the train images have them, on the images whose attribute is known, less a standard error.
        images: of each class on which the accuracy is measured, at most.
        suspects: by the name of a class, numbers of latents, or ``audit`` for all that the audit lists; null takes
            those that the audit has ranked with labels.
        rivals: what the repair is compared with, of :data:`RIVALS`. Each is chosen as the methods are, and measured on
            test images; none becomes the repair.
    """

    methods: Annotated[list[str], OneOf(*REPAIRS)]
    sizes: list[int]
    strengths: list[float]
    max_accuracy_loss: Annotated[float, SHARE, Unit("of the images")]
    images: Annotated[int, ABOVE_ZERO, Unit("images of a class")]
    rivals: Annotated[list[str], OneOf(*RIVALS, or_none=True)]
    suspects: Annotated[Any, Takes("a mapping from class names to lists of latents, or null")] = (
        None  # Hydra cannot override a typed mapping
    )
