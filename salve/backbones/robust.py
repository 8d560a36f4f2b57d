# SPDX-License-Identifier: MIT
"""Group DRO: train for the group with the largest loss (Sagawa et al. 2020, arXiv 1911.08731)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from salve.backbones.classifier import Classifier
from salve.distributed import rank_and_world_size, total


def raised(
    weights: Float[Tensor, " G"], losses: Float[Tensor, " G"], present: Bool[Tensor, " G"], step: float
) -> Float[Tensor, " G"]:
    """The groups' weights after a step of exponentiated gradient ascent: ``q_g ∝ q_g exp(η ℓ_g)``.

    Args:
        weights: ``q``, which add up to 1. losses: ``ℓ``, the mean of each group in a batch.
        present: which groups the batch has; the weight of another one changes only in that all add up to 1.
        step: ``η``.
    """
    grown = weights * torch.where(present, (step * losses).exp(), 1.0)
    return grown / grown.sum()


class RobustClassifier(Classifier):
    """Train a classifier by group DRO; a batch has the numbers of the images' groups in place of their labels.

    After each batch the weights ``q`` of the groups rise with their losses (:func:`raised`), and the network is trained
    on ``Σ_g q_g ℓ_g``. All else is as in :class:`Classifier`.

    Args:
        model, order, learning_rate, weight_decay, label_smoothing, warmup: see there.
        values: V; group ``g`` is of the class ``g // V``.
        step: ``η``, of the weights.
    """

    group_weights: Tensor

    def __init__(
        self,
        model: nn.Module,
        order: Tensor,
        learning_rate: float,
        weight_decay: float,
        label_smoothing: float = 0.1,
        warmup: float = 0.1,
        *,
        values: int,
        step: float,
    ) -> None:
        super().__init__(model, order, learning_rate, weight_decay, label_smoothing, warmup)
        groups = len(order) * values
        self.values, self.step = values, step
        self.register_buffer("group_weights", torch.full((groups,), 1 / groups))
        self._each = nn.CrossEntropyLoss(reduction="none", label_smoothing=label_smoothing)

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        """The weighted sum of the groups' losses; of this rank's share of it if there are several ranks."""
        logits, groups = self._seen(batch)
        labels, count = groups // self.values, len(self.group_weights)
        sums = logits.new_zeros(count, dtype=torch.float32) + 0 * logits.float().sum()
        if len(groups):
            losses = self._each(logits, labels).float()
            sums = sums.index_add(0, groups, losses)
            self._follow("train", losses.detach().mean(), logits, labels)
        else:
            self._follow("train", 0 * logits.detach().sum(), logits, labels)
        of_group = torch.bincount(groups, minlength=count).to(sums)
        all_sums, all_counts = total(torch.stack([sums.detach(), of_group]))
        present, images = all_counts > 0, all_counts.clamp_min(1)
        self.group_weights.copy_(raised(self.group_weights, all_sums / images, present, self.step))
        _, ranks = rank_and_world_size()
        return ranks * (self.group_weights.clone() * sums / images).sum()
