# SPDX-License-Identifier: MIT
"""Store a pair of key and value in the readers of a site: what the rank-one edits (ROME and after) share.

All readers of the site count as one layer, whose outputs lie side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.cut import Cut
from salve.backbones.graph import GraphTail
from salve.backbones.site import Site
from salve.editing.methods.base import FittedEdit, Fitting, Target, lead_and_unit
from salve.editing.methods.change import Change, Weights
from salve.types import UserError

#: The share of the way that a value may leave; below it, steps stop.
_CLOSE = 1e-3


@dataclass(frozen=True, eq=False)
class Pair:
    """A change ``Λ rᵀ`` of the readers of a site; at a convolution, of the centre tap.

    Attributes:
        site: where. value: ``Λ`` ``[Σ out]``, of all readers in turn. row: ``r`` ``[M]``.
    """

    site: Site
    value: Float[Tensor, " O"]
    row: Float[Tensor, " M"]

    def weights(self, model: nn.Module, alpha: float = 1.0) -> Weights:
        """``W + α Λ rᵀ`` of each reader, computed in float64; gradients flow to the value."""
        found: Weights = {}
        state, start = model.state_dict(), 0
        for reader in self.site.readers:
            weight = state[reader.weight]
            centre = (slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))
            part = self.value[start : start + len(weight)].to(weight.device, torch.float64)
            changed = weight.double().clone()
            changed[centre] += torch.outer(alpha * part, self.row.to(part))
            found[reader.weight] = changed.to(weight)
            start += len(weight)
        return found


def edit_of(model: nn.Module, pairs: Sequence[Pair]) -> FittedEdit:
    """The edit that stores pairs at different sites, each scaled by α."""

    def at(alpha: float) -> Change:
        return Change(weights=lambda: {name: w for pair in pairs for name, w in pair.weights(model, alpha).items()})

    return FittedEdit(at, strongest=1e4)


def obstacle(model: nn.Module, site: Site) -> str:
    """Why a pair cannot be stored at a site, as part of a sentence; empty if it can."""
    for reader in site.readers:
        kernel = model.get_parameter(reader.weight).shape[2:]
        if reader.groups > 1:
            return f"{reader.weight} is a convolution in {reader.groups} groups, each of which reads its own channels"
        if not all(size % 2 for size in kernel):
            return f"{reader.weight} has a kernel of {' × '.join(map(str, kernel))} taps, which has no centre"
    return ""


def refuse_obstacle(model: nn.Module, site: Site, method: str) -> None:
    """Raises UserError if no pair can be stored at the site."""
    if why := obstacle(model, site):
        raise UserError(f"The edit method {method} stores nothing at the site {site.name}: {why}.")


def least_disturbing(
    key: Float[Tensor, " M"], moment: Float[Tensor, "M M"], ridge: float, site: Site
) -> Float[Tensor, " M"]:
    """``r = C⁻¹k / (kᵀ C⁻¹ k)`` with ``C = E[a aᵀ] + ρ I``, float64, so that ``rᵀ k = 1``.

    Args:
        key: ``k``. moment: ``E[a aᵀ]``. ridge: ``ρ`` as a share of the mean square of a channel. site: for messages.

    Raises:
        UserError: the key is zero.
    """
    if not bool(key.any()):
        raise UserError(f"At the site {site.name} the class's mean activation is zero, so that nothing can be stored.")
    moment = moment.clone()
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    solved = torch.cholesky_solve(key[:, None], torch.linalg.cholesky(moment))[:, 0]
    return solved / (solved @ key)


class Lead:
    """The mean lead of a target over a few of its train images, as a function of the weights from a site on.

    Args:
        fitting: gives the images. cut: the network, whose weights may differ from those of ``fitting.cut``.
        target: of the edit. images: of each class.

    Attributes:
        now: the lead without a change, in logits.
        unit: the same, and at least a tenth of the logits' spread.

    Raises:
        UserError: there are no train images, or the target is all classes.
    """

    @torch.no_grad()
    def __init__(self, fitting: Fitting, cut: Cut, target: Target, images: int) -> None:
        self.cut, self.target = cut, target
        self._tails: list[tuple[GraphTail, Tensor]] = [
            (cut.tail(batch), labels) for batch, labels in fitting.sample(target.classes, images)
        ]
        if not self._tails:
            raise UserError(f"{target.name} has no train images, so that no edit can be fitted to it.")
        lead, self.unit = self._of({})
        self.now = float(lead)

    def key(self) -> Float[Tensor, " M"]:
        """The mean activation over the images, float64, each of the target's classes counted alike."""
        rows = torch.cat([tail.activations.double().mean(dim=1).cpu() for tail, _ in self._tails])  # [N, M]
        labels = torch.cat([labels.cpu() for _, labels in self._tails])
        return torch.stack([rows[labels == label].mean(dim=0) for label in labels.unique()]).mean(dim=0)

    def lowering(self, row: Float[Tensor, " M"], goal: float, steps: int) -> tuple[Pair, float]:
        """The pair with which the mean lead becomes what it shall be, and the lead that it reaches.

        Each step moves the value along the lead's gradient ``g`` by what would be right if the lead were linear:
        ``Λ ← Λ − g (lead − goal) / ‖g‖²``. A step that does not come closer is halved.

        Args:
            row: ``r`` of the pair. goal: in logits. steps: at most so many.
        """
        site, model = self.cut.site, self.cut.model
        weights = [model.get_parameter(reader.weight) for reader in site.readers]
        value = torch.zeros(sum(map(len, weights)), dtype=weights[0].dtype, device=weights[0].device)
        kept, slope, gap, size = value, value, torch.inf, 1.0
        for _ in range(steps + 1):
            with torch.enable_grad():
                value.requires_grad_()
                lead, _ = self._of(Pair(site, value, row).weights(model))
                (gradient,) = torch.autograd.grad(lead, value)
            left = float(lead.detach()) - goal
            if abs(left) < abs(gap):
                kept, slope, gap, size = value.detach(), gradient, left, 1.0
            else:
                size /= 2
            squared = float(slope.square().sum())
            if abs(gap) <= _CLOSE * abs(self.now - goal) or squared == 0:
                break
            value = kept - size * gap / squared * slope
        return Pair(site, kept.detach(), row), gap + goal

    def _of(self, weights: Weights) -> tuple[Tensor, float]:
        logits = torch.cat([tail.with_weights(weights) for tail, _ in self._tails])
        return lead_and_unit(logits, torch.cat([labels for _, labels in self._tails]), self.target)


def refuse_unreached(site: Site, target: Target, method: str, lead: float, start: float, goal: float) -> None:
    """Raises UserError if more than a tenth of the way from the lead at the start to the goal is left."""
    if abs(lead - goal) > 0.1 * (start - goal):
        raise UserError(
            f"The edit method {method} cannot take the lead of {target.name} at the site {site.name}: of "
            f"{start - goal:.3g} logits, {lead - goal:.3g} are left after all steps."
        )
