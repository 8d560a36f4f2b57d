# SPDX-License-Identifier: MIT
"""How many classes separate, in the words of terminal and page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from salve.report.text import count_of, percent, points, span


@dataclass(frozen=True)
class Verdict:
    """What ``verdict.json`` holds.

    Attributes:
        judged: classes that have an edit. separates: how many of them separate on test; low, high: its interval.
        published: how many do in the published sense. confidence: of the interval.
        accuracy, mean_change, worst_loss: the limits of *separates* [fractions].
        method: the edit method, if it is not the gate. full_size: what its edits do at α = 1.
    """

    judged: int
    separates: int
    low: int
    high: int
    published: int
    confidence: float
    accuracy: float
    mean_change: float
    worst_loss: float
    method: str = ""
    full_size: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.separates <= self.high <= self.judged or not 0 <= self.published <= self.judged:
            raise ValueError("More classes separate than were judged, or their number is outside its own interval.")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Verdict | None":
        """From the record; None where nothing was judged."""
        if not record.get("judged"):
            return None
        limits = record["limits"]
        return cls(
            int(record["judged"]),
            int(record["separates"]),
            int(record["separates_low"]),
            int(record["separates_high"]),
            int(record["separates_published"]),
            float(record["confidence"]),
            float(limits["accuracy"]),
            float(limits["others_mean_change"]),
            float(limits["others_worst_loss"]),
            str(record.get("method", "")),
            str(record.get("full_size", "")),
        )

    @property
    def range(self) -> str:
        """ "6–9": the interval of the count."""
        return span(self.low, self.high, count_of)

    @property
    def count(self) -> str:
        """ "8/10 (6–9)"."""
        return f"{count_of(self.separates)}/{count_of(self.judged)} ({self.range})"

    @property
    def meaning(self) -> str:
        """What *separates* asks of an edit, as the end of a sentence."""
        return (
            f"the class falls to {percent(self.accuracy, 0)} accuracy or less, the accuracy of the other classes "
            f"changes by less than {_round(self.mean_change)} points (mean of the absolute changes, in which gains "
            f"cannot make up for losses), and no other class loses more than {_round(self.worst_loss)} points"
        )

    @property
    def published_meaning(self) -> str:
        """What the published sense asks of an edit, as the end of a sentence."""
        return (
            f"the class falls to {percent(self.accuracy, 0)} or less while the mean accuracy of the others, in which "
            f"gains make up for losses, changes by less than {_round(self.mean_change)} points"
        )


def _round(fraction: float) -> str:
    return points(fraction, signed=False).removesuffix(".0")
