# SPDX-License-Identifier: MIT
"""Evaluate an edited network on images, beside a frozen copy of the original (docs/method.md)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from salve.metrics import PredictiveDrift


class Confusion(Metric):
    """Confusion counts ``[C, C]``, with the true class in rows.

    With deterministic algorithms, torchmetrics' own compares every image of a batch with all ``C²`` cells, which takes
    half a gigabyte for 64 images and 1,000 classes.

    Args:
        num_classes: ``C``.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits ``[N, C]`` with labels ``[N]``."""
        cells = labels * len(self.counts) + logits.argmax(dim=1)
        self.counts.view(-1).index_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> Tensor:
        """``[C, C]``."""
        return self.counts


class EditEvaluation(pl.LightningModule):
    """Measure the original and the edited network on a test set; use it with ``Trainer.test`` and any strategy.

    Args:
        model: the original network; it is copied.
        edited_state: the edited ``state_dict``.
        order: ``[C]``, the output unit of each class; the network may have more outputs.
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
            setattr(self, f"{name}_confusion", Confusion(num_classes))
        self.drift = PredictiveDrift(num_classes)
        self._measures: dict[str, Any] = {}

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Add one batch of images ``[N, 3, H, W]`` with labels ``[N]``."""
        images, labels = batch
        if not len(labels):  # in an uneven last batch, only other ranks may have images
            return
        logits = {name: getattr(self, name)(images)[:, self.order] for name in ("original", "edited")}
        for name, values in logits.items():
            getattr(self, f"{name}_confusion").update(values, labels)
        self.drift.update(logits["original"], logits["edited"], labels)

    def on_test_epoch_end(self) -> None:
        """Reduce over all ranks and log the accuracies; :meth:`measures` has the full tables."""
        names = ("original_confusion", "edited_confusion", "drift")
        self._measures = {name: getattr(self, name).compute().cpu() for name in names}
        for name in ("original", "edited"):
            confusion = self._measures[f"{name}_confusion"].double()
            by_class = confusion.diagonal() / confusion.sum(dim=1).clamp_min(1)
            self._measures[f"{name}_accuracy"] = by_class.float()
            accuracy = (confusion.diagonal().sum() / confusion.sum()).float()
            self.log(f"{name}_accuracy", accuracy, sync_dist=True)

    def measures(self) -> dict[str, Any]:
        """The results of ``Trainer.test``, over the images of all ranks.

        Returns:
            ``original_accuracy`` and ``edited_accuracy`` per class ``[C]``, ``original_confusion`` and
            ``edited_confusion`` ``[C, C]`` with the true class in rows, and ``drift``, the mean KL per class ``[C]``.
        """
        return self._measures
