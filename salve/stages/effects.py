# SPDX-License-Identifier: MIT
"""What the channels of a site add to the logits of classes, in the mean over a class's train images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from salve.artifacts import Artifact, save_tensors
from salve.backbones.cut import Cut
from salve.diagnosis import attributions
from salve.features import ClassMeans
from salve.stages.context import StageContext, settings_of_key
from salve.stages.measure import blocks
from salve.stages.targets import balanced
from salve.types import Labels, Split

#: Train images of a class, at most, behind a tail that is not linear: each costs a pass forward and one back. The error
#: of a mean over 32 is a sixth of what single images differ by, and less than the best latents of a class differ by.
SAMPLED = 32
#: The file of the artifact that holds attributions.
TENSORS = "attributions.safetensors"


def class_attributions(context: StageContext, classifier: Artifact, activations: Artifact) -> Tensor:
    """The attributions of each class's own logit, in the mean over its train images.

    Behind a linear tail it is ``W_k ⊙ mean a``, over all train images. Elsewhere gradients are taken on a sample, and
    kept as artifact ``attributions``: they are the same for every SAE at the site.

    Returns:
        ``[C, M]`` float64; see :func:`salve.features.class_effects`.
    """
    cut = context.cut(classifier)
    classes, width = len(context.classes), cut.site.width
    means = ClassMeans(width, classes)
    if cut.linear is not None:
        for rows, labels in blocks(context.activations(activations, "train"), 1):
            means.update(rows, labels)
        return cut.linear.weight[:classes].double() * means.compute().reshape(classes, width)
    labels = torch.as_tensor(context.data.labels("train"))

    def make(folder: Path, _: Path) -> None:
        chosen = balanced(labels, SAMPLED)
        found = watched_attributions(context, cut, "train", chosen, labels[chosen])
        save_tensors(folder / TENSORS, {"attributions": found})

    key_settings = settings_of_key({"sampled": SAMPLED}, classifier, activations)
    return context.store.get_or_make("attributions", key_settings, make).tensors(TENSORS)["attributions"]


def watched_attributions(
    context: StageContext, cut: Cut, split: Split, numbers: Sequence[int], watched: Labels
) -> Tensor:
    """The attributions of each class's logit, in the mean over the images that watch the class; through the tail.

    Args:
        context: of the run. cut: the network at a site that is not the last. split: of the images.
        numbers: of the images in the split; one may come several times. watched: ``[n]``, the class of each.

    Returns:
        ``[C, M]`` float64; NaN for a class that no image watches.
    """
    classes, width = len(context.classes), cut.site.width
    means = ClassMeans(width, classes)
    with context.progress(f"effects at {cut.site.name}", len(numbers)) as advance:
        start = 0
        for images, _ in context.data.loader(split, indices=numbers):
            labels = watched[start : start + len(images)]
            _, found = attributions(cut.tail(context.on_device(images)), labels.to(context.device))
            means.update(found.cpu(), labels)
            advance(len(labels))
            start += len(images)
    return means.compute().reshape(classes, width)
