# SPDX-License-Identifier: MIT
"""The formulas as torchmetrics, which accumulate over batches and ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric

from salve.metrics.functional import (
    downstream_measures,
    downstream_totals,
    explained,
    kl_divergence,
    reconstruction_cosine,
)

#: Rows of which float64 copies are made at once, where sums do not depend on it.
ROWS = 1024


class BatchMean(Metric):
    """Mean over all rows, from the mean of each batch. NaN stays NaN, so that a divergence is seen.

    torchmetrics' ``MeanMetric`` cannot replace it: by default it refuses or drops NaN, and with
    ``nan_strategy="disable"`` it ignores the batch sizes (Lightning-AI/torchmetrics#3434).
    """

    full_state_update = False
    count: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, count: int) -> None:
        """Add the mean over ``count`` rows; with a count of 0 it is ignored."""
        if count:
            self.total = self.total + mean * count
            self.count += count

    def compute(self) -> Tensor:
        """Scalar; NaN if there were no rows."""
        return self.total / self.count


class FractionOfVarianceExplained(Metric):
    """FVE over all batches (see :func:`salve.metrics.fraction_of_variance_explained`).

    Accumulates moments in float64.

    Args:
        width: ``M``.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor
    residual: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("residual", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add ``[N, M]`` activations and their reconstructions."""
        self.count += x.shape[0]
        # One float64 copy at a time: five of them would be most of the memory that a training from disk takes.
        copy = x.to(torch.float64, copy=True)
        self.total += copy.sum(dim=0)
        self.squares += copy.square_().sum(dim=0)
        copy.copy_(x)
        for error, reconstruction in zip(copy.split(ROWS), x_hat.split(ROWS), strict=True):
            error -= reconstruction
        self.residual += copy.square_().sum()

    def compute(self) -> Tensor:
        """Scalar FVE."""
        variance = (self.squares - self.total.square() / self.count.clamp_min(1)).clamp_min(0).sum()
        return explained(self.residual, variance)


class ReconstructionCosine(Metric):
    """Mean over all rows of the cosine between activation and reconstruction.

    See :func:`salve.metrics.reconstruction_cosine`.
    """

    full_state_update = False
    count: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add ``[N, M]`` activations and their reconstructions."""
        self.count += len(x)
        parts = zip(x.split(ROWS), x_hat.split(ROWS), strict=True)
        self.total += torch.cat([reconstruction_cosine(a.double(), b.double()) for a, b in parts]).sum()

    def compute(self) -> Tensor:
        """Scalar in −1 … 1; NaN if there were no rows."""
        return self.total / self.count


class Downstream(Metric):
    """What a classifier loses when its head reads reconstructions, over all batches.

    See :func:`salve.metrics.downstream`.
    """

    full_state_update = False
    count: Tensor
    right: Tensor
    kl: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("right", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("kl", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, original: Tensor, reconstructed: Tensor, zero: Tensor, mean: Tensor) -> None:
        """Add labels ``[N]`` and logits ``[N, C]``; ``zero`` and ``mean`` may be ``[1, C]``."""
        right, kl = downstream_totals(labels, original, reconstructed, zero, mean)
        self.count += len(labels)
        self.right += right
        self.kl += kl

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name; NaN if there were no images."""
        return downstream_measures(self.count, self.right, self.kl)


class PredictiveDrift(Metric):
    """Mean KL from the original's to the edited model's predictive distribution, per true class ``[C]``, in nats."""

    full_state_update = False
    count: Tensor
    total: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, original: Tensor, edited: Tensor, labels: Tensor) -> None:
        """Add logits ``[N, C]`` of both models and labels ``[N]``."""
        kl = kl_divergence(original.double(), edited.double())
        self.count.index_add_(0, labels, torch.ones_like(kl))
        self.total.index_add_(0, labels, kl)

    def compute(self) -> Tensor:
        """``[C]``; NaN for a class without images."""
        return self.total / self.count
