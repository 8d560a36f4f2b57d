# SPDX-License-Identifier: MIT
"""MEMIT: a rank-one edit at each of several sites in a row."""

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import changed_state
from salve.editing.methods.rank_one import RankOne
from salve.editing.methods.stored import (
    Lead,
    Pair,
    edit_of,
    least_disturbing,
    obstacle,
    refuse_obstacle,
    refuse_unreached,
)
from salve.types import UserError


@dataclass(frozen=True)
class Memit(Method):
    """MEMIT: the same change spread over this site and the next ones of the network, each with a rank-one edit.

    Site after site takes an equal share of what is left of the class's lead, ``(lead − goal) / (sites left)``. Its key
    is the mean activation of sampled images of the class in the network as edited so far; its row is the one of
    :class:`RankOne`, with the second moment of the network as given.

    In the paper the sites are MLPs that all add to one residual stream, and the share is one of a change of that
    stream's last state. Networks in general have no such stream: here the share is one of the lead, each site finds its
    own value, and every site with a linear layer or convolution counts. One key, the class's mean, stands for the
    paper's many. At the last site this is the rank-one edit.

    Attributes:
        sites: how many, with the given one; fewer near the head. Sites that can store nothing are passed over.
        images: train images of each class that are sampled. steps: for each site at most.
        ridge: see :class:`RankOne`.
    """

    sites: int = 3
    images: int = 16
    steps: int = 20
    ridge: float = 1e-4

    source: ClassVar[str] = "Meng et al. 2022 (arXiv 2210.07229), MEMIT"
    full_size: ClassVar[str] = RankOne.full_size
    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for setting in ("sites", "images", "steps"):
            if getattr(self, setting) < 1:
                raise UserError(f"{setting}={getattr(self, setting)} of memit must be 1 or more.")
        self._single()  # refuses a ridge

    def _single(self) -> RankOne:
        return RankOne(self.images, self.steps, self.ridge)

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut = fitting.cut
        if cut.linear is not None:
            return self._single().fit(fitting, target)
        refuse_obstacle(cut.model, cut.site, "memit")
        fitting.refuse_absent(target)
        chosen = [site for site in cut.sites_onward() if not obstacle(cut.model, site)][: self.sites]
        edited = deepcopy(cut.model)
        pairs: list[Pair] = []
        start = goal = reached = 0.0
        for number, site in enumerate(chosen):
            lead = Lead(fitting, cut.on(edited, site), target, self.images)
            if not pairs:
                start, goal = lead.now, lead.now - lead.unit
            row = least_disturbing(lead.key(), fitting.moment_at(site), self.ridge, site)
            pair, reached = lead.lowering(row, lead.now - (lead.now - goal) / (len(chosen) - number), self.steps)
            edited.load_state_dict(changed_state(edited, pair.weights(edited)))
            pairs.append(pair)
        refuse_unreached(cut.site, target, "memit", reached, start, goal)
        return edit_of(cut.model, pairs)
