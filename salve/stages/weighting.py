# SPDX-License-Identifier: MIT
"""How a training weighs its images, other than all alike."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from salve.artifacts import digest_of_tensors
from salve.types import Labels


@dataclass(frozen=True, eq=False)
class Weighting:
    """How many times each train image counts; and for group DRO, groups with weights of their own.

    An epoch draws as many images as there are, with replacement: it costs what it does where all count alike.

    Attributes:
        times: ``[N]``, how many times as often as another one each train image is drawn; 0 leaves it out.
        groups: ``[N]``, of each train image, for group DRO: batches then have all groups alike; None for none.
        values: group ``g`` is of the class ``g // values``. step: of the groups' weights.
    """

    times: Int[Tensor, " N"]
    groups: Int[Tensor, " N"] | None = None
    values: int = 1
    step: float = 0.0

    def key(self) -> dict[str, Any]:
        """For the key of what is trained."""
        found: dict[str, Any] = {"drawn": digest_of_tensors({"times": self.times})}
        if self.groups is not None:
            groups = digest_of_tensors({"groups": self.groups})
            found |= {"groups": groups, "values": self.values, "step": self.step}
        return found

    def targets(self, labels: Labels) -> Labels:
        """What the training is given of each train image: its group, or else its label."""
        return labels if self.groups is None else self.groups

    def drawn_by(self, numbers: Int[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        """Of some train images the weights with which they are drawn: all groups alike, or each as often as it counts.
        None where that is once each."""
        if self.groups is None:
            times = self.times[numbers]
            return None if bool((times == times[:1]).all()) else times.double()
        groups = self.groups[numbers]
        return 1 / torch.bincount(groups)[groups].double()
