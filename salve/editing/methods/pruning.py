# SPDX-License-Identifier: MIT
"""Pruning: zero the channels that matter to a class and not to others (COAR-Edit)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salve.backbones.cut import Cut
from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Affine, Change
from salve.editing.methods.directions import drawing
from salve.types import UserError

#: ``attribution``: by Welch's t of attributions; ``mean``: by the class's mean activation less that of all images;
#: ``random``: drawn.
Choice: TypeAlias = Literal["attribution", "random", "mean"]


@dataclass(frozen=True)
class Pruning(Method):
    """``a' = g ⊙ a`` with ``g_j = 0`` for the ``⌈α M / 100⌉`` channels of the largest score, and 1 for the others.

    The score is Welch's ``t = (m₁ − m₀) / √(s₁²/n₁ + s₀²/n₀)`` of a channel's attributions, between images of the
    target and others. The attribution is the channel's effect on the lead ``m`` of the image's own class. The paper
    estimates it by regression on random ablations; here it is the effect to first order, ``a_j ∂m/∂a_j``, which is
    exact at the head as long as the strongest other class stays the same. Permanent as scaled input channels.

    Attributes:
        choose: see :data:`Choice`; the last two are controls.
    """

    choose: str = "attribution"

    source: ClassVar[str] = "Shah et al. 2024 (arXiv 2404.11534), COAR-Edit"
    full_size: ClassVar[str] = "one per cent of the channels, rounded up, is zero; at 100, all are"
    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.choose not in get_args(Choice):
            raise UserError(f"choose={self.choose} of pruning is unknown; choose {', '.join(get_args(Choice))}.")

    @property
    def draws(self) -> bool:
        """See :class:`Method`."""
        return self.choose == "random"

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        return closing(self.scores(fitting, target), fitting.cut)

    def scores(self, fitting: Fitting, target: Target) -> Float[Tensor, " M"]:
        """The score of each channel, float64; the largest are pruned first."""
        fitting.refuse_absent(target)
        if self.choose == "mean":
            return fitting.own_mean(target) - fitting.mean
        if self.choose == "random":
            return torch.rand(fitting.cut.site.width, generator=drawing(fitting, target)).double()
        found, labels = fitting.attributions
        mine = torch.isin(labels, torch.tensor(target.classes))
        if min(int(mine.sum()), int((~mine).sum())) < 2:
            raise UserError(f"Pruning needs two train images of {target.name} and two others, and there are fewer.")
        return welch(found, mine)


def closing(scores: Float[Tensor, " M"], cut: Cut) -> FittedEdit:
    """The edit that zeroes the channels with the largest scores, α per cent of them, rounded up."""
    order = scores.argsort(descending=True, stable=True)

    def closed(alpha: float) -> int:
        return math.ceil(alpha * len(scores) / 100 - 1e-9)

    def at(alpha: float) -> Change:
        gate = torch.ones_like(scores)
        gate[order[: closed(alpha)]] = 0
        return Affine(gate=gate).change(cut.model, cut.site)

    return FittedEdit(at, strongest=100.0, steps=closed)


def welch(rows: Float[Tensor, "N M"], mine: Bool[Tensor, " N"]) -> Float[Tensor, " M"]:
    """Welch's ``t`` of each column between two parts of the rows, float64; 0 where nothing varies.

    Args:
        rows: such as attributions. mine: the part whose larger means count as positive; the rest is the other.
    """
    (own, own_error), (other, other_error) = (_mean_and_error(rows[part].double()) for part in (mine, ~mine))
    return ((own - other) / (own_error + other_error).sqrt()).nan_to_num(0.0)


def _mean_and_error(rows: Float[Tensor, "N M"]) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """The mean, and the variance of the mean."""
    return rows.mean(dim=0), rows.var(dim=0) / len(rows)
