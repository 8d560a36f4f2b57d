"""Training an SAE with Lightning."""

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
from salve.sae.memory import give_freed_memory_back, keep_freed_memory
from salve.sae.objective import step_loss
from salve.sae.pace import pace
from salve.sae.revival import resample, silence
from salve.sae.topk import BatchTopK, learn_threshold
from salve.settings import DECAY, WARMUP, Precision
from salve.types import UserError


class Measures(nn.Module):
    """What a training is followed by, over a whole pass: downstream accuracy, FVE, L0, L1 and dead fraction.

    Args:
        sae: the SAE that is measured.
    """

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.accuracy = BatchMean()
        self.fve = FractionOfVarianceExplained(sae.width)
        self.usage = LatentUsage(sae.dictionary_size, sae.firing_threshold)

    def update(self, activations: Tensor, reconstruction: Tensor, latents: Tensor, right: Tensor) -> None:
        """Add activations ``[N, M]``, reconstructions, latents ``[N, d]``, and which are classified right ``[N]``."""
        self.accuracy.update(right.float().mean(), len(right))
        self.fve.update(activations, reconstruction)
        self.usage.update(latents, activations)

    def compute(self) -> dict[str, Tensor]:
        """The measures by name, over all ranks; then start anew."""
        usage = self.usage.compute()
        measures = {
            "downstream_accuracy": self.accuracy.compute(),
            "fve": self.fve.compute(),
            **{name: usage[name] for name in ("l0", "l1", "dead_fraction")},
        }
        for metric in (self.accuracy, self.fve, self.usage):
            metric.reset()
        return {name: value.float() for name, value in measures.items()}


class SparseAutoencoder(pl.LightningModule):
    """Trains an SAE; every epoch of the Trainer it is measured: FVE, L0, L1, dead fraction, downstream accuracy.

    A latent counts as dead when it has not fired for ``patience`` rows.

    Args:
        sae: the SAE to train, in units where ``mean ‖a‖² = M``.
        sparsity: λ of the variant (:meth:`salve.sae.SAE.losses`).
        learning_rate: Adam's; each step takes the share of it that :func:`salve.sae.pace` says.
        head: maps reconstructions ``[N, M]``, in the same units, to logits ``[N, C]``: the classifier behind the site.
            A module moves with this one to its device; it is not trained if its parameters need no gradient.
        auxk: dead latents that also reconstruct the error, at most; 0 for none.
        resample: how many times dead latents begin anew, evenly over the first half of the training; 0 for never. The
            Trainer needs an :class:`ActivationsData` then.
        patience: rows; what a latent is dead after. Needed with ``auxk`` or ``resample``.
        precision: of the products in training; weights, their moments and what is measured stay float32.
        warmup, decay: shares of the steps; see :func:`salve.sae.pace`.
    """

    silent: Tensor

    def __init__(
        self,
        sae: SAE,
        sparsity: float,
        learning_rate: float,
        head: Callable[[Tensor], Tensor],
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
        self._head = head
        self.loss = BatchMean()
        self.measures = Measures(sae)
        if patience:
            self.register_buffer("silent", torch.zeros(sae.dictionary_size, dtype=torch.long))

    def on_fit_start(self) -> None:
        """Prepare this process."""
        keep_freed_memory()

    def on_fit_end(self) -> None:
        """Leave this process as it was."""
        give_freed_memory_back()

    def training_step(self, batch: Sequence[Any], _: int) -> None:
        """The steps of a :class:`salve.activations.Block`, or of one batch ``(rows, …)``.

        Many steps at once, since what Lightning does between two would take as long as a step of a small SAE.
        """
        rows = batch[0]
        sizes = batch.sizes if isinstance(batch, Block) else [len(rows)]
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        total = torch.zeros((), device=self.device)
        for activations in rows.split(sizes):
            loss = self._loss(activations)
            optimizer.zero_grad()
            self.manual_backward(loss * batch_share(len(activations)))
            optimizer.step()
            schedule.step()
            self.sae.normalise_decoder()
            total += loss.detach() * len(activations)
            if self.global_step in self._restarts:
                self._resample()
        self.loss.update(total / max(1, len(rows)), len(rows))
        self.log("loss", self.loss, on_step=False, on_epoch=True)

    def _loss(self, activations: Tensor) -> Tensor:
        """Of one batch; of a rank's part of it."""
        dead = self.silent >= self.patience if self.auxk else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, passed = step_loss(self.sae, activations, self.sparsity, dead, self.auxk)
        if self.patience:
            self.silent.copy_(silence(self.silent, passed.latents.detach(), activations, self.sae.firing_threshold))
        if isinstance(self.sae, BatchTopK):
            latents = passed.latents.detach()
            self.sae.threshold.copy_(learn_threshold(self.sae.threshold, latents, self.global_step))
        return loss

    def _resample(self) -> None:
        trainer: Any = self.trainer
        data: ActivationsData = trainer.datamodule
        # The same on every rank: all hold all rows.
        generator = torch.Generator().manual_seed(pass_seed(data.seed, self.global_step))
        dead = self.silent >= self.patience
        resample(self.sae, trainer.optimizers[0], data.train, dead, self.sparsity, generator)
        self.silent.zero_()

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        """Accumulate the measures."""
        activations, labels = batch
        reconstruction, latents = self.sae(activations)
        self.measures.update(activations, reconstruction, latents, self._head(reconstruction).argmax(dim=1) == labels)

    def on_validation_epoch_end(self) -> None:
        """Log the measures over the whole pass."""
        self.log_dict(self.measures.compute(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam, at a pace."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ActivationsData):  # Lightning counts blocks
            steps = data.schedule.steps
            self._restarts = data.schedule.restarts(self.resample)
        else:
            steps = int(self.trainer.estimated_stepping_batches)
        return adam_at_pace(self.parameters(), self.learning_rate, steps, self.warmup, self.decay)


def adam_at_pace(
    parameters: Iterable[nn.Parameter], learning_rate: float, steps: int, warmup: float, decay: float
) -> tuple[list[Adam], list[LambdaLR]]:
    """Adam for those that want a gradient, and its schedule (:func:`salve.sae.pace`), as Lightning wants them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = Adam(trained, lr=learning_rate)
    # The schedule is also asked for the step after the last.
    schedule = LambdaLR(optimizer, lambda step: pace(min(step, steps - 1), steps, warmup, decay))
    return [optimizer], [schedule]
