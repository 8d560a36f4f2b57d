# SPDX-License-Identifier: MIT
"""Rank-one edits: store one new pair of key and value in the layer that reads a site (ROME, AlphaEdit)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.stored import (
    Lead,
    Pair,
    edit_of,
    least_disturbing,
    refuse_obstacle,
    refuse_unreached,
)
from salve.types import UserError


@dataclass(frozen=True)
class _Stored(Method):
    """``W' = W + α Λ rᵀ`` with ``rᵀ k = 1`` for the key ``k``, the class's mean activation over all rows.

    At the head ``Λ`` lowers the class's own logit by its mean lead. Elsewhere ``Λ`` lies in the outputs of the readers,
    and a few re-linearised gradient steps find the one that ends the class's lead. At a convolution the centre tap
    changes, so that the output at ``p`` moves by ``Λ rᵀ a(p)``.

    Attributes:
        images: train images of each class that the steps see; steps: at most so many. Neither is used at the head.
    """

    images: int = 16
    steps: int = 20

    full_size: ClassVar[str] = "the class no longer leads, in the mean over its train images (a sample at inner sites)"
    needs_images: ClassVar[bool] = True
    name: ClassVar[str]

    def __post_init__(self) -> None:
        for setting in ("images", "steps"):
            if getattr(self, setting) < 1:
                raise UserError(f"{setting}={getattr(self, setting)} of {self.name} must be 1 or more.")

    @abstractmethod
    def row(self, fitting: Fitting, target: Target) -> Float[Tensor, " M"]:
        """``r``, float64.

        Raises:
            UserError: the target or the site has none.
        """

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut = fitting.cut
        refuse_obstacle(cut.model, cut.site, self.name)
        row = self.row(fitting, target)
        if cut.linear is not None:
            value = torch.zeros(len(cut.model.get_parameter(cut.site.readers[0].weight)), dtype=torch.float64)
            value[cut.order[list(target.classes)]] = -fitting.lead(target)
            return edit_of(cut.model, [Pair(cut.site, value, row)])
        lead = Lead(fitting, cut, target, self.images)
        goal = lead.now - lead.unit
        pair, reached = lead.lowering(row, goal, self.steps)
        refuse_unreached(cut.site, target, self.name, reached, lead.now, goal)
        return edit_of(cut.model, [pair])


@dataclass(frozen=True)
class RankOne(_Stored):
    """ROME: ``r = C⁻¹k / (kᵀ C⁻¹ k)`` with ``C = E[a aᵀ] + ρ I``.

    Of all weights that store the pair, these change the outputs least in the mean over train activations. The paper
    finds the value with Adam and a penalty; see :class:`_Stored` for what is done here.

    Attributes:
        ridge: ``ρ`` as a share of the mean square of a channel.
    """

    ridge: float = 1e-4

    source: ClassVar[str] = "Meng et al. 2022 (arXiv 2202.05262), ROME"
    name: ClassVar[str] = "rank_one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise UserError(f"ridge={self.ridge:g} of a rank-one edit must be above 0.")

    def row(self, fitting: Fitting, target: Target) -> Float[Tensor, " M"]:
        """``r``, float64, so that ``rᵀ k = 1``."""
        return least_disturbing(fitting.own_mean(target), fitting.second_moment, self.ridge, fitting.cut.site)


@dataclass(frozen=True)
class NullSpace(_Stored):
    """AlphaEdit: ``r = P k / (kᵀ P k)``, where ``P`` projects on what the other classes' activations leave free.

    The paper's ``Δ = R kᵀP (k kᵀP + λ I)⁻¹`` for one key and no earlier edits is ``R kᵀP / (λ + kᵀPk)``, which stores
    the pair as ``λ → 0``. ``P`` is made of the eigenvectors of the other classes' second moment with small eigenvalues.

    Attributes:
        threshold: the largest eigenvalue that counts as small, as a share of the mean eigenvalue.
    """

    threshold: float = 0.1

    source: ClassVar[str] = "Fang et al. 2024 (arXiv 2410.02355), AlphaEdit"
    name: ClassVar[str] = "null_space"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise UserError(f"threshold={self.threshold:g} of null_space must be above 0.")

    def row(self, fitting: Fitting, target: Target) -> Float[Tensor, " M"]:
        """``r``, float64, so that ``rᵀ k = 1``."""
        key, where = fitting.own_mean(target), f"at the site {fitting.cut.site.name}"
        mine = torch.isin(fitting.labels, torch.tensor(target.classes))
        if bool(mine.all()):
            raise UserError(f"{target.name} has all train images, so that there are no others to spare.")
        own = fitting.rows[mine].double()
        others = (len(mine) * fitting.second_moment - own.T @ own) / int((~mine).sum())
        values, vectors = torch.linalg.eigh(others)
        free = vectors[:, values < self.threshold * values.mean()]
        if not free.shape[1]:
            raise UserError(
                f"The other classes leave no direction free {where} for null_space; raise threshold={self.threshold:g}."
            )
        seen = free.T @ key
        if not float(seen @ seen) > 1e-10 * float(key @ key):
            raise UserError(f"{target.name} has nothing in what the other classes leave free {where} for null_space.")
        return free @ seen / (seen @ seen)
