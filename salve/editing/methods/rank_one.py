"""Rank-one edits: lower a class's logit at its mean activation, and change what the readers else read least (ROME)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Change, Weights
from salve.types import UserError


@dataclass(frozen=True)
class RankOne(Method):
    """ROME: store one new pair of key and value in a linear layer, ``W' = W + α Λ rᵀ`` with ``r = C⁻¹k / (kᵀ C⁻¹ k)``.

    The key ``k`` is the class's mean activation, and ``C = E[a aᵀ] + ρ I``. Of all weights that store the pair, these
    change the outputs least in the mean over train activations. At the head ``Λ`` lowers the class's own logit by its
    mean lead.

    Attributes:
        ridge: ``ρ`` as a share of the mean square of a channel.
    """

    ridge: float = 1e-4

    source: ClassVar[str] = "Meng et al. 2022 (arXiv 2202.05262)"
    full_size: ClassVar[str] = "at its mean activation the class no longer leads"

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise UserError(f"ridge={self.ridge:g} of a rank-one edit must be above 0.")

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut = fitting.cut
        if cut.linear is None:
            raise UserError(f"A rank-one edit is one of the head so far, and not of the site {cut.site.name}.")
        (reader,) = cut.site.readers
        row = self.row(fitting, target)
        weight = cut.model.state_dict()[reader.weight]
        lead, units = fitting.lead(target), cut.order[list(target.classes)].to(weight.device)

        def at(alpha: float) -> Change:
            def weights() -> Weights:
                changed = weight.double().clone()
                changed[units] -= (alpha * lead * row).to(changed).view(1, -1, *[1] * (weight.ndim - 2))
                return {reader.weight: changed.to(weight)}

            return Change(weights=weights)

        return FittedEdit(at, strongest=1e4)

    def row(self, fitting: Fitting, target: Target) -> Float[Tensor, " M"]:
        """``r``, float64, so that ``rᵀ k = 1``."""
        key, moment = fitting.own_mean(target), fitting.second_moment.clone()
        moment.diagonal().add_(self.ridge * moment.diagonal().mean())
        solved = torch.cholesky_solve(key[:, None], torch.linalg.cholesky(moment))[:, 0]
        return solved / (solved @ key)
