"""Stage ``discover``: train an SAE on captured activations and name the latents that the classes depend on."""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor

from salve.artifacts import Artifact, save_tensors, write_record, write_table
from salve.backbones import captured
from salve.features import class_means, kinds, margins, select_latents, shares
from salve.metrics import FractionOfVarianceExplained, LatentUsage, per_class_accuracy
from salve.sae import SAE, ActivationsData, SparseAutoencoder, load_sae, make_sae, save_sae
from salve.stages.job import Job, recipe_of


@dataclass
class SAESettings:
    """Which SAE, and how it is trained.

    Attributes:
        variant: linear_l1, relu_l1 or topk. dictionary_size: d. sparsity: λ. k: active latents (topk only).
        centre: subtract the mean activation first; off by default, since it spoils the published edit (METHOD §8).
        learning_rate, batch_size, epochs: of Adam on cached activations.
    """

    variant: str
    dictionary_size: int
    sparsity: float
    k: int | None
    centre: bool
    learning_rate: float
    batch_size: int
    epochs: int


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


def train_sae(job: Job, settings: SAESettings, classifier: Artifact, activations: Artifact) -> Artifact:
    """The SAE: artifact ``sae`` with ``sae.safetensors`` (takes raw activations), ``sae.json`` and ``history.csv``."""
    recipe = recipe_of(asdict(settings), classifier, activations) | {"seed": job.seed}

    def make(folder: Path, scratch: Path) -> None:
        pl.seed_everything(job.seed, workers=True, verbose=False)
        train, val = (job.activations(activations, split) for split in ("train", "val"))
        weight, bias = job.head(classifier)
        sae = _untrained(settings, train.activations, job.seed)
        shift = train.activations.mean(dim=0) if settings.centre else torch.zeros(sae.width)
        # One scalar, so that mean ‖a‖² = M and λ means the same on every site.
        scale = float((train.activations - shift).square().mean().sqrt()) or 1.0
        sae.shift.copy_(shift / scale)
        data = ActivationsData(train.activations / scale, val.activations / scale, val.labels, settings.batch_size)
        head = torch.nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
        head.weight.copy_(weight * scale)  # reads reconstructions in the units of training
        head.bias.copy_(bias)
        module = SparseAutoencoder(sae, settings.sparsity, settings.learning_rate, head)
        history = job.fit("discover", module, {"datamodule": data}, scratch, epochs=settings.epochs)
        sae.cpu().fold(scale)
        facts = {"backbone": job.backbone.name, "site": job.layer, "scale": scale}
        save_sae(folder / "sae.safetensors", sae, facts)
        write_table(folder / "history.csv", history)
        write_record(folder / "sae.json", _record(settings, sae, history, weight, bias, val.activations, val.labels))

    return job.store.get_or_make("sae", recipe, make)


def _untrained(settings: SAESettings, activations: Tensor, seed: int) -> SAE:
    options = {} if settings.k is None or settings.variant != "topk" else {"k": settings.k}
    generator = torch.Generator().manual_seed(seed)
    return make_sae(settings.variant, activations.shape[1], settings.dictionary_size, generator, **options)


@torch.no_grad()
def _record(
    settings: SAESettings, sae: SAE, history: pd.DataFrame, weight: Tensor, bias: Tensor, val: Tensor, labels: Tensor
) -> dict[str, object]:
    """What the finished file does on raw val activations; measured anew, so that a wrong fold would show."""
    reconstruction, latents = sae(val)
    usage, fve = LatentUsage(sae.dictionary_size, sae.negligible), FractionOfVarianceExplained(sae.width)
    usage.update(latents, val)
    fve.update(val, reconstruction)

    def accuracy(activations: Tensor) -> float:
        return float(((activations @ weight.T + bias).argmax(dim=1) == labels).double().mean())

    measures = {name: float(value) for name, value in usage.compute().items() if value.ndim == 0}
    return {
        **asdict(settings),
        **measures,
        "width": sae.width,
        "fve": float(fve.compute()),
        "downstream_accuracy": accuracy(reconstruction),
        "original_accuracy": accuracy(val),
    }


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
        autoencoder = load_sae(sae.file("sae.safetensors"))
        train, val = (job.activations(activations, split) for split in ("train", "val"))
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
