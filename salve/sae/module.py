"""Training an SAE with Lightning on activations that are already in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from salve.metrics import FractionOfVarianceExplained, LatentUsage
from salve.sae.losses import sae_loss
from salve.sae.models import SAE


class Rows(Dataset[Tensor]):
    """The rows of one or more tensors of equal length, fetched a batch at a time instead of row by row."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """What DataLoader asks for: the whole batch in one indexing operation."""
        rows = torch.as_tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


def rows_loader(*tensors: Tensor, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """A DataLoader over tensor rows without per-row work."""
    return DataLoader(Rows(*tensors), batch_size, shuffle=shuffle, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


class ActivationsData(pl.LightningDataModule):
    """Activations as a DataModule: training rows, and validation rows with their labels.

    Args:
        train: ``[N, M]``. val: ``[N', M]``. val_labels: ``[N']``. batch_size: rows per step.
    """

    def __init__(self, train: Tensor, val: Tensor, val_labels: Tensor, batch_size: int) -> None:
        super().__init__()
        self.train, self.val, self.val_labels = train, val, val_labels
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled rows."""
        return rows_loader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows with labels, in order."""
        return rows_loader(self.val, self.val_labels, batch_size=max(self.batch_size, 4096))


class SparseAutoencoder(pl.LightningModule):
    """Trains an SAE and measures it every epoch: FVE, L0, L1, dead fraction and downstream accuracy.

    Args:
        sae: the SAE to train, in units where ``mean ‖a‖² = M``.
        sparsity: λ of :func:`salve.sae.losses.sae_loss`.
        learning_rate: Adam's; annealed to zero by a cosine over all steps.
        head: maps reconstructions ``[N, M]``, in the same units, to logits ``[N, C]``: the classifier behind the site.
            A module moves with this one to its device; it is not trained if its parameters need no gradient.
    """

    def __init__(self, sae: SAE, sparsity: float, learning_rate: float, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sae = sae
        self.sparsity = sparsity
        self.learning_rate = learning_rate
        self._head = head
        self.fve = FractionOfVarianceExplained(sae.width)
        self.usage = LatentUsage(sae.dictionary_size, sae.negligible)

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        """The loss of one batch."""
        reconstruction, latents = self.sae(batch[0])
        loss = sae_loss(batch[0], reconstruction, latents, self.sparsity)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, then the decoder's columns back to unit norm."""
        super().optimizer_step(*args, **kwargs)
        self.sae.normalise_decoder()

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        """Accumulate the measures."""
        activations, labels = batch
        reconstruction, latents = self.sae(activations)
        self.fve.update(activations, reconstruction)
        self.usage.update(latents, activations)
        right = (self._head(reconstruction).argmax(dim=1) == labels).float().mean()
        self.log("downstream_accuracy", right, batch_size=len(labels), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the measures over the whole pass."""
        usage = self.usage.compute()
        measures = {"fve": self.fve.compute(), **{name: usage[name] for name in ("l0", "l1", "dead_fraction")}}
        self.log_dict({name: value.float() for name, value in measures.items()})
        self.fve.reset()
        self.usage.reset()

    def configure_optimizers(self) -> Any:
        """Adam with a cosine to zero."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
