# SPDX-License-Identifier: MIT
"""Cautions about what was measured, shown before any result."""

from collections.abc import Sequence

from salve.report.tables import column, overall_accuracy
from salve.report.text import count_of, label, number, percent, plural
from salve.results import Artifacts

#: Below this accuracy on test images a classifier is called weak.
WEAK = 0.8
#: With fewer test images, one image moves the accuracy of its class by more than 2 points.
FEW_IMAGES = 50
NAMED = 5


def remarks_on(accuracy: float | None, classes: Sequence[str], images: Sequence[int]) -> list[str]:
    """Cautions in sentences, for any data and network.

    Args:
        accuracy: of the untouched classifier on all test images [fraction]; None where it is not known.
        classes: names. images: for each, how many test images it has.
    """
    said = []
    if accuracy is not None and accuracy < WEAK:
        said.append(
            f"A classifier that is right on {percent(accuracy, 0)} of the test images is weak. Images near the edge "
            "change sides with any small edit, so that changes of the other classes say as much about the classifier "
            "as about the latents. Was it trained on images prepared otherwise (backbone.preprocess), or are its "
            "outputs in another order (output k is the k-th class folder by name; data.outputs says otherwise)? Else "
            "train it longer, or on more images."
        )
    without = [name for name, count in zip(classes, images, strict=True) if not count]
    few = {name: count for name, count in zip(classes, images, strict=True) if 0 < count < FEW_IMAGES}
    if without:
        said.append(
            f"{plural(len(without), 'class')} of {count_of(len(classes))} without test images: {_listed(without)}."
        )
    if few:
        fewest = min(few, key=lambda name: few[name])
        said.append(
            f"{plural(len(few), 'class')} of {count_of(len(classes))} with fewer than {FEW_IMAGES} test images "
            f"(fewest: {count_of(few[fewest])}, of {label(fewest, 40)}): one image is worth up to "
            f"{number(100 / few[fewest], 3)} points of a class's accuracy there, so a class can separate, or fail to, "
            "by chance. Read the intervals, not the numbers."
        )
    return said


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    text = ", ".join(label(name, 40) for name in names[:NAMED])
    return f"{text} and {count_of(more)} more" if more > 0 else text


def own_remarks(artifacts: Artifacts) -> list[str]:
    """:func:`remarks_on` what a run's stages wrote; empty where the features were not read."""
    table = artifacts.table("features", "classes.csv")
    if not {"class", "test_images"} <= set(table.columns):
        return []
    images = [int(count) for count in column(table, "test_images").fillna(0)]
    sampled = artifacts.record("control", "verdict.json").get("images_sampled")
    said = []
    if sampled is not None:
        images = [min(count, int(sampled)) for count in images]
        said.append(
            f"At this site edits and critical strengths are measured on {count_of(int(sampled))} images of each class "
            "and split at most; edit.images sets how many."
        )
    return said + remarks_on(overall_accuracy(artifacts), list(table["class"]), images)
