"""What is claimed, what we measured, and whether it holds."""

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
        id: ``<experiment>.<name>``. claim: in words. measure: what the number is that decides.
        at_least, at_most: from (up to) which value it holds; one of them is given.
        partly: from (up to) which value it holds partly; the same as the other where there is no middle.
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
        limit = self.at_least if self.at_least is not None else self.at_most
        assert limit is not None
        if (self.partly > limit) if self.at_least is not None else (self.partly < limit):
            raise ValueError(f"{self.id} would hold partly where it holds no more.")

    @property
    def experiment(self) -> str:
        """The name of the experiment that measures it."""
        return self.id.split(".")[0]

    def verdict(self, value: float) -> Verdict:
        """What a measured value says; NaN says nothing."""
        if math.isnan(value):
            return "not measured"
        if self.at_least is not None:
            return "holds" if value >= self.at_least else "holds partly" if value >= self.partly else "does not hold"
        assert self.at_most is not None
        return "holds" if value <= self.at_most else "holds partly" if value <= self.partly else "does not hold"


class Measured(NamedTuple):
    """What an experiment found on a testbed for a claim: the number that decides, and the finding in words; of classes
    that separate also how many do in the published sense, which decides nothing."""

    claim: str
    testbed: str
    value: float
    text: str
    published: str = ""


def load_claims(path: Path = FILE) -> dict[str, Claim]:
    """The claims by id, in their order; ``{level}``, ``{mean}`` and ``{loss}`` in them are limits of what separates.

    Raises:
        ValueError: one does not say what is expected.
    """
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        f"{experiment}.{name}": Claim(f"{experiment}.{name}", **fields | {"measure": fields["measure"].format(**WORDS)})
        for experiment, claims in read.items()
        for name, fields in claims.items()
    }


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict over several testbeds: it holds where it holds on all that were measured."""
    found = {verdict for verdict in verdicts if verdict != "not measured"}
    if not found:
        return "not measured"
    return found.pop() if len(found) == 1 else "holds partly"


class Row(NamedTuple):
    """A claim with what was measured for it, by the testbeds' names."""

    claim: Claim
    verdict: Verdict
    measured: Mapping[str, Measured]

    def verdict_on(self, testbed: str) -> Verdict:
        return self.claim.verdict(self.measured[testbed].value)


def judged(claims: Mapping[str, Claim], measured: Sequence[Measured]) -> list[Row]:
    """All claims in their order, with what was measured for them.

    Raises:
        KeyError: something was measured for a claim that there is not. ValueError: a claim was measured twice on a
            testbed.
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
