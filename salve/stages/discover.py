"""Stage ``discover``: capture activations, and find the latents of an SAE that each class depends on."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from salve.activations import Captured, captured
from salve.artifacts import Artifact, save_tensors, write_table
from salve.backbones.tail import LinearTail
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
from salve.settings import DiscoverSettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.effects import class_attributions
from salve.stages.measure import blocks


def capture(context: StageContext, classifier: Artifact) -> Artifact:
    """Capture the activations at the site: artifact ``activations``."""
    model, site = context.model(classifier)
    return captured(context.store, model, site, context.data, context.device, context.progress)


def read_features(
    context: StageContext, settings: DiscoverSettings, classifier: Artifact, activations: Artifact, sae: Artifact
) -> Artifact:
    """Relate latents to classes and concepts on the train split, in blocks of rows.

    Returns:
        Artifact ``features``: ``latents.csv``, ``dominant.csv``, ``selected.csv``, ``classes.csv``,
        ``class_means.safetensors``, ``histograms.safetensors``, and ``concepts.csv`` if concepts are known.
    """
    key_settings = settings_of_key(asdict(settings), classifier, activations, sae)

    def make(folder: Path, _: Path) -> None:
        train, test = (context.activations(activations, split) for split in ("train", "test"))
        autoencoder = context.sae(sae, activations)
        means, frequency, per_latent, histogram = _pass_over(train, autoencoder, len(context.classes))
        effects = None
        if settings.select == "effect":
            effects = class_effects(class_attributions(context, classifier, activations), autoencoder.decoder)
        tables = feature_tables(means, frequency, context.classes, settings, effects)
        tables["latents"] = tables["latents"].assign(**per_latent)
        tables["classes"] = _class_table(test, context.tail(classifier), context.classes)
        shown, judged = context.data.truth("train"), context.data.truth("test")
        if shown is not None and judged is not None:
            chosen_by, judged_by = (_all_latents(autoencoder, split) for split in (train, test))
            tables["concepts"] = concept_table(chosen_by, judged_by, shown, judged, context.classes, autoencoder.signed)
        for name, table in tables.items():
            write_table(folder / f"{name}.csv", table)
        save_tensors(folder / "class_means.safetensors", {"class_means": means})
        save_tensors(folder / "histograms.safetensors", histogram)

    return context.store.get_or_make("features", key_settings, make)


def _pass_over(
    split: Captured, sae: SAE, classes: int
) -> tuple[Tensor, Tensor, dict[str, list[float]], dict[str, Tensor]]:
    """Class means ``[C, d]``, frequencies ``[d]``, more columns of ``latents.csv``, and the histograms."""
    size, firing_threshold = sae.dictionary_size, sae.firing_threshold
    means, usage = ClassMeans(size, classes), LatentUsage(size, firing_threshold)
    purity, histogram = (
        ClassPurity(size, classes, firing_threshold=firing_threshold),
        ActivationHistogram(size, firing_threshold),
    )
    for activations, labels in blocks(split, size):
        latents = sae.encode(activations)
        means.update(latents, labels)
        usage.update(latents, activations)
        purity.update(latents, activations, labels)
        histogram.update(latents, activations)
    # torchmetrics squeezes a tensor of one number, such as the frequency of a single latent.
    columns = {name: values.reshape(-1).tolist() for name, values in purity.compute().items()}
    found = means.compute().reshape(classes, size).float()
    return found, usage.compute()["frequency"].reshape(-1), columns, histogram.compute()


def _class_table(test: Captured, tail: LinearTail, classes: tuple[str, ...]) -> pd.DataFrame:
    predictions = [tail(activations).argmax(dim=1) for activations, _ in blocks(test, len(tail))]
    accuracy = per_class_accuracy(torch.cat(predictions), test.labels, len(tail))[: len(classes)]
    counts = torch.bincount(test.labels, minlength=len(classes))
    return pd.DataFrame({"class": classes, "test_images": counts.tolist(), "test_accuracy": accuracy.tolist()})


def _all_latents(sae: SAE, split: Captured) -> Tensor:
    """Latents ``[N, d]`` of a whole split: AUROCs need them, and data with known concepts are small."""
    return torch.cat([sae.encode(activations) for activations, _ in blocks(split, sae.dictionary_size)])


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
