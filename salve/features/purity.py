# SPDX-License-Identifier: MIT
"""Purity and entropy: how far a latent stands for one class."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from salve.features.classes import class_means
from salve.metrics import firing
from salve.types import Labels, Latents, UserError


def top_purity(latents: Latents, labels: Labels, num_classes: int, top: int = 10) -> Float[Tensor, " d"]:
    """Share of each latent's ``top`` strongest images, by ``|z_l|``, that belong to their most frequent class.

    If a latent fires for fewer images, only those count; one that fires once is always pure, so look at how often it
    fires too. Chance is at least ``1 / C``, not 0. Of images that tie for the last rank, any may be taken.

    Args:
        latents: ``[N, d]``, zero where a latent does not fire. labels: ``[N]``. num_classes: ``C``.
        top: images per latent.

    Returns:
        ``[d]`` in ``1/C … 1``; NaN for a latent that never fires.
    """
    values, images = latents.abs().topk(min(top, len(latents)), dim=0)
    return label_purity(values, labels[images], num_classes)


def label_purity(values: Float[Tensor, "top d"], labels: Int[Tensor, "top d"], num_classes: int) -> Float[Tensor, " d"]:
    """:func:`top_purity` from the strongest images: their values (0 for no image) and their labels."""
    counts = values.new_zeros(num_classes, values.shape[1])
    counts.scatter_add_(0, labels, (values > 0).to(values.dtype))
    return counts.max(dim=0).values / counts.sum(dim=0)


def class_entropy(latents: Latents, labels: Labels, num_classes: int) -> Float[Tensor, " d"]:
    """Entropy of a latent's distribution over classes, ``−Σ_k p_kl ln p_kl`` in nats.

    ``p_kl`` is the mean of ``|z_l|`` over class ``k``, divided by the sum of these means. Means make classes count
    equally, however many images they have.

    Args:
        latents: ``[N, d]``, zero where a latent does not fire. labels: ``[N]``. num_classes: ``C``.

    Returns:
        ``[d]``: 0 if the latent fires for one class only, ``ln`` of the number of classes with images if all have the
        same mean; NaN for a latent that never fires.
    """
    return entropy(class_means(latents.abs(), labels, num_classes))


def entropy(means: Float[Tensor, "C d"]) -> Float[Tensor, " d"]:
    """:func:`class_entropy` from the class means of ``|z|``; NaN means, of classes without images, are ignored."""
    mass = means.nan_to_num(0.0)
    total = mass.sum(dim=0)
    spread = torch.special.entr(mass / total).sum(dim=0)
    return torch.where(total > 0, spread, torch.nan)


class ClassPurity(Metric):
    """:func:`top_purity` and :func:`class_entropy` over all batches.

    Args:
        dictionary_size: ``d``. num_classes: ``C``. top: images per latent.
        firing_threshold: see :func:`salve.metrics.firing`.

    Raises:
        UserError: ``top`` below 1.
    """

    full_state_update = False
    strongest: Tensor
    mass: Tensor
    images: Tensor

    def __init__(self, dictionary_size: int, num_classes: int, top: int = 10, firing_threshold: float = 0.0) -> None:
        super().__init__()
        if top < 1:
            raise UserError(f"top={top} must be at least 1 image per latent.")
        self.firing_threshold = firing_threshold
        # Values and labels of the strongest images, in one state, so that ranks can reduce both together.
        start = torch.zeros(top, dictionary_size, 2, dtype=torch.float64)
        self.add_state("strongest", start, dist_reduce_fx=_strongest)
        self.add_state("mass", torch.zeros(num_classes, dictionary_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, latents: Tensor, activations: Tensor, labels: Tensor) -> None:
        """Add latents ``[N, d]`` of activations ``[N, M]`` with labels ``[N]``."""
        size = torch.where(firing(latents, activations, self.firing_threshold), latents.double().abs(), 0.0)
        values, images = size.topk(min(len(self.strongest), len(size)), dim=0)
        found = torch.stack([values, labels[images].double()], dim=2)
        missing = len(self.strongest) - len(found)
        found = F.pad(found, (0, 0, 0, 0, 0, missing))
        self.strongest = _strongest(torch.stack([self.strongest, found]))
        self.mass.index_add_(0, labels, size)
        self.images.index_add_(0, labels, torch.ones_like(size[:, 0]))

    def compute(self) -> dict[str, Tensor]:
        """``purity``, ``purity_images`` (how many images it is computed from) and ``entropy``, each ``[d]``."""
        values, labels = self.strongest.unbind(dim=2)
        return {
            "purity": label_purity(values, labels.long(), len(self.mass)),
            "purity_images": (values > 0).sum(dim=0),
            "entropy": entropy(self.mass / self.images[:, None]),
        }


def _strongest(candidates: Float[Tensor, "parts top d 2"]) -> Float[Tensor, "top d 2"]:
    """Merge lists of (value, label) into one of the strongest, for each latent."""
    flat = candidates.flatten(0, 1)
    order = flat[..., 0].topk(candidates.shape[1], dim=0).indices
    return flat.gather(0, order[..., None].expand(-1, -1, 2))
