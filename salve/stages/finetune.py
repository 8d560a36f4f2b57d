"""Stage ``finetune``: a classifier whose head fits the data."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from salve.artifacts import Artifact, digest_of_tensors, save_tensors, write_record, write_table
from salve.backbones import Captured, Classifier, captured, find_site, load_captured
from salve.backbones.capture import SPLITS
from salve.sae.rows import StreamedBatches, rows_loader
from salve.settings import FinetuneSettings
from salve.stages.job import Job
from salve.types import UserError


def finetune(job: Job, settings: FinetuneSettings) -> Artifact:
    """The classifier, trained if it has to be.

    Returns:
        Artifact ``classifier``: ``model.safetensors`` (a plain state_dict), ``classifier.json``, ``history.csv``.
    """
    pl.seed_everything(job.seed, workers=True, verbose=False)
    model, fits = job.build()
    mode = settings.mode
    if mode == "auto":
        mode = "none" if fits else "full"
    if mode == "none" and not fits:
        raise UserError(
            f"finetune.mode=none, but the weights ({job.backbone.weights}) bring no head for the {len(job.classes)} "
            "classes of the data; choose full, probe or auto."
        )
    recipe: dict[str, Any] = {
        "backbone": {"library": job.backbone.library, "name": job.backbone.name, "args": job.backbone.args},
        "weights": job.backbone.weights if job.backbone.weights == "random" else digest_of_tensors(model.state_dict()),
        "classes": list(job.classes),
        "outputs": job.data.outputs,
        "mode": mode,
    }
    if mode != "none":
        recipe |= {
            "data": job.data.fingerprint(),
            "preprocess": asdict(job.data.preprocess) if job.data.preprocess else None,
            "batch_size": job.data.batch_size,
            "precision": job.precision,
            "seed": job.seed,
            "settings": {name: value for name, value in asdict(settings).items() if name != "mode"},
        }
    if mode == "full":
        recipe["augmentation"] = "drawn by row"  # as opposed to one after the other, in version 0.1

    within = None
    if mode == "probe":
        images = sum(len(job.data.labels(split)) for split in SPLITS)
        within = job.shuffled_within(images, find_site(model, "last").width, job.data.batch_size)
        recipe |= {"shuffled_within": within} if within else {}

    def make(folder: Path, scratch: Path) -> None:
        if mode == "full":
            _train_fully(job, settings, model, folder, scratch)
        elif mode == "probe":
            _train_head(job, settings, model, within, folder, scratch)
        save_tensors(folder / "model.safetensors", model.state_dict())
        record = {
            "backbone": f"{job.backbone.library}/{job.backbone.name}",
            "weights": Path(job.backbone.weights).name,
            "mode": mode,
            "classes": list(job.classes),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        write_record(folder / "classifier.json", record)

    return job.store.get_or_make("classifier", recipe, make)


def _train_fully(job: Job, settings: FinetuneSettings, model: nn.Module, folder: Path, scratch: Path) -> None:
    model.to(memory_format=torch.channels_last)
    module = _classifier(settings, model, job.output_order(model))
    data = {"datamodule": job.data}
    history = job.fit(
        "finetune", module, data, scratch, epochs=settings.epochs, best="select_accuracy", patience=settings.patience
    )
    write_table(folder / "history.csv", _by_split(history))


def _train_head(
    job: Job, settings: FinetuneSettings, model: nn.Module, within: int | None, folder: Path, scratch: Path
) -> None:
    """Args: within: rows shuffled at a time, if the activations stay on disk."""
    site = find_site(model, "last")
    activations = captured(job.store, model, site, job.data, job.device, job.progress)
    train, select = (load_captured(activations.path, split) for split in ("train", "select"))
    head = model.cpu().get_submodule(site.readers[0]).train()
    size = job.data.batch_size
    if within:
        batches: Any = StreamedBatches(*train, batch_size=size, block=within)
    else:
        train, select = (Captured(split.activations, split.labels) for split in (train, select))
        batches = rows_loader(*train, batch_size=size, shuffle=True)
    data = {
        "train_dataloaders": batches,
        "val_dataloaders": rows_loader(*select, batch_size=max(size, 1024)),
    }
    module = _classifier(settings, head, job.output_order(model))
    history = job.fit(
        "finetune", module, data, scratch, epochs=settings.epochs, best="select_accuracy", patience=settings.patience
    )
    write_table(folder / "history.csv", _by_split(history))


def _by_split(history: pd.DataFrame) -> pd.DataFrame:
    """One row per epoch and split, from one row per epoch."""
    parts = [
        pd.DataFrame(
            {
                "epoch": history["epoch"],
                "split": split,
                "loss": history[f"{split}_loss"],
                "accuracy": history[f"{split}_accuracy"],
            }
        )
        for split in ("train", "select")
    ]
    return pd.concat(parts).sort_values("epoch", kind="stable", ignore_index=True)


def _classifier(settings: FinetuneSettings, model: nn.Module, order: Tensor) -> Classifier:
    return Classifier(
        model,
        order,
        settings.learning_rate,
        settings.weight_decay,
        settings.label_smoothing,
        settings.warmup,
    )
