# SPDX-License-Identifier: MIT
"""Stage ``discover``: capture activations, and find the latents of an SAE that each class depends on."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from salve.activations import Captured, captured
from salve.artifacts import Artifact, load_tensors, save_tensors, write_table
from salve.backbones.cut import Cut
from salve.data.base import ConceptTruth
from salve.features import (
    ClassMeans,
    ClassPurity,
    class_effects,
    concept_detectors,
    kinds,
    margins,
    select_latents,
    shares,
)
from salve.metrics import ActivationHistogram, LatentUsage, per_class_accuracy
from salve.sae import SAE
from salve.settings import CaptureSettings, DiscoverSettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.effects import class_attributions
from salve.stages.latents import ImageLatents, image_latents, latents_of
from salve.stages.measure import blocks
from salve.types import Split


def capture(context: StageContext, settings: CaptureSettings, classifier: Artifact) -> Artifact:
    """Capture the activations at the site: artifact ``activations``."""
    given = (context.store, context.cut(classifier), context.data, context.ranks, context.progress)
    return captured(*given, settings.positions, context.seed)


def read_features(
    context: StageContext,
    settings: DiscoverSettings,
    pool: str,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
) -> Artifact:
    """Relate latents to classes and concepts on the train split, in blocks of rows.

    Args:
        context, settings: of the run.
        pool: at a map, how the latents at an image's positions become the image's; see :class:`SAESettings`.
        classifier, activations, sae: what was made before.

    Returns:
        Artifact ``features``: ``latents.csv``, ``dominant.csv``, ``selected.csv``, ``classes.csv``,
        ``class_means.safetensors``, ``histograms.safetensors``, and ``concepts.csv`` if concepts are known.
    """
    key_settings = settings_of_key(asdict(settings), classifier, activations, sae)
    if activations.record("activations.json").get("positions"):
        key_settings["pool"] = pool

    def make(folder: Path, _: Path) -> None:
        train, test = (context.activations(activations, split) for split in ("train", "test"))
        autoencoder, cut = context.sae(sae, activations), context.cut(classifier)
        parts = _parts(context, cut, autoencoder, train, "train", pool)
        means, frequency, per_latent, histogram = _pass_over(parts, autoencoder, len(context.classes))
        effects = None
        if settings.select == "effect":
            effects = class_effects(class_attributions(context, classifier, activations), autoencoder.decoder)
        tables = feature_tables(means, frequency, context.classes, settings, effects)
        tables["latents"] = tables["latents"].assign(**per_latent)
        predictions = _predictions(context, cut, classifier, test)
        tables["classes"] = _class_table(predictions, test.labels, context.classes)
        shown, judged = context.data.truth("train"), context.data.truth("test")
        if shown is not None and judged is not None:
            chosen_by = latents_of(context, cut, autoencoder, train, "train", pool)
            judged_by = latents_of(context, cut, autoencoder, test, "test", pool)
            tables["concepts"] = concept_table(chosen_by, judged_by, shown, judged, context.classes, autoencoder.signed)
        for name, table in tables.items():
            write_table(folder / f"{name}.csv", table)
        save_tensors(folder / "class_means.safetensors", {"class_means": means})
        save_tensors(folder / "histograms.safetensors", histogram)

    return context.store.get_or_make("features", key_settings, make)


def _parts(
    context: StageContext, cut: Cut, sae: SAE, train: Captured, split: Split, pool: str
) -> Iterator[ImageLatents]:
    """The latents of a split's images, in blocks; at a vector from what was captured."""
    if cut.site.kind == "map":
        with context.progress(f"reading latents ({split})", len(train)) as advance:
            for part in image_latents(context, cut, sae, split, pool):
                yield part
                advance(len(part.labels))
    else:
        for activations, labels in blocks(train, sae.dictionary_size):
            yield ImageLatents(sae.encode(activations), activations, labels)


def _pass_over(
    parts: Iterable[ImageLatents], sae: SAE, classes: int
) -> tuple[Tensor, Tensor, dict[str, list[float]], dict[str, Tensor]]:
    """Class means ``[C, d]``, frequencies ``[d]``, more columns of ``latents.csv``, and the histograms."""
    size, firing_threshold = sae.dictionary_size, sae.firing_threshold
    means, usage = ClassMeans(size, classes), LatentUsage(size, firing_threshold)
    purity, histogram = (
        ClassPurity(size, classes, firing_threshold=firing_threshold),
        ActivationHistogram(size, firing_threshold),
    )
    for latents, scale, labels in parts:
        means.update(latents, labels)
        usage.update(latents, scale)
        purity.update(latents, scale, labels)
        histogram.update(latents, scale)
    # torchmetrics squeezes a tensor of one number, such as the frequency of a single latent.
    columns = {name: values.reshape(-1).tolist() for name, values in purity.compute().items()}
    found = means.compute().reshape(classes, size).float()
    return found, usage.compute()["frequency"].reshape(-1), columns, histogram.compute()


@torch.no_grad()
def _predictions(context: StageContext, cut: Cut, classifier: Artifact, test: Captured) -> Tensor:
    """The output ``[N]`` that the network predicts for each test image; those of the data's classes come first.

    Behind a tail that is not linear they take a pass over all images, and are kept for the runs at other sites.
    """
    if cut.linear is not None:
        return torch.cat([cut.linear(rows).argmax(dim=1) for rows, _ in blocks(test, len(cut.linear))])

    def make(folder: Path, _: Path) -> None:
        found, loader = [], context.data.loader("test")
        with context.progress("predicting (test)", len(test)) as advance:
            for images, labels in loader:
                found.append(cut.logits(context.on_device(images)).argmax(dim=1).cpu())
                advance(len(labels))
        save_tensors(folder / "predictions.safetensors", {"test": torch.cat(found)})

    preprocess = asdict(context.data.preprocess) if context.data.preprocess else None
    key_settings = settings_of_key({"data": context.data.fingerprint(), "preprocess": preprocess}, classifier)
    artifact = context.store.get_or_make("predictions", key_settings, make)
    return load_tensors(artifact.file("predictions.safetensors"))["test"]


def _class_table(predictions: Tensor, labels: Tensor, classes: tuple[str, ...]) -> pd.DataFrame:
    """Images and accuracy of each class."""
    accuracy = per_class_accuracy(predictions, labels, len(classes))
    counts = torch.bincount(labels, minlength=len(classes))
    return pd.DataFrame({"class": classes, "test_images": counts.tolist(), "test_accuracy": accuracy.tolist()})


def concept_table(
    train_latents: Tensor,
    test_latents: Tensor,
    train: ConceptTruth,
    test: ConceptTruth,
    classes: tuple[str, ...],
    signed: bool,
) -> pd.DataFrame:
    """The best detector of each concept among the latents: chosen on train, judged on test.

    Args:
        train_latents, test_latents: ``[N, d]``.
        train, test: the concepts that their images show.
        classes: names.
        signed: latents take both signs.

    Returns:
        One row per ``concept``: the ``classes`` that it defines; ``test_images`` that show it; ``latent`` and ``sign``,
        missing if all or none of the train images show it; ``auroc`` on test, NaN if all or none of those show it.
    """
    found = concept_detectors(train_latents, train.presence, test_latents, test.presence, signed)
    owners = [
        "; ".join(name for name, own in zip(classes, train.class_concept, strict=True) if own == k)
        for k in range(len(train.concepts))
    ]
    table = pd.DataFrame(
        {
            "concept": train.concepts,
            "classes": owners,
            "test_images": test.presence.sum(dim=0).tolist(),
            "latent": pd.array(found.latents.tolist(), dtype="Int64"),
            "sign": pd.array(found.signs.tolist(), dtype="Int64"),
            "auroc": found.auroc.tolist(),
        }
    )
    table.loc[table["latent"] < 0, ["latent", "sign"]] = pd.NA
    return table


def feature_tables(
    means: Tensor,
    frequency: Tensor,
    classes: tuple[str, ...],
    settings: DiscoverSettings,
    effects: Tensor | None = None,
) -> dict[str, pd.DataFrame]:
    """The tables ``latents``, ``dominant`` and ``selected`` from class means ``[C, d]`` and frequencies ``[d]``.

    Effects ``[C, d]`` are needed for ``select=effect``.
    """
    share, margin, kind = shares(means), margins(means), kinds(means, settings.threshold)
    sign = torch.where(means < 0, -1, 1)

    def row(k: int, latent: int) -> dict[str, object]:
        return {
            "class": classes[k],
            "latent": latent,
            "mean": float(means[k, latent]),
            "sign": int(sign[k, latent]),
            "share": float(share[k, latent]),
            "kind": kind[latent],
        }

    filled = means.nan_to_num(0.0)
    top = filled.abs().argmax(dim=0)
    latent_rows = [
        {
            "latent": latent,
            "kind": kind[latent],
            "classes": "; ".join(
                classes[k] for k in (share[:, latent] >= settings.threshold / 2).nonzero()[:, 0].tolist()
            ),
            "top_class": classes[int(top[latent])],
            "share": float(share[top[latent], latent]),
            "mean": float(filled[top[latent], latent]),
            "sign": int(sign[top[latent], latent]),
            "frequency": float(frequency[latent]),
        }
        for latent in range(means.shape[1])
    ]
    dominant = filled.abs().topk(min(settings.dominant, means.shape[1]), dim=1).indices
    present = [k for k in range(len(classes)) if not bool(means[k].isnan().any())]
    dominant_rows = [
        {"rank": r + 1, **row(k, latent)} for k in present for r, latent in enumerate(dominant[k].tolist())
    ]
    chosen = select_latents(means, settings.select, frequency > 0, effects).tolist()  # type: ignore[arg-type]
    selected_rows = [
        {**row(k, latent), "margin": float(margin[k, latent])} if latent >= 0 else {"class": classes[k]}
        for k, latent in enumerate(chosen)
    ]
    columns = ["class", "latent", "sign", "mean", "share", "margin", "kind"]
    selected = pd.DataFrame(selected_rows, columns=columns).astype({"latent": "Int64", "sign": "Int64"})
    return {"latents": pd.DataFrame(latent_rows), "dominant": pd.DataFrame(dominant_rows), "selected": selected}
