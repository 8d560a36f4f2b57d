"""Stage ``discover``: capture activations, and name the latents of an SAE that the classes depend on."""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, save_tensors, write_table
from salve.backbones import captured
from salve.features import class_means, kinds, margins, select_latents, shares
from salve.metrics import LatentUsage, per_class_accuracy
from salve.sae import load_sae
from salve.stages.job import Job, recipe_of


@dataclass
class DiscoverSettings:
    """How latents are read.

    Attributes:
        threshold: τ, the share from which a class owns a latent. select: ``margin`` or ``largest``.
        dominant: latents listed per class.
    """

    threshold: float
    select: str
    dominant: int


def capture(job: Job, classifier: Artifact) -> Artifact:
    """The activations at the job's site: artifact ``activations``."""
    model, site = job.model(classifier)
    return captured(job.store, model, site, job.data, job.device, job.progress)


def read_features(
    job: Job, settings: DiscoverSettings, classifier: Artifact, activations: Artifact, sae: Artifact
) -> Artifact:
    """What the latents say about the classes, from the train split.

    Returns:
        Artifact ``features``: ``latents.csv``, ``dominant.csv``, ``selected.csv``, ``classes.csv``,
        ``class_means.safetensors``.
    """
    recipe = recipe_of(asdict(settings), classifier, activations, sae)

    def make(folder: Path, _: Path) -> None:
        train, val = (job.activations(activations, split) for split in ("train", "val"))
        width = train.activations.shape[1]
        autoencoder = load_sae(sae.file("sae.safetensors"), width=width, backbone=job.backbone.name, site=job.layer)
        latents = autoencoder.encode(train.activations)
        usage = LatentUsage(autoencoder.dictionary_size, autoencoder.negligible)
        usage.update(latents, train.activations)
        means = class_means(latents, train.labels, len(job.classes))
        tables = feature_tables(means, usage.compute()["frequency"], job.classes, settings)
        for name, table in tables.items():
            write_table(folder / f"{name}.csv", table)
        save_tensors(folder / "class_means.safetensors", {"class_means": means})
        weight, bias = job.head(classifier)
        predictions = (val.activations @ weight.T + bias).argmax(dim=1)
        counts = torch.bincount(val.labels, minlength=len(job.classes))
        accuracy = per_class_accuracy(predictions, val.labels, len(job.classes))
        columns = {"class": job.classes, "val_images": counts.tolist(), "val_accuracy": accuracy.tolist()}
        write_table(folder / "classes.csv", pd.DataFrame(columns))

    return job.store.get_or_make("features", recipe, make)


def feature_tables(
    means: Tensor, frequency: Tensor, classes: tuple[str, ...], settings: DiscoverSettings
) -> dict[str, pd.DataFrame]:
    """The tables ``latents``, ``dominant`` and ``selected`` from class means ``[C, d]`` and frequencies ``[d]``."""
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
    chosen = select_latents(means, settings.select).tolist()  # type: ignore[arg-type]
    selected_rows = [
        {**row(k, latent), "margin": float(margin[k, latent])} if latent >= 0 else {"class": classes[k]}
        for k, latent in enumerate(chosen)
    ]
    columns = ["class", "latent", "sign", "mean", "share", "margin", "kind"]
    selected = pd.DataFrame(selected_rows, columns=columns).astype({"latent": "Int64", "sign": "Int64"})
    return {"latents": pd.DataFrame(latent_rows), "dominant": pd.DataFrame(dominant_rows), "selected": selected}
