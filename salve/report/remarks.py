# SPDX-License-Identifier: MIT
"""Cautions about what was measured, shown before any result."""

import math
from collections.abc import Sequence

from salve.report.tables import column
from salve.report.text import count_of, label, number, percent, plural
from salve.results import Artifacts
from salve.types import Split

#: Below this accuracy on test images a classifier is called weak.
WEAK = 0.8
#: With fewer test images, one image moves the accuracy of its class by more than 2 points.
FEW_IMAGES = 50
NAMED = 5


#: What a reader should check where a network is right less often than it should be.
CHECKS = (
    "backbone.preprocess (size, mean and std must be those it was trained with), the order of the classes (output k is "
    "the k-th class folder by name; data.outputs says otherwise) and backbone.weights"
)


def no_better_than_one_class(accuracies: Sequence[float], images: Sequence[int]) -> bool:
    """Whether a network is not clearly better than one that always names the same class: the mean of the classes'
    accuracies is at most 1.96 standard errors above ``1 / C``. Unlike the accuracy of all images it does not reward
    naming the largest class.

    Args:
        accuracies: of each class [fraction]. images: of each; classes without images are left out.
    """
    known = [(accuracy, count) for accuracy, count in zip(accuracies, images, strict=True) if count]
    if not known:
        return False
    mean = sum(accuracy for accuracy, _ in known) / len(known)
    # Half an image is added to those that are right and to those that are wrong: few that are all right are not sure.
    rough = [((accuracy * count + 0.5) / (count + 1), count) for accuracy, count in known]
    error = math.sqrt(sum(share * (1 - share) / count for share, count in rough)) / len(known)
    return mean - 1.96 * error <= 1 / len(known)


def network_remark(accuracies: Sequence[float], images: Sequence[int], split: Split) -> str:
    """A caution in a few sentences about a network that is seldom right; empty if there is none.

    Args:
        accuracies: of each class on all images of a split [fraction]. images: of each class in it.
    """
    total = sum(images)
    if not total:
        return ""
    accuracy = sum(share * count for share, count in zip(accuracies, images, strict=True) if count) / total
    if no_better_than_one_class(accuracies, images):
        return (
            f"The network is right on {percent(accuracy, 0)} of the {split} images, not clearly better than one that "
            "always names the same class. Either it is not used as it was trained, or it has not learned: check "
            f"{CHECKS}. Until it is right, no result says what it relies on."
        )
    if accuracy < WEAK:
        return (
            f"The network is right on {percent(accuracy, 0)} of the {split} images, which is weak. If it was better in "
            f"training, it may rely on what goes with a class there and not here (groups show that), or is not used as "
            f"it was trained: check {CHECKS}. If not, train it longer, or on more images. Images near the edge change "
            "sides with any small edit, so that what an edit changes says as much about the network as about the "
            "latents."
        )
    return ""


def remarks_on(classes: Sequence[str], images: Sequence[int]) -> list[str]:
    """Cautions in sentences about classes with few test images, or none.

    Args:
        classes: names. images: for each, how many test images it has.
    """
    said = []
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


def cautions(artifacts: Artifacts, remarks: Sequence[str] = ()) -> list[str]:
    """All cautions of a run, in the order in which a reader should see them.

    Args:
        artifacts: what its stages wrote. remarks: about data, weights and SAE, known beforehand.
    """
    network = network_remark(*_of_classes(artifacts), "test")
    return [*([network] if network else []), *remarks, *_on_images(artifacts)]


def misused(artifacts: Artifacts) -> bool:
    """Whether a run's network is not clearly better on test images than one that always names the same class."""
    return no_better_than_one_class(*_of_classes(artifacts))


def _of_classes(artifacts: Artifacts) -> tuple[list[float], list[int]]:
    """The accuracy and the number of test images of each class; empty where the features were not read."""
    table = artifacts.table("features", "classes.csv")
    accuracies, images = column(table, "test_accuracy"), column(table, "test_images").fillna(0)
    return [float(accuracy) for accuracy in accuracies], [int(count) for count in images]


def _on_images(artifacts: Artifacts) -> list[str]:
    """How many test images the results rest on; empty where the features were not read."""
    table = artifacts.table("features", "classes.csv")
    if not {"class", "test_images"} <= set(table.columns):
        return []
    (_, images), said = _of_classes(artifacts), []
    sampled = artifacts.record("control", "verdict.json").get("images_sampled")
    if sampled is not None:
        images = [min(count, int(sampled)) for count in images]
        said.append(
            f"At this site edits and critical strengths are measured on {count_of(int(sampled))} images of each class "
            "and split at most; edit.images sets how many."
        )
    return said + remarks_on(list(table["class"]), images)
