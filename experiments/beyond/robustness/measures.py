"""Corrupted, shifted and attacked images through the network, as it is and edited for other classes."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from experiments.beyond.composition.measures import Edits
from experiments.runs import Study
from salve.artifacts import digest_of_tensors, write_table
from salve.backbones.cut import Cut
from salve.data.base import RawImages, TransformedImages
from salve.data.corruptions import KINDS, SEVERITIES, corrupted
from salve.diagnosis.adversarial import Attack, smallest_norms
from salve.editing import gate
from salve.report.intervals import Interval, t_interval
from salve.stages.context import settings_of_key
from salve.types import Labels

#: Between which norms an attack looks (the largest change of a pixel, on the 0 … 1 scale), and how finely.
SMALLEST, LARGEST, HALVINGS = 1 / 4096, 1 / 8, 6
#: Steps of an attack, and its restarts from random points.
STEPS, RESTARTS = 10, 2
#: Seed of all corruptions and attacks.
SEED = 0


class Seen(NamedTuple):
    """Images under one condition, as the edited weights read them.

    Attributes:
        name, severity: of the condition; ``clean`` and 0 for the images as they are.
        activations: ``[n, M]``. labels: ``[n]``.
    """

    name: str
    severity: int
    activations: Float[Tensor, "n M"]
    labels: Labels


def seen(study: Study, cut: Cut, raw: RawImages, numbers: Sequence[int], name: str, severity: int = 0) -> Seen:
    """Run some images of a set through the network, up to the site."""
    assert study.context.data.preprocess is not None
    images = TransformedImages(raw, study.context.data.preprocess.eval_transform())
    found, labels = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for batch, own in DataLoader(Subset(images, list(numbers)), batch_size=study.context.data.batch_size):
            found.append(cut.read(study.context.on_device(batch)).flatten(1).cpu())
            labels.append(own)
    return Seen(name, severity, torch.cat(found), torch.cat(labels))


def conditions(study: Study, cut: Cut, numbers: Sequence[int]) -> list[Seen]:
    """Test images as they are, and under every kind and severity of corruption."""
    raw = study.context.data.raw("test")
    every = [(kind, severity) for kind in KINDS for severity in SEVERITIES]
    clean = seen(study, cut, raw, numbers, "clean")
    return [clean, *(seen(study, cut, corrupted(raw, *one, SEED), numbers, *one) for one in every)]


def right(study: Study, one: Seen, gate_: Tensor | None = None) -> Bool[Tensor, " n"]:
    """Which images are classified rightly, with a gate at the site or without."""
    activations = one.activations if gate_ is None else one.activations * gate_
    return study.tail(activations).argmax(dim=1) == one.labels


class Moved(NamedTuple):
    """What edits of other classes change, by condition and image; means over edits and SAEs.

    Attributes:
        before: ``[K, n]``, 1 where the network as it is classifies the image rightly, else 0. change: ``[K, n]``, from
            −1, lost by every edit, to 1, won by every edit; NaN for an image without an edit of another class.
    """

    before: Float[Tensor, "K n"]
    change: Float[Tensor, "K n"]


def moved_by(study: Study, shown: Sequence[Seen], edits: Sequence[Edits]) -> Moved:
    """What the edits change of images of other classes, under each condition."""
    total, count = torch.zeros(len(shown), len(shown[0].labels)), torch.zeros(len(shown[0].labels))
    before = torch.stack([right(study, one) for one in shown]).float()
    for of_sae in edits:
        for label, alpha, vector in zip(of_sae.labels, of_sae.alphas, of_sae.vectors, strict=True):
            other = shown[0].labels != label
            own = gate(vector, alpha)
            after = torch.stack([right(study, one, own) for one in shown]).float()
            total += torch.where(other, after - before, 0)
            count += other
    return Moved(before, total / count)


class Change(NamedTuple):
    """What edits of other classes change, as a share of the accuracy, with 95 % intervals over images.

    Attributes:
        clean, changed: on clean images and under the condition. beyond: the second less the first; below 0 the edits
            take more of what is left under the condition.
    """

    clean: Interval
    changed: Interval
    beyond: Interval


def change(clean: Moved, changed: Moved, same_images: bool = True) -> Change:
    """The change relative to the accuracy of the network as it is: an edit cannot take what corruption has taken.

    A ratio of means has the interval of its linearised residuals. Several conditions of an image count as one.

    Args:
        clean, changed: see :func:`moved_by`. same_images: both are of the same images, so that they are paired.
    """
    (rate, rest), (rate_changed, rest_changed) = _linearised(clean), _linearised(changed)
    one, other = _around(rate, rest), _around(rate_changed, rest_changed)
    if same_images:
        return Change(one, other, _around(rate_changed - rate, rest_changed - rest))
    return Change(one, other, Interval(other.mean - one.mean, float(np.hypot(one.half, other.half)), other.n))


def _linearised(moved: Moved) -> tuple[float, Float[Tensor, " n"]]:
    """The ratio of means of change and accuracy, and each image's share in its error; NaN where no image is right."""
    known = ~moved.change.isnan().any(dim=0)
    change, before = moved.change[:, known].mean(dim=0).double(), moved.before[:, known].mean(dim=0).double()
    accuracy = before.mean() if before.any() else torch.tensor(torch.nan)
    rate = change.mean() / accuracy
    return float(rate), (change - rate * before) / accuracy


def _around(mean: float, residuals: Float[Tensor, " n"]) -> Interval:
    return Interval(mean, t_interval(residuals.tolist()).half, len(residuals))


def table_of(study: Study, shown: Sequence[Seen], moved: Moved) -> pd.DataFrame:
    """One row per condition: accuracy of the network as it is, and what edits of other classes change of it."""
    rows = []
    for one, before, change in zip(shown, *moved, strict=True):
        row = {"condition": one.name, "severity": one.severity, "original": float(before.double().mean())}
        rows.append(row | {"change": float(change.nanmean()), "images": len(one.labels)})
    return pd.DataFrame(rows).assign(testbed=study.testbed.name)


def edited(cut: Cut, gate_: Float[Tensor, " M"]) -> nn.Module:
    """A copy of the network whose readers' weights are scaled."""
    model = deepcopy(cut.model)
    with torch.no_grad():
        for reader in cut.site.readers:
            weight = model.get_parameter(reader.weight)
            weight.copy_(reader.scaled(weight, gate_.to(weight)))
    return model


def attacked(study: Study, cut: Cut, numbers: Sequence[int], edits: Edits) -> pd.DataFrame:
    """The smallest norm that breaks each image, in the network as it is and edited for another class; images that are
    classified wrongly are left out.

    Returns:
        Columns ``image``, ``class``, ``edit`` (the other class), ``norm``, ``norm_edited``: 0 for an image that the
        edit alone takes, inf where no attack is found.
    """
    context = study.context
    assert context.data.preprocess is not None
    dataset = context.data.dataset("test")
    pixels = context.data.preprocess.denormalise(torch.stack([dataset[number][0] for number in numbers]))
    pixels, labels = context.on_device(pixels), study.test.labels[list(numbers)]
    mean, std = (
        torch.tensor(values, device=context.device).view(3, 1, 1)
        for values in (context.data.preprocess.mean, context.data.preprocess.std)
    )

    def norms(network: Cut, rows: Tensor) -> Tensor:
        def logits(images: Tensor) -> Tensor:
            return network.logits((images - mean) / std)

        with torch.no_grad():
            holds = torch.cat([logits(part) for part in pixels[rows].split(64)]).argmax(dim=1).cpu() == labels[rows]
        found, kept = torch.zeros(len(rows), dtype=torch.float64), rows[holds]
        given = (logits, pixels[kept], labels[kept], len(cut.order))
        attack = Attack(*given, steps=STEPS, restarts=RESTARTS, seed=SEED)
        found[holds] = smallest_norms(attack, len(kept), SMALLEST, LARGEST, HALVINGS)
        return found

    def kept_norms(rows: Tensor, edit: Float[Tensor, " M"] | None = None) -> Tensor:
        """The norms of a network, which take minutes to hours: a study that is killed finds those it had."""
        settings: dict[str, Any] = {
            "norms": [SMALLEST, LARGEST, HALVINGS],
            "attack": [STEPS, RESTARTS],
            "seed": SEED,
            "images": [numbers[row] for row in rows.tolist()],
        }
        settings["gate"] = "" if edit is None else digest_of_tensors({"gate": edit})

        def make(folder: Path, _: Path) -> None:
            found = norms(cut if edit is None else cut.of(edited(cut, edit)), rows)
            write_table(folder / "norms.csv", pd.DataFrame({"image": settings["images"], "norm": found.numpy()}))

        # The activations stand for the images: numbers are those of any data that the classifier may be given.
        inputs = [study.runs[0].artifact(kind) for kind in ("classifier", "activations")]
        artifact = context.store.get_or_make("attack", settings_of_key(settings, *inputs), make)
        return torch.tensor(artifact.table("norms.csv")["norm"].to_numpy(float))

    every = torch.arange(len(numbers))
    before = kept_norms(every)
    held = every[before > 0]
    after, by = torch.full_like(before, torch.nan), torch.full_like(labels, -1)
    for place, row in enumerate(held.tolist()):
        choice = [label for label in edits.labels if label != int(labels[row])]
        by[row] = choice[place % len(choice)] if choice else -1
    for label, alpha, vector in zip(edits.labels, edits.alphas, edits.vectors, strict=True):
        if len(rows := (by == label).nonzero()[:, 0]):
            after[rows] = kept_norms(rows, gate(vector, alpha))
    names = [study.classes[label] for label in labels.tolist()]
    of_edit = [study.classes[label] if label >= 0 else "" for label in by.tolist()]
    found = {
        "image": list(numbers),
        "class": names,
        "edit": of_edit,
        "norm": before.numpy(),
        "norm_edited": after.numpy(),
    }
    return pd.DataFrame(found)[before.numpy() > 0].assign(testbed=study.testbed.name)
