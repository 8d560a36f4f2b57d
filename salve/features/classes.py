# SPDX-License-Identifier: MIT
"""Which latents the classes depend on (docs/method.md)."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from salve.features.effects import effect_scores
from salve.settings import Selection
from salve.types import Labels, Latents, UserError

Kind = Literal["class-defining", "cross-class", "diffuse", "dead"]


def class_means(latents: Latents, labels: Labels, num_classes: int) -> Float[Tensor, "C d"]:
    """Class-conditional mean ``μ_k = mean_{n ∈ class k} z_n`` (Flovik 2025).

    Args:
        latents: ``[N, d]``. labels: ``[N]``, each in ``0 … C−1``. num_classes: ``C``.

    Returns:
        ``[C, d]``; the row of a class without images is NaN.
    """
    total = torch.zeros(num_classes, latents.shape[1], dtype=latents.dtype, device=latents.device)
    total.index_add_(0, labels, latents)
    return total / torch.bincount(labels, minlength=num_classes)[:, None]


class ClassMeans(Metric):
    """:func:`class_means` over all batches, with sums in float64.

    Args:
        dictionary_size: ``d``. num_classes: ``C``.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, dictionary_size: int, num_classes: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_classes, dictionary_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Add latents ``[N, d]`` with labels ``[N]``."""
        self.total.index_add_(0, labels, latents.double())
        self.images += torch.bincount(labels, minlength=len(self.images))

    def compute(self) -> Tensor:
        """``[C, d]``; the row of a class without images is NaN. With one class and one latent, a scalar."""
        return self.total / self.images[:, None]


def shares(means: Float[Tensor, "C d"]) -> Float[Tensor, "C d"]:
    """``|μ_kl| / Σ_k' |μ_k'l|``: each class's share of a latent; 0 for a dead latent or an empty class."""
    size = means.nan_to_num(0.0).abs()
    total = size.sum(dim=0)
    return size / torch.where(total > 0, total, torch.ones_like(total))


def kinds(means: Float[Tensor, "C d"], threshold: float = 0.5) -> list[Kind]:
    """The kind of each latent, from the classes' shares of it.

    Class-defining: exactly one class has a share of at least τ. Cross-class: otherwise, if two or more classes have
    shares of at least τ/2. Dead: every class mean is zero. Diffuse: the rest.

    Args:
        means: ``[C, d]``. threshold: τ in (0, 1].

    Returns:
        A kind for each of the ``d`` latents.
    """
    share = shares(means)
    owners, sharers = (share >= threshold).sum(dim=0), (share >= threshold / 2).sum(dim=0)
    dead = share.sum(dim=0) == 0
    return [
        "dead" if is_dead else "class-defining" if own == 1 else "cross-class" if sharing >= 2 else "diffuse"
        for is_dead, own, sharing in zip(dead.tolist(), owners.tolist(), sharers.tolist(), strict=True)
    ]


def margins(means: Float[Tensor, "C d"]) -> Float[Tensor, "C d"]:
    """``|μ_kl| − max_{k'≠k} |μ_k'l|``: how far class ``k`` leads on latent ``l``; with one class, ``|μ_kl|``."""
    size = means.nan_to_num(0.0).abs()
    if size.shape[0] == 1:
        return size
    best, second = size.topk(2, dim=0).values
    # The leader is compared with the second, all others with the leader; on a tie both are zero.
    return torch.where(size == best, size - torch.where(best == second, best, second), size - best)


def select_latents(
    means: Float[Tensor, "C d"],
    by: Selection = "margin",
    fires: Bool[Tensor, " d"] | None = None,
    effects: Float[Tensor, "C d"] | None = None,
) -> Int[Tensor, " C"]:
    """Choose the latent with which each class is edited.

    Args:
        means: ``[C, d]``.
        by: ``largest`` takes the largest ``|μ_kl|`` (paper), ``margin`` the largest margin, and ``effect`` the largest
            effect on the class's own logit less that on the others (:func:`salve.features.effect_scores`).
        fires: ``[d]``, which latents fire for any image; others are not chosen. None allows all latents with a mean
            other than zero.
        effects: ``[C, d]``, for ``effect``; see :func:`salve.features.class_effects`.

    Returns:
        ``[C]`` latent indices; −1 for a class without images, or for which no latent fires.

    Raises:
        UserError: ``effect`` without effects.
    """
    if by == "effect" and effects is None:
        raise UserError("by=effect chooses by the latents' effects, which must be given.")
    size = means.nan_to_num(0.0).abs()
    possible = size > 0  # a latent with mean zero for all classes would have a margin of 0
    if fires is not None:
        possible &= fires
    if effects is not None and by == "effect":
        preference = effect_scores(effects).nan_to_num(-torch.inf)
    else:
        preference = size if by == "largest" else margins(means)
    score = torch.where(possible, preference, -torch.inf)
    unknown = means.isnan().any(dim=1) | ~possible.any(dim=1)
    return torch.where(unknown, -1, score.argmax(dim=1))
