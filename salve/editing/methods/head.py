# SPDX-License-Identifier: MIT
"""Edits of the head alone: a lower bias, and a weaker row. They need neither SAE nor activations."""

from dataclasses import dataclass
from typing import ClassVar

from salve.backbones.cut import Cut
from salve.backbones.site import Reader
from salve.backbones.sites import head_site
from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Change, Weights
from salve.types import UserError


def _head(cut: Cut) -> Reader:
    """The head's weight, which reads the last site."""
    (reader,) = (cut.site if cut.linear is not None else head_site(cut.model)).readers
    return reader


@dataclass(frozen=True)
class HeadBias(Method):
    """Lower the class's bias: ``b_k − α m``, where ``m`` is the mean lead of the class on its own train images."""

    source: ClassVar[str] = "the simplest edit that takes a class away"
    full_size: ClassVar[str] = "the class no longer leads in the mean over its train images"
    of_site = False

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut = fitting.cut
        reader = _head(cut)
        bias = dict(cut.model.state_dict()).get(reader.bias)
        if bias is None:
            raise UserError(f"The head {reader.path} has no bias, so that none can be lowered.")
        lead, units = fitting.lead(target), cut.order[list(target.classes)].to(bias.device)

        def at(alpha: float) -> Change:
            def weights() -> Weights:
                lowered = bias.clone()
                lowered[units] -= alpha * lead
                return {reader.bias: lowered}

            return Change(weights=weights)

        return FittedEdit(at, strongest=1e4)


@dataclass(frozen=True)
class HeadRow(Method):
    """Weaken the class's row of the head: ``(1 − α) w_k``; at α = 1 its logit is the bias."""

    source: ClassVar[str] = "the class's weights, without the others"
    full_size: ClassVar[str] = "the class's weights in the head are zero"
    of_site = False

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut = fitting.cut
        reader = _head(cut)
        weight = cut.model.state_dict()[reader.weight]
        units = cut.order[list(target.classes)].to(weight.device)

        def at(alpha: float) -> Change:
            def weights() -> Weights:
                weaker = weight.clone()
                weaker[units] *= 1 - alpha
                return {reader.weight: weaker}

            return Change(weights=weights)

        return FittedEdit(at)
