# SPDX-License-Identifier: MIT
"""Stage ``finetune``: get a classifier whose head fits the data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from salve.activations import Captured, captured, load_captured
from salve.activations.capture import SPLITS
from salve.activations.rows import StreamedBatches, rows_loader
from salve.artifacts import Artifact, digest_of_tensors, save_tensors, write_record, write_table
from salve.backbones import Classifier, find_site
from salve.backbones.cut import Cut
from salve.backbones.robust import RobustClassifier
from salve.data.base import ImageData
from salve.settings import FinetuneSettings
from salve.stages.context import StageContext
from salve.stages.training import fit
from salve.stages.weighting import Weighting
from salve.types import Labels, UserError
from salve.untrusted import some


def finetune(context: StageContext, settings: FinetuneSettings, weighting: Weighting | None = None) -> Artifact:
    """Train the classifier, or take it as it is.

    Args:
        context, settings: of the run. weighting: of the train images, if they do not count alike.

    Returns:
        Artifact ``classifier``: ``model.safetensors`` (a plain state_dict), ``classifier.json``, ``history.csv``.
    """
    pl.seed_everything(context.seed, workers=True, verbose=False)
    without = classes_without(context.classes, settings.without)
    model, fits = context.build()
    mode = settings.mode
    if mode == "auto":
        mode = "none" if fits else "full"
    if mode == "none" and not fits:
        raise UserError(
            f"finetune.mode=none needs weights whose head fits the data; {context.backbone.weights} has none for the "
            f"{len(context.classes)} classes of the data; choose full, probe or auto."
        )
    if mode == "none" and without:
        raise UserError(
            f"finetune.without={settings.without} leaves images out of a training, but these weights fit the data and "
            "are not trained; choose finetune.mode=full or probe."
        )
    key_settings: dict[str, Any] = {
        "backbone": {"library": context.backbone.library, "name": context.backbone.name, "args": context.backbone.args},
        "weights": context.backbone.weights
        if context.backbone.weights == "random"
        else digest_of_tensors(model.state_dict()),
        "classes": list(context.classes),
        "outputs": context.data.outputs,
        "mode": mode,
    }
    if mode != "none":
        key_settings |= {
            "data": context.data.fingerprint(),
            "preprocess": asdict(context.data.preprocess) if context.data.preprocess else None,
            "batch_size": context.data.batch_size,
            "precision": context.precision,
            "seed": context.seed,
            "settings": {name: value for name, value in asdict(settings).items() if name not in ("mode", "without")},
            **({"without": sorted(without)} if without else {}),
            **({} if weighting is None else {"weighting": weighting.key()}),
            **context.trained_with.get("finetune", {}),
        }

    within = None
    if mode == "probe":
        images = sum(len(context.data.labels(split)) for split in SPLITS)
        within = context.shuffled_within(images, find_site(model, "last").width, context.data.batch_size)
        key_settings["shuffled_within"] = within
        if within and (without or weighting is not None):
            raise UserError(
                "finetune.without, and a training that does not weigh images alike, need activations that fit into "
                "memory; raise trainer.memory, or choose finetune.mode=full."
            )

    def make(folder: Path, scratch: Path) -> None:
        if mode == "full":
            _train_fully(context, settings, model, without, weighting, folder, scratch)
        elif mode == "probe":
            _train_head(context, settings, model, without, weighting, within, folder, scratch)
        save_tensors(folder / "model.safetensors", model.state_dict())
        record = {
            "backbone": f"{context.backbone.library}/{context.backbone.name}",
            "weights": Path(context.backbone.weights).name,
            "mode": mode,
            "classes": list(context.classes),
            **({"without": [context.classes[label] for label in without]} if without else {}),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        write_record(folder / "classifier.json", record)

    return context.store.get_or_make("classifier", key_settings, make)


def classes_without(classes: Sequence[str], without: Sequence[str]) -> list[int]:
    """The labels of the classes that a training leaves out.

    Args:
        classes: names of all classes. without: names of those left out.

    Raises:
        UserError: there is no such class, or fewer than two are left.
    """
    if unknown := [name for name in without if name not in classes]:
        raise UserError(
            f"finetune.without names {some(unknown, 3)}, which is no class; choose from {some(classes, 20)}."
        )
    left = len(classes) - len(set(without))
    if without and left < 2:
        raise UserError(
            f"finetune.without leaves {left} of {len(classes)} classes to train on; at least two must stay."
        )
    return [label for label, name in enumerate(classes) if name in without]


def _others(labels: Labels, without: Sequence[int]) -> Tensor:
    """The numbers of the images that are of none of these classes."""
    return (~torch.isin(labels, torch.tensor(without, dtype=labels.dtype))).nonzero()[:, 0]


def _shown(labels: Labels, without: Sequence[int], weighting: Weighting | None) -> Tensor:
    """The numbers of the train images that are shown."""
    numbers = _others(labels, without)
    return numbers if weighting is None else numbers[weighting.times[numbers] > 0]


class _Chosen(pl.LightningDataModule):
    """Data for a training, without the images of some classes, or with other weights of the train images.

    Args:
        data: all images. without: labels of the classes left out. weighting: of the train images.
    """

    def __init__(self, data: ImageData, without: Sequence[int], weighting: Weighting | None) -> None:
        super().__init__()
        self._data, self._without, self._weighting = data, tuple(without), weighting

    def train_dataloader(self) -> Any:
        """See :meth:`ImageData.train_dataloader`."""
        labels, weighting = torch.as_tensor(self._data.labels("train")), self._weighting
        shown = _shown(labels, self._without, weighting)
        drawn: dict[str, Any] = {}
        if weighting is not None and (weights := weighting.drawn_by(shown)) is not None:
            drawn = {"targets": weighting.targets(labels).tolist(), "weights": weights.tolist()}
        more_than_one = len(shown) > self._data.batch_size
        return self._data.loader(
            "train", augment=True, shuffle=True, drop_last=more_than_one, indices=shown.tolist(), **drawn
        )

    def val_dataloader(self) -> Any:
        """The select split in its fixed order: Lightning's validation chooses the epoch."""
        return self._data.loader("select", indices=_others(self._data.labels("select"), self._without).tolist())


def _train_fully(
    context: StageContext,
    settings: FinetuneSettings,
    model: nn.Module,
    without: Sequence[int],
    weighting: Weighting | None,
    folder: Path,
    scratch: Path,
) -> None:
    model.to(memory_format=torch.channels_last)
    module = _classifier(settings, model, context.output_order(model), weighting)
    some = without or weighting is not None
    data = {"datamodule": _Chosen(context.data, without, weighting) if some else context.data}
    _fit(context, settings, module, data, folder, scratch)


def _train_head(
    context: StageContext,
    settings: FinetuneSettings,
    model: nn.Module,
    without: Sequence[int],
    weighting: Weighting | None,
    within: int | None,
    folder: Path,
    scratch: Path,
) -> None:
    """Train the head alone, on captured activations; ``within``: rows to shuffle at a time if read from disk."""
    site = find_site(model, "last")
    cut = Cut(model, site, context.output_order(model))
    activations = captured(context.store, cut, context.data, context.ranks, context.progress)
    train, select = (load_captured(activations.path, split) for split in ("train", "select"))
    head = model.cpu().get_submodule(site.readers[0].path).train()
    if isinstance(head, nn.Conv2d):
        head = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), head, nn.Flatten())
    size = context.data.batch_size
    if within:
        batches: Any = StreamedBatches(*train, batch_size=size, block=within)
    else:
        shown, kept = _shown(train.labels, without, weighting), _others(select.labels, without)
        targets = train.labels if weighting is None else weighting.targets(train.labels)
        weights = None if weighting is None else weighting.drawn_by(shown)
        select = Captured(select.activations[kept], select.labels[kept])
        drawn_by = None if weights is None else weights.tolist()
        rows = (train.activations[shown], targets[shown])
        batches = rows_loader(*rows, batch_size=size, shuffle=True, weights=drawn_by)
    data = {
        "train_dataloaders": batches,
        "val_dataloaders": rows_loader(*select, batch_size=max(size, 1024)),
    }
    module = _classifier(settings, head, context.output_order(model), weighting)
    _fit(context, settings, module, data, folder, scratch)


def _fit(
    context: StageContext,
    settings: FinetuneSettings,
    module: Classifier,
    data: Mapping[str, Any],
    folder: Path,
    scratch: Path,
) -> None:
    """Train, keep the weights of the best epoch, and write ``history.csv``."""
    best, patience = "select_accuracy", settings.patience
    history = fit(context, "finetune", module, data, scratch, epochs=settings.epochs, best=best, patience=patience)
    write_table(folder / "history.csv", _by_split(history))


def _by_split(history: pd.DataFrame) -> pd.DataFrame:
    """Turn a history with one row per epoch into one with a row per epoch and split."""
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


def _classifier(settings: FinetuneSettings, model: nn.Module, order: Tensor, weighting: Weighting | None) -> Classifier:
    given = (settings.learning_rate, settings.weight_decay, settings.label_smoothing, settings.warmup)
    if weighting is None or weighting.groups is None:
        return Classifier(model, order, *given)
    return RobustClassifier(model, order, *given, values=weighting.values, step=weighting.step)
