"""Stage ``diagnose``: the critical strength of each image, at which its prediction or logit gives way."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, write_table
from salve.backbones.tail import LinearTail
from salve.diagnosis import critical_strength
from salve.editing import edited_logits
from salve.settings import EditSettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.targets import contributions_of, refuse_aligned_on_signed, targets_of


def diagnose(
    context: StageContext,
    settings: EditSettings,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Compute the critical strengths of every test image for its class's latent.

    Returns:
        Artifact ``diagnose``: ``images.csv`` and ``summary.csv``.
    """
    refuse_aligned_on_signed(settings, activations)
    geometry = {name: asdict(settings)[name] for name in ("alpha", "scale", "channels")}
    key_settings = settings_of_key(geometry, classifier, activations, sae, features)

    def make(folder: Path, _: Path) -> None:
        autoencoder = context.sae(sae, activations)
        test = context.activations(activations, "test")
        tail = context.tail(classifier)
        tables = []
        for target in targets_of(context.classes, features, []):
            own = (test.labels == target.classes[0]).nonzero()[:, 0]
            vector = contributions_of(autoencoder.decoder, target, settings)[0]
            found = strengths(tail, test.activations[own], vector, test.labels[own], settings.alpha)
            tables.append(found.assign(image=own.tolist(), **{"class": target.name, "latent": target.latents[0]}))
        images = pd.concat(tables, ignore_index=True)
        columns = ["image", "class", "latent", "correct"]
        write_table(folder / "images.csv", images[columns + [c for c in images.columns if c not in columns]])
        rows = [summarise(name, group, settings.alpha) for name, group in images.groupby("class", sort=False)]
        write_table(folder / "summary.csv", pd.DataFrame(rows))

    return context.store.get_or_make("diagnose", key_settings, make)


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
    flip, logit = right["flip_exact"], right["logit_exact"]
    close = (right["flip_linear"] == flip) | ((right["flip_linear"] - flip).abs() <= 0.01 * flip)
    # The exact value must lie between the grid's flipping strength and the strength before it.
    before = right["flip_grid"].map(lambda value: max([a for a in grid if a < value], default=0.0))
    tolerance = 1e-4 * flip.clip(lower=1.0)
    inside = (flip <= right["flip_grid"] + tolerance) & (flip >= before - tolerance)
    beyond = (right["flip_grid"] == float("inf")) & (flip >= grid[-1] - tolerance)
    return {
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
        "linear_exact_agreement": float(close.mean()),
        "grid_agreement": float((inside | beyond).mean()),
    }
