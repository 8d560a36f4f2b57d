# SPDX-License-Identifier: MIT
"""Directional ablation: take each activation's own component along a direction."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from salve.editing.methods.base import FittedEdit, Fitting, Target
from salve.editing.methods.change import Affine, Change
from salve.editing.methods.directions import AlongDirection, directions


@dataclass(frozen=True)
class Ablation(AlongDirection):
    """``a' = a − α U Uᵀ a`` with an orthonormal basis ``U`` of the directions; permanent as ``W (I − α U Uᵀ)``.

    At α = 1 the directions are projected out; beyond, the component changes its sign.

    Attributes:
        direction: see :data:`.directions.Direction`.
    """

    source: ClassVar[str] = "Arditi et al. 2024 (arXiv 2406.11717)"
    full_size: ClassVar[str] = "each image's component along the direction is taken"

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        found = directions(fitting, target, self.direction, "ablation").double()
        basis, sizes, _ = torch.linalg.svd(found.T, full_matrices=False)
        basis = basis[:, sizes > 1e-6 * sizes.max().clamp_min(1e-30)]  # columns that are parallel count once

        def at(alpha: float) -> Change:
            return Affine(left=alpha * basis, right=basis).change(fitting.cut.model, fitting.cut.site)

        return FittedEdit(at)
