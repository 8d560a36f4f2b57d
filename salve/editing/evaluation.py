"""Measuring an edited network on images, beside a frozen copy of the original (METHOD §6)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from salve.metrics import PredictiveDrift


class EditEvaluation(pl.LightningModule):
    """Runs the original and the edited network over a test set; use with ``Trainer.test`` under any strategy.

    Args:
        model: the original; it is copied, never changed.
        edited_state: the edited ``state_dict``.
        order: ``[C]``, the network's output unit for each label ``0 … C − 1``, of all its outputs.
    """

    order: Tensor

    def __init__(self, model: nn.Module, edited_state: Mapping[str, Tensor], order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order, persistent=False)
        num_classes = len(order)
        self.original = copy.deepcopy(model).eval().requires_grad_(False)
        self.edited = copy.deepcopy(model).eval().requires_grad_(False)
        self.edited.load_state_dict(edited_state)
        for name in ("original", "edited"):
            setattr(self, f"{name}_accuracy", MulticlassAccuracy(num_classes, average="none"))
            setattr(self, f"{name}_confusion", MulticlassConfusionMatrix(num_classes))
        self.drift = PredictiveDrift(num_classes)
        self._measures: dict[str, Any] = {}

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Add one batch of images ``[N, 3, H, W]`` with labels ``[N]``."""
        images, labels = batch
        if not len(labels):  # of an uneven last batch, other ranks may have rows
            return
        logits = {name: getattr(self, name)(images)[:, self.order] for name in ("original", "edited")}
        for name, values in logits.items():
            getattr(self, f"{name}_accuracy").update(values, labels)
            getattr(self, f"{name}_confusion").update(values, labels)
        self.drift.update(logits["original"], logits["edited"], labels)

    def on_test_epoch_end(self) -> None:
        """Reduce over all ranks, and log what a logger can show; the full tables come from :meth:`measures`."""
        names = ("original_accuracy", "edited_accuracy", "original_confusion", "edited_confusion", "drift")
        self._measures = {name: getattr(self, name).compute().cpu() for name in names}
        for name in ("original", "edited"):
            confusion = self._measures[f"{name}_confusion"].double()
            accuracy = (confusion.diagonal().sum() / confusion.sum()).float()
            self.log(f"{name}_accuracy", accuracy, sync_dist=True)

    def measures(self) -> dict[str, Any]:
        """Per-class accuracies ``[C]``, confusion counts ``[C, C]`` (rows true), mean KL per class ``[C]``.

        Of the images of all ranks; to be asked for after ``Trainer.test``.
        """
        return self._measures
