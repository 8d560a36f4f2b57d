"""The formulas as torchmetrics, for data that comes in batches and on several devices."""

import torch
from torch import Tensor
from torchmetrics import Metric

from salve.metrics.functional import explained, firing, kl_divergence


class BatchMean(Metric):
    """Mean over all rows of what comes as one mean per batch.

    NaN stays NaN, so that a divergence is seen; torchmetrics' own mean drops it, or with it the counts.
    """

    full_state_update = False
    count: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, count: int) -> None:
        """Add the mean over ``count`` rows; the mean over none says nothing."""
        if count:
            self.total = self.total + mean * count
            self.count += count

    def compute(self) -> Tensor:
        """Scalar; NaN if there were no rows."""
        return self.total / self.count


class FractionOfVarianceExplained(Metric):
    """FVE over all batches (see :func:`salve.metrics.fraction_of_variance_explained`).

    Moments are kept in float64.

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
        x, x_hat = x.double(), x_hat.double()
        self.count += x.shape[0]
        self.total += x.sum(dim=0)
        self.squares += x.square().sum(dim=0)
        self.residual += (x - x_hat).square().sum()

    def compute(self) -> Tensor:
        """Scalar FVE."""
        variance = (self.squares - self.total.square() / self.count.clamp_min(1)).clamp_min(0).sum()
        return explained(self.residual, variance)


class LatentUsage(Metric):
    """How latents are used over a whole pass: L0, mean L1 and the share of dead latents.

    Args:
        dictionary_size: ``d``.
        negligible: see :func:`salve.metrics.firing`.
    """

    full_state_update = False
    count: Tensor
    fires: Tensor
    l1: Tensor

    def __init__(self, dictionary_size: int, negligible: float = 0.0) -> None:
        super().__init__()
        self.negligible = negligible
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fires", torch.zeros(dictionary_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("l1", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor, activations: Tensor) -> None:
        """Add latents ``[N, d]`` of activations ``[N, M]``."""
        self.count += latents.shape[0]
        self.fires += firing(latents, activations, self.negligible).sum(dim=0)
        self.l1 += latents.double().abs().sum()

    def compute(self) -> dict[str, Tensor]:
        """``l0`` and ``l1`` per image, ``dead_fraction`` of the latents, and each latent's firing ``frequency [d]``."""
        count = self.count.clamp_min(1)
        return {
            "l0": self.fires.sum() / count,
            "l1": self.l1 / count,
            "dead_fraction": (self.fires == 0).double().mean(),
            "frequency": self.fires / count,
        }


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
