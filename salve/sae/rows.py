"""Activations on their way into a training."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from salve.data.ranks import RankBatches


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
        rows = torch.as_tensor(indices, dtype=torch.long)  # an empty list has no type of its own
        return tuple(tensor[rows] for tensor in self.tensors)


def rows_loader(*tensors: Tensor, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """A DataLoader over tensor rows without per-row work; a rank gets its part of each batch, which may be empty."""
    rows = Rows(*tensors)
    return DataLoader(rows, batch_sampler=RankBatches(len(rows), batch_size, shuffle), collate_fn=_as_is)


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


class EpochsData(ActivationsData):
    """Activations for an ensemble: a training batch is the whole split ``[N, M]``, in order."""

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch; each member has its own order of rows."""
        whole: Any = [self.train]
        return DataLoader(whole, batch_size=None)
