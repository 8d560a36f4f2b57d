# SPDX-License-Identifier: MIT
"""Fine-tuning a backbone with Lightning."""

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from salve.distributed import batch_share
from salve.metrics import BatchMean


class Classifier(pl.LightningModule):
    """Train a classifier: AdamW without decay on norms and biases, warm-up and cosine schedule, label smoothing.

    Args:
        model: maps images ``[N, 3, H, W]`` (or, for a probe, activations ``[N, M]``) to logits ``[N, outputs]``.
        order: ``[C]``, the output unit of each class; the network may have more outputs.
        learning_rate: the peak, reached after the warm-up.
        weight_decay: of weights with two or more axes.
        label_smoothing: share of the target that is spread over all classes.
        warmup: share of the steps, 0 to 1, over which the learning rate rises.
    """

    order: Tensor

    def __init__(
        self,
        model: nn.Module,
        order: Tensor,
        learning_rate: float,
        weight_decay: float,
        label_smoothing: float = 0.1,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("order", order, persistent=False)
        num_classes = len(order)
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        # Of Lightning's own means over ranks the counts are rounded.
        self.train_loss, self.select_loss = BatchMean(), BatchMean()
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.select_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        """The smoothed cross-entropy of a batch; of this rank's share of it if there are several ranks."""
        logits, labels = self._seen(batch)
        size = len(labels)
        loss: Tensor = self.loss(logits, labels) if size else 0 * logits.sum()
        self._follow("train", loss.detach(), logits, labels)
        return loss * batch_share(size)

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        """Log plain cross-entropy and accuracy on the select split."""
        logits, labels = self._seen(batch)
        loss = nn.functional.cross_entropy(logits, labels) if len(labels) else 0 * logits.sum()
        self._follow("select", loss, logits, labels)

    def _seen(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and labels; a rank without images in a batch takes part with a blank one, without label."""
        inputs, labels = batch
        logits = self.model(inputs if len(labels) else inputs.new_zeros(1, *inputs.shape[1:]))
        return logits[:, self.order], labels

    def _follow(self, split: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        means, accuracy = getattr(self, f"{split}_loss"), getattr(self, f"{split}_accuracy")
        if len(labels):
            means.update(loss, len(labels))
            accuracy.update(logits, labels)
        self.log(f"{split}_loss", means, on_step=False, on_epoch=True)
        self.log(f"{split}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, which steps after every batch."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        rising = max(1, round(self.warmup * steps))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
