# SPDX-License-Identifier: MIT
"""Train one SAE with Lightning."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from salve.activations.rows import ActivationsData, Block
from salve.activations.schedule import pass_seed
from salve.distributed import batch_share
from salve.metrics import BatchMean, FractionOfVarianceExplained, LatentUsage
from salve.sae.adam import Adam
from salve.sae.base import SAE
from salve.sae.learning_rate import learning_rate_factor
from salve.sae.memory import give_freed_memory_back, keep_freed_memory
from salve.sae.objective import step_loss
from salve.sae.revival import resample, update_rows_since_fired
from salve.sae.topk import BatchTopK, learn_threshold
from salve.settings import DECAY, WARMUP, Precision
from salve.types import UserError


class Measures(nn.Module):
    """Measures that a training logs: downstream accuracy, FVE, L0, L1 and dead fraction, over a whole pass.

    Args:
        sae: the SAE that is measured.
        head: see :class:`SparseAutoencoder`; without one there is no downstream accuracy.
    """

    def __init__(self, sae: SAE, head: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self._head = head
        self.accuracy = BatchMean()
        self.fve = FractionOfVarianceExplained(sae.width)
        self.usage = LatentUsage(sae.dictionary_size, sae.firing_threshold)

    def update(self, activations: Tensor, reconstruction: Tensor, latents: Tensor, labels: Tensor) -> None:
        """Add activations and reconstructions ``[N, M]``, latents ``[N, d]``, and labels ``[N]``."""
        if self._head is not None:
            right = self._head(reconstruction).argmax(dim=1) == labels
            self.accuracy.update(right.float().mean(), len(right))
        self.fve.update(activations, reconstruction)
        self.usage.update(latents, activations)

    def compute(self) -> dict[str, Tensor]:
        """The measures by name, over all ranks; resets them."""
        usage = self.usage.compute()
        measures = {
            **({} if self._head is None else {"downstream_accuracy": self.accuracy.compute()}),
            "fve": self.fve.compute(),
            **{name: usage[name] for name in ("l0", "l1", "dead_fraction")},
        }
        for metric in (self.accuracy, self.fve, self.usage):
            if metric is not self.accuracy or self._head is not None:
                metric.reset()
        return {name: value.float() for name, value in measures.items()}


class SparseAutoencoder(pl.LightningModule):
    """Train an SAE, and measure it after every Trainer epoch (:class:`Measures`).

    Args:
        sae: the SAE to train, on activations scaled so that ``mean ‖a‖² = M``.
        sparsity: λ of the variant (:meth:`salve.sae.SAE.losses`).
        learning_rate: Adam's peak rate; :func:`salve.sae.learning_rate_factor` scales it step by step.
        head: the classifier behind the site: maps reconstructions ``[N, M]``, in the same units, to logits ``[N, C]``.
            A module moves to the training's device. Its parameters are not trained if they require no gradient. None
            where reconstructions alone do not give the logits, as at a map.
        auxk: at most this many dead latents also reconstruct the error; 0 for none.
        resample: number of times that dead latents restart, evenly over the first half of the training; 0 for never.
            Needs an :class:`ActivationsData` as datamodule.
        patience: rows without firing after which a latent is dead. Needed with ``auxk`` or ``resample``.
        precision: of the matrix products in training. Weights, Adam's moments and measures stay float32.
        warmup, decay: shares of the steps; see :func:`salve.sae.learning_rate_factor`.

    Raises:
        UserError: ``patience`` is below 1 with ``auxk`` or ``resample``.
    """

    rows_since_fired: Tensor

    def __init__(
        self,
        sae: SAE,
        sparsity: float,
        learning_rate: float,
        head: Callable[[Tensor], Tensor] | None,
        *,
        auxk: int = 0,
        resample: int = 0,
        patience: int = 0,
        precision: Precision = "float32",
        warmup: float = WARMUP,
        decay: float = DECAY,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if (auxk or resample) and patience < 1:
            raise UserError(f"patience={patience} must be at least 1 row with auxk or resample.")
        self.sae = sae
        self.sparsity = sparsity
        self.learning_rate = learning_rate
        self.auxk, self.resample, self.patience = auxk, resample, patience
        self.precision = precision
        self.warmup, self.decay = warmup, decay
        self._restarts: set[int] = set()
        self.loss = BatchMean()
        self.measures = Measures(sae, head)
        if patience:
            self.register_buffer("rows_since_fired", torch.zeros(sae.dictionary_size, dtype=torch.long))

    def on_fit_start(self) -> None:
        """Keep freed memory while training."""
        keep_freed_memory()

    def on_fit_end(self) -> None:
        """Return freed memory to the system."""
        give_freed_memory_back()

    def training_step(self, batch: Sequence[Any], _: int) -> None:
        """Take all optimiser steps of a :class:`salve.activations.Block`, or one step on a batch ``(rows, …)``.

        Blocks avoid Lightning's overhead per step, which would take as long as a step of a small SAE.
        """
        rows = batch[0]
        sizes = batch.sizes if isinstance(batch, Block) else [len(rows)]
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        total = torch.zeros((), device=self.device)
        for activations in rows.split(sizes):
            loss = self._loss(activations)
            optimizer.zero_grad()
            self.manual_backward(loss * batch_share(len(activations)))
            optimizer.step()
            scheduler.step()
            self.sae.normalise_decoder()
            total += loss.detach() * len(activations)
            if self.global_step in self._restarts:
                self._resample()
        self.loss.update(total / max(1, len(rows)), len(rows))
        self.log("loss", self.loss, on_step=False, on_epoch=True)

    def _loss(self, activations: Tensor) -> Tensor:
        """The mean loss of this rank's part of a batch; also updates what depends on which latents fire."""
        dead = self.rows_since_fired >= self.patience if self.auxk else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, output = step_loss(self.sae, activations, self.sparsity, dead, self.auxk)
        if self.patience:
            latents, threshold = output.latents.detach(), self.sae.firing_threshold
            rows = update_rows_since_fired(self.rows_since_fired, latents, activations, threshold)
            self.rows_since_fired.copy_(rows)
        if isinstance(self.sae, BatchTopK):
            latents = output.latents.detach()
            self.sae.threshold.copy_(learn_threshold(self.sae.threshold, latents, self.global_step))
        return loss

    def _resample(self) -> None:
        trainer: Any = self.trainer
        data: ActivationsData = trainer.datamodule
        # The same on every rank, since all ranks hold all rows.
        generator = torch.Generator().manual_seed(pass_seed(data.seed, self.global_step))
        dead = self.rows_since_fired >= self.patience
        resample(self.sae, trainer.optimizers[0], data.train, dead, self.sparsity, generator)
        self.rows_since_fired.zero_()

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        """Accumulate the measures."""
        activations, labels = batch
        reconstruction, latents = self.sae(activations)
        self.measures.update(activations, reconstruction, latents, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the measures over the whole pass."""
        self.log_dict(self.measures.compute(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam and its schedule."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ActivationsData):  # Lightning would count blocks, not steps
            steps = data.schedule.steps
            self._restarts = data.schedule.restarts(self.resample)
        else:
            steps = int(self.trainer.estimated_stepping_batches)
        return adam_with_schedule(self.parameters(), self.learning_rate, steps, self.warmup, self.decay)


def adam_with_schedule(
    parameters: Iterable[nn.Parameter], learning_rate: float, steps: int, warmup: float, decay: float
) -> tuple[list[Adam], list[LambdaLR]]:
    """Adam for the parameters that require a gradient, and its schedule, in the form that Lightning expects.

    Args:
        parameters: of the model. learning_rate: the peak.
        steps, warmup, decay: see :func:`salve.sae.learning_rate_factor`.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = Adam(trained, lr=learning_rate)
    # LambdaLR also asks for the step after the last one.
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(min(step, steps - 1), steps, warmup, decay))
    return [optimizer], [schedule]
