"""Claims, what we measured for them, and whether they hold."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from experiments.compare import WORDS

Verdict = Literal["holds", "holds partly", "does not hold", "not measured"]
FILE = Path(__file__).parent / "salve2025" / "claims.yaml"


@dataclass(frozen=True)
class Claim:
    """An expected direction.

    Attributes:
        id: ``<experiment>.<name>``. claim: in words. measure: the number that decides, in words.
        at_least, at_most: the limit to hold; one of them is given.
        partly: the limit to hold partly; equal to the other if there is nothing between.
    """

    id: str
    claim: str
    measure: str
    partly: float
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self.id} must say at_least or at_most.")
        if self.verdict(self.partly) == "holds" and self.partly not in (self.at_least, self.at_most):
            raise ValueError(f"{self.id} would hold partly where it holds no more.")

    @property
    def experiment(self) -> str:
        """The name of the experiment that measures it."""
        return self.id.split(".")[0]

    def verdict(self, value: float) -> Verdict:
        """Whether the claim holds at a measured value; NaN is not measured."""
        if math.isnan(value):
            return "not measured"
        if self.at_least is not None:
            return "holds" if value >= self.at_least else "holds partly" if value >= self.partly else "does not hold"
        assert self.at_most is not None
        return "holds" if value <= self.at_most else "holds partly" if value <= self.partly else "does not hold"


class Measured(NamedTuple):
    """What an experiment found for a claim on a testbed.

    Attributes:
        value: the number that decides. text: the finding in words. published: the same in the published sense of
            separating, which decides nothing.
    """

    claim: str
    testbed: str
    value: float
    text: str
    published: str = ""


def load_claims(path: Path = FILE) -> dict[str, Claim]:
    """The claims by id, in their order; ``{level}``, ``{mean}`` and ``{loss}`` in them are limits of what separates.

    Raises:
        ValueError: a claim contradicts itself.
    """
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        f"{experiment}.{name}": Claim(f"{experiment}.{name}", **fields | {"measure": fields["measure"].format(**WORDS)})
        for experiment, claims in read.items()
        for name, fields in claims.items()
    }


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict over several testbeds: a claim holds if it holds on all that were measured."""
    found = {verdict for verdict in verdicts if verdict != "not measured"}
    if not found:
        return "not measured"
    return found.pop() if len(found) == 1 else "holds partly"


class Row(NamedTuple):
    """A claim with what was measured for it, by testbed."""

    claim: Claim
    verdict: Verdict
    measured: Mapping[str, Measured]

    def verdict_on(self, testbed: str) -> Verdict:
        return self.claim.verdict(self.measured[testbed].value)


def judged(claims: Mapping[str, Claim], measured: Sequence[Measured]) -> list[Row]:
    """All claims in their order, each with what was measured for it.

    Raises:
        KeyError: an unknown claim was measured. ValueError: a claim was measured twice on a testbed.
    """
    found: dict[str, dict[str, Measured]] = {}
    for one in measured:
        if one.claim not in claims:
            raise KeyError(f"{one.claim} is no claim of {FILE.name}.")
        testbeds = found.setdefault(one.claim, {})
        if one.testbed in testbeds:
            raise ValueError(f"{one.claim} was measured twice on {one.testbed}.")
        testbeds[one.testbed] = one
    rows = [(claim, found.get(name, {})) for name, claim in claims.items()]
    return [Row(claim, together(claim.verdict(one.value) for one in on.values()), on) for claim, on in rows]
