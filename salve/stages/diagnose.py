# SPDX-License-Identifier: MIT
"""Stage ``diagnose``: the critical strength of each image, at which its prediction or logit gives way."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from salve.activations import Captured
from salve.artifacts import Artifact, write_table
from salve.backbones.cut import Cut
from salve.backbones.graph import GraphTail
from salve.backbones.tail import LinearTail
from salve.diagnosis import critical_strength, first_crossing, linear_crossing
from salve.diagnosis.crossing import CRITERIA, TOLERANCE
from salve.edit_settings import EditSettings
from salve.editing import edited_logits
from salve.stages.context import StageContext, settings_of_key
from salve.stages.targets import Target, balanced, contributions_of, refuse_aligned_on_signed, targets_of


def diagnose(
    context: StageContext,
    settings: EditSettings,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Compute the critical strengths of test images for their class's latent.

    At the last site they are exact, for every image. Elsewhere they are first crossings on the grid ``edit.alpha``,
    refined by bisection, for ``edit.images`` images of each class; ``summary.csv`` says so in ``found_by``.

    Returns:
        Artifact ``diagnose``: ``images.csv`` and ``summary.csv``.
    """
    refuse_aligned_on_signed(settings, activations)
    cut = context.cut(classifier)
    geometry = {name: asdict(settings)[name] for name in ("alpha", "scale", "channels")}
    if cut.linear is None:
        geometry |= {"images": settings.images, "tolerance": TOLERANCE}
    key_settings = settings_of_key(geometry, classifier, activations, sae, features)

    def make(folder: Path, _: Path) -> None:
        autoencoder = context.sae(sae, activations)
        targets = {target.classes[0]: target for target in targets_of(context.classes, features, [])}
        vectors = {k: contributions_of(autoencoder.decoder, one, settings)[0] for k, one in targets.items()}
        if cut.linear is not None:
            images = _by_the_law(cut.linear, context.activations(activations, "test"), targets, vectors, settings)
        else:
            images = _on_the_grid(context, cut, targets, vectors, settings)
        columns = ["image", "class", "latent", "correct"]
        write_table(folder / "images.csv", images[columns + [c for c in images.columns if c not in columns]])
        rows = [summarise(name, group, settings.alpha) for name, group in images.groupby("class", sort=False)]
        write_table(folder / "summary.csv", pd.DataFrame(rows))

    return context.store.get_or_make("diagnose", key_settings, make)


def _by_the_law(
    tail: LinearTail,
    test: Captured,
    targets: Mapping[int, Target],
    vectors: Mapping[int, Tensor],
    settings: EditSettings,
) -> pd.DataFrame:
    """Exact strengths of all test images, from their captured activations."""
    tables = []
    for label, target in targets.items():
        own = (test.labels == label).nonzero()[:, 0]
        found = strengths(tail, test.activations[own], vectors[label], test.labels[own], settings.alpha)
        tables.append(found.assign(image=own.tolist(), **{"class": target.name, "latent": target.latents[0]}))
    return pd.concat(tables, ignore_index=True)


def _on_the_grid(
    context: StageContext,
    cut: Cut,
    targets: Mapping[int, Target],
    vectors: Mapping[int, Tensor],
    settings: EditSettings,
) -> pd.DataFrame:
    """Strengths of a sample of test images, which run through the network behind the site again and again."""
    every = context.data.labels("test")
    sample = [number for number in balanced(every, settings.images) if int(every[number]) in targets]
    chosen = sorted(sample, key=lambda number: int(every[number]))
    tables = []
    with context.progress(f"critical strengths at {cut.site.name}", len(chosen)) as advance:
        for images, labels in context.data.loader("test", indices=chosen):
            own = [targets[label] for label in labels.tolist()]
            contributions = torch.stack([vectors[label] for label in labels.tolist()]).to(context.device)
            tail = cut.tail(context.on_device(images))
            found = crossings(tail, contributions, labels.to(context.device), settings.alpha)
            tables.append(
                found.assign(**{"class": [one.name for one in own], "latent": [one.latents[0] for one in own]})
            )
            advance(len(labels))
    return pd.concat(tables, ignore_index=True).assign(image=chosen)


def crossings(tail: GraphTail, contributions: Tensor, labels: Tensor, grid: list[float]) -> pd.DataFrame:
    """As :func:`strengths` behind any tail, with ``crossing`` instead of ``exact``.

    Args:
        tail: of the images. contributions: ``[n, M]``, of each image's own latent. labels: ``[n]``. grid: strengths.
    """
    found = first_crossing(tail, contributions, labels, grid)
    columns = {"correct": (found.flip > 0).tolist()}
    for criterion, crossing in zip(CRITERIA, found, strict=False):
        columns[f"{criterion}_linear"] = linear_crossing(tail, contributions, labels, criterion).tolist()
        columns[f"{criterion}_crossing"] = crossing.tolist()
    return pd.DataFrame({**columns, "flip_grid": found.flip_grid.tolist()})


def strengths(
    tail: LinearTail, activations: Tensor, contribution: Tensor, labels: Tensor, grid: list[float]
) -> pd.DataFrame:
    """All critical strengths of images of ``[n, M]``, and ``flip_grid``, the first strength of the grid that flips.

    Args:
        tail: of the site. activations: ``[n, M]``. contribution: ``[M]``. labels: ``[n]``. grid: strengths.
    """
    columns = {}
    for criterion in ("logit", "flip"):
        for method in ("linear", "exact"):
            found = critical_strength(tail, activations, contribution, labels, criterion, method)
            columns[f"{criterion}_{method}"] = found.tolist()
    predictions = edited_logits(tail, activations, contribution, grid).argmax(dim=2)  # [K, n]
    left = predictions != labels
    first = left.to(torch.uint8).argmax(dim=0)
    empirical = torch.where(left.any(dim=0), torch.tensor(grid, dtype=torch.float64)[first], torch.inf)
    return pd.DataFrame({"correct": (~left[0]).tolist(), **columns, "flip_grid": empirical.tolist()})


def summarise(name: str, images: pd.DataFrame, grid: list[float]) -> dict[str, object]:
    """One row of ``summary.csv``: the distribution over a class's correctly classified images."""
    right = images[images["correct"]]
    found = "exact" if "flip_exact" in images else "crossing"
    flip, logit = right[f"flip_{found}"], right[f"logit_{found}"]
    row = {
        "class": name,
        "latent": int(images["latent"].iloc[0]),
        "images": len(images),
        "correct": len(right),
        "alpha_logit_median": logit.quantile(0.5, interpolation="lower"),
        "alpha_logit_infinite": float((logit == float("inf")).mean()),
        "alpha_flip_median": flip.quantile(0.5, interpolation="lower"),
        "alpha_flip_q10": flip.quantile(0.1, interpolation="lower"),
        "alpha_flip_q90": flip.quantile(0.9, interpolation="lower"),
        "alpha_flip_infinite": float((flip == float("inf")).mean()),
    }
    apart = (right["flip_linear"] - flip).abs()
    if found == "crossing":
        # A crossing is itself known to TOLERANCE only.
        close = (right["flip_linear"] == flip) | (apart <= (0.01 + TOLERANCE) * flip)
        return {**row, "linear_agreement": float(close.mean()), "found_by": "grid"}
    close = (right["flip_linear"] == flip) | (apart <= 0.01 * flip)
    # The exact value must lie between the grid's flipping strength and the strength before it.
    before = right["flip_grid"].map(lambda value: max([a for a in grid if a < value], default=0.0))
    tolerance = 1e-4 * flip.clip(lower=1.0)
    inside = (flip <= right["flip_grid"] + tolerance) & (flip >= before - tolerance)
    beyond = (right["flip_grid"] == float("inf")) & (flip >= grid[-1] - tolerance)
    return {
        **row,
        "linear_exact_agreement": float(close.mean()),
        "grid_agreement": float((inside | beyond).mean()),
    }
