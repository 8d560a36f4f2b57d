# SPDX-License-Identifier: MIT
"""What a repair and its rivals are chosen from: edits with their biases, and what select images say of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from salve.artifacts import Artifact
from salve.editing.methods import FittedEdit
from salve.editing.methods.change import Change

#: What a candidate without an edit is called: the network as it was, and with new biases.
UNTOUCHED, ALONE = "nothing", "recalibration alone"


@dataclass(frozen=True, eq=False)
class Candidate:
    """An edit at a strength, and the biases that go with it.

    Attributes:
        method: its name, or :data:`UNTOUCHED` or :data:`ALONE`. latents: that are edited. alpha: strength.
        change: the edit; None where there is none. shifts: ``[C]``, of the biases.
        score: on select images; larger is better. accuracy: on select images.
        average_loss: what the average by groups of the train images loses at least; NaN where it is not known.
        allowed: within the budget.
        pays: see :class:`salve.stages.judging.Judgement`.
        fitted: the edit at any strength.
        network: of a rival that trains the network again, in place of an edit.
    """

    method: str
    latents: tuple[int, ...]
    alpha: float
    change: Change | None
    shifts: Tensor
    score: tuple[float, ...]
    accuracy: float
    average_loss: float
    allowed: bool
    pays: bool
    fitted: FittedEdit | None = field(default=None, repr=False)
    network: Artifact | None = None

    def row(self) -> dict[str, Any]:
        """For a table."""
        return {
            "method": self.method,
            "latents": "; ".join(map(str, self.latents)),
            "alpha": self.alpha,
            "select_score": self.score[0],
            "select_mean": self.score[-1],
            "select_accuracy": self.accuracy,
            "select_average_loss": self.average_loss,
            "permanent": self.change is None or self.change.permanent,
            "allowed": self.allowed,
            "pays": self.pays,
        }


def chosen_of(candidates: Sequence[Candidate], untouched: Candidate) -> Candidate:
    """The best candidate within the budget that pays; the network as it is where there is none."""
    return best_of([candidate for candidate in candidates if candidate.pays]) or untouched


def beyond_budget(candidates: Sequence[Candidate], chosen: Candidate) -> Candidate | None:
    """The best candidate that pays and is better than the chosen one, but costs more than the budget; None if none."""
    better = [one for one in candidates if one.pays and not one.allowed and one.score > chosen.score]
    return max(better, key=lambda candidate: candidate.score, default=None)


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate with the best score within the budget, the first of equal ones; None if none is within it."""
    allowed = [candidate for candidate in candidates if candidate.allowed]
    return max(allowed, key=lambda candidate: candidate.score, default=None)


def best_of_each(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """By method its best candidate; of a method that has none within the budget the best beyond it."""
    by_method: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_method.setdefault(candidate.method, []).append(candidate)
    return {name: best_of(own) or max(own, key=lambda one: one.score) for name, own in by_method.items()}


def table_of(candidates: Sequence[Candidate], chosen: Candidate) -> pd.DataFrame:
    """All that was tried, and what was chosen."""
    return pd.DataFrame([{**one.row(), "chosen": one is chosen} for one in candidates])
