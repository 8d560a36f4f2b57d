# SPDX-License-Identifier: MIT
"""Steering: move every activation by a constant, away from a direction."""

from dataclasses import dataclass
from typing import ClassVar

from salve.editing.methods.base import FittedEdit, Fitting, Target
from salve.editing.methods.change import Affine, Change
from salve.editing.methods.directions import AlongDirection, directions


@dataclass(frozen=True)
class Steering(AlongDirection):
    """Activation addition, ``a' = a − α Σ_i (u_iᵀ μ) u_i`` with the mean activation ``μ`` of the target's classes.

    The papers add a constant multiple of a direction; here its unit is what the class has of the direction, so that
    α = 1 takes that away in the mean. Behind a linear reader ``W a' + b = W a + (b − W q)``: only the bias changes. It
    has no permanent form at a convolution that pads, or whose bias there is none.

    Attributes:
        direction: see :data:`.directions.Direction`.
    """

    source: ClassVar[str] = "Turner et al. 2023 (arXiv 2308.10248)"
    full_size: ClassVar[str] = "the class's mean component along the direction is taken from every image"

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        units = directions(fitting, target, self.direction, "steering").double()
        shift = (units @ fitting.own_mean(target)) @ units  # Σ (uᵀ μ) u

        def at(alpha: float) -> Change:
            return Affine(shift=-alpha * shift).change(fitting.cut.model, fitting.cut.site)

        return FittedEdit(at)
