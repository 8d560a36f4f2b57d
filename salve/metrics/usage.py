# SPDX-License-Identifier: MIT
"""How often and how strongly latents fire over a whole pass."""

import torch
from torch import Tensor
from torchmetrics import Metric

from salve.metrics.functional import ALMOST_DEAD, DENSE, firing, relative_magnitude_histogram, usage_fractions
from salve.types import UserError


class LatentUsage(Metric):
    """L0, mean L1, and the shares of dead, almost dead and dense latents, over a whole pass.

    Args:
        dictionary_size: ``d``.
        firing_threshold: see :func:`salve.metrics.firing`.
        almost_dead, dense: shares of images, see :func:`salve.metrics.usage_fractions`.

    Raises:
        UserError: unless ``0 ≤ almost_dead ≤ dense ≤ 1``.
    """

    full_state_update = False
    count: Tensor
    fires: Tensor
    l1: Tensor

    def __init__(
        self,
        dictionary_size: int,
        firing_threshold: float = 0.0,
        almost_dead: float = ALMOST_DEAD,
        dense: float = DENSE,
    ) -> None:
        super().__init__()
        if not 0 <= almost_dead <= dense <= 1:
            raise UserError(
                f"almost_dead={almost_dead} and dense={dense} are shares of images: 0 ≤ almost_dead ≤ dense ≤ 1."
            )
        self.firing_threshold, self.almost_dead, self.dense = firing_threshold, almost_dead, dense
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fires", torch.zeros(dictionary_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("l1", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor, activations: Tensor) -> None:
        """Add latents ``[N, d]`` of activations ``[N, M]``."""
        self.count += latents.shape[0]
        self.fires += firing(latents, activations, self.firing_threshold).sum(dim=0)
        self.l1 += latents.to(torch.float64, copy=True).abs_().sum()

    def compute(self) -> dict[str, Tensor]:
        """The measures by name; NaN if there were no images.

        Returns:
            Scalars ``l0`` and ``l1`` per image, ``dead_fraction``, ``almost_dead_fraction`` and ``dense_fraction`` of
            the latents; and each latent's firing ``frequency [d]``.
        """
        frequency = self.fires / self.count
        return {
            "l0": self.fires.sum() / self.count,
            "l1": self.l1 / self.count,
            **usage_fractions(frequency, self.almost_dead, self.dense),
            "frequency": frequency,
        }


class ActivationHistogram(Metric):
    """Histogram of each latent's size where it fires, over a whole pass.

    The size is ``|z_l| / ‖a‖`` (see :func:`salve.metrics.relative_magnitude_histogram`). The edges are fixed and evenly
    spaced in its logarithm.

    Args:
        dictionary_size: ``d``. firing_threshold: see :func:`salve.metrics.firing`.
        low, high: the first and last edge. One bin below and one above count everything outside.
        bins: number of bins between them. Default: ten per decade.

    Raises:
        UserError: unless ``0 < low < high`` and ``bins ≥ 1``.
    """

    full_state_update = False
    counts: Tensor
    edges: Tensor

    def __init__(
        self, dictionary_size: int, firing_threshold: float = 0.0, low: float = 1e-4, high: float = 10.0, bins: int = 50
    ) -> None:
        super().__init__()
        if not (0 < low < high and bins >= 1):
            raise UserError(f"A histogram needs 0 < low < high and bins ≥ 1, not low={low}, high={high}, bins={bins}.")
        self.firing_threshold = firing_threshold
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        self.register_buffer("edges", low * (high / low) ** edges, persistent=False)
        self.add_state("counts", torch.zeros(dictionary_size, bins + 2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, latents: Tensor, activations: Tensor) -> None:
        """Add latents ``[N, d]`` of activations ``[N, M]``."""
        self.counts += relative_magnitude_histogram(latents, activations, self.edges, self.firing_threshold)

    def compute(self) -> dict[str, Tensor]:
        """``counts [d, bins + 2]``, the first bin below and the last above the ``edges [bins + 1]``."""
        return {"counts": self.counts, "edges": self.edges}
