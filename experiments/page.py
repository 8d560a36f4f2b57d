"""The page of the paper: claims, what was measured, whether they hold, and every figure with its numbers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.claims import Measured, Row, judged, load_claims
from experiments.experiment import Experiment, findings_in, said
from experiments.runs import PUBLISHED
from experiments.testbeds import TESTBEDS
from salve.artifacts import write_table
from salve.report.page import page_environment

#: How a verdict is shown in a plain table.
SIGNS = {
    "holds": "✓ holds",
    "holds partly": "◐ partly",
    "does not hold": "✗ does not hold",
    "not measured": "– not measured",
}


class NotRun(NamedTuple):
    """An experiment that was not run on a testbed, and why."""

    experiment: str
    testbed: str
    reason: str


def write_page(folder: Path, experiments: Sequence[Experiment], missing: Sequence[NotRun]) -> Path:
    """Write ``index.html``, ``claims.csv`` and ``claims.md`` from the findings in a folder; returns the page.

    Experiments stand on it in their order; one without findings is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {one.name: record for one in experiments if (record := findings_in(folder / one.name))}
    claims = load_claims()
    # Findings may name claims and testbeds that have been removed since.
    measured = [Measured(**one) for record in found.values() for one in record["measured"] if one["claim"] in claims]
    testbeds = [name for name in TESTBEDS if any(one["name"] == name for r in found.values() for one in r["testbeds"])]
    rows = judged(claims, [one for one in measured if one.testbed in testbeds])
    write_table(folder / "claims.csv", claims_table(rows, found))
    (folder / "claims.md").write_text(claims_markdown(rows, testbeds), encoding="utf-8")
    template = page_environment(Path(__file__).parent).get_template("paper.html.j2")
    page = folder / "index.html"
    text = template.render(
        rows=rows, published=published(rows), in_published=PUBLISHED, as_published=said("separating.published"),
        testbeds=[TESTBEDS[name] for name in testbeds], found=found, missing=missing, signs=SIGNS,
        titles={one.name: one.title for one in experiments},
        minutes=sum(record["seconds"] for record in found.values()) / 60,
        quick=any(record["quick"] for record in found.values()),
        machines=sorted({_machine(record["machine"]) for record in found.values()}),
    )  # fmt: skip
    page.write_text(text, encoding="utf-8")
    return page


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}"


def claims_table(rows: Sequence[Row], found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per claim and testbed: what was measured, the limits, and the verdict."""
    rows_of = [
        {
            **{"claim": row.claim.claim, "testbed": one.testbed, "measured": one.text, "measure": row.claim.measure},
            **{"value": one.value, PUBLISHED.replace(" ", "_"): one.published},
            **{"at_least": row.claim.at_least, "at_most": row.claim.at_most, "partly": row.claim.partly},
            **{"verdict": row.verdict_on(one.testbed), "id": row.claim.id},
            "command": f"python -m experiments.reproduce --only {row.claim.experiment}",
            "quick": found[row.claim.experiment]["quick"],
        }
        for row in rows
        for one in row.measured.values()
    ]
    return pd.DataFrame(rows_of)


def published(rows: Sequence[Row]) -> dict[str, str]:
    """By claim about separating, what was found in the published sense on each testbed."""
    found = {
        row.claim.id: "; ".join(
            f"{TESTBEDS[name].title}: {one.published}" for name, one in row.measured.items() if one.published
        )
        for row in rows
    }
    return {name: text for name, text in found.items() if text}


def claims_markdown(rows: Sequence[Row], testbeds: Sequence[str]) -> str:
    """The table in Markdown: a row per claim, a column per testbed, and one for the published sense of separating."""
    beside = published(rows)
    shown = [name for name in testbeds if any(name in row.measured for row in rows)]
    heads = ["claim", *(TESTBEDS[name].title for name in shown), "verdict", *([PUBLISHED] if beside else [])]
    heads.append("command: `python -m experiments.reproduce --only …`")
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        cells = [row.measured[name].text if name in row.measured else "–" for name in shown]
        end = [beside.get(row.claim.id, "–")] if beside else []
        lines.append(_line([row.claim.claim, *cells, f"**{SIGNS[row.verdict]}**", *end, f"`{row.claim.experiment}`"]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table, whose cells may hold any text."""
    escaped = (" ".join(re.sub(r"([|<\\])", r"\\\1", cell).split()) for cell in cells)
    return f"| {' | '.join(escaped)} |"
