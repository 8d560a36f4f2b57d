# SPDX-License-Identifier: MIT
"""The summary of a run on the terminal."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from salve.report.audited import poor_suspects, ranked
from salve.report.grouped import REPAIRED_FILE
from salve.report.remarks import cautions, misused
from salve.report.repaired import WEIGHTS, done, few_objects, outcome, rough, state_rows, taken_out, verdict, worst_of
from salve.report.tables import Headline, class_summary, failing_first, headline, records
from salve.report.text import MISSING, PERCENT, count_of, label, latent_name, number, percent, plural, points, yes_no
from salve.results import Artifacts

#: Classes in the table: a thousand lines would push everything else off the screen.
MOST_ROWS = 100
#: Groups of few images that are named.
NAMED = 3


def summary_table(artifacts: Mapping[str, Path], remarks: Sequence[str] = ()) -> Group:
    """The run's summary for the terminal: cautions, then one row per class and a footer with the main result.

    Args:
        artifacts: stage kind → folder; columns of stages that have not run show "–".
        remarks: cautions about data, network and SAE; the report adds its own.

    Returns:
        The remarks and a rich table, all of test images: accuracy, the class's latent with its sign and kind, the
        strength that select images chose, mean absolute change and largest loss of the other classes there (percentage
        points), whether the class separates, the pointing game's hits (only where it was measured), and the median
        α_flip.
    """
    found = Artifacts(artifacts)
    rows = class_summary(found)
    parts: list[RenderableType] = [Text(f"Caution: {one}", style="yellow") for one in cautions(found, remarks)]
    # A run that was made for an audit or a repair has little to say of the classes' own latents.
    if not artifacts.keys() & {"audit", "repair"} or artifacts.keys() & {"validate", "control", "diagnose"}:
        parts.append(class_table(rows, headline(found, rows)))
    return Group(*parts, *_audited(found), *_repaired(found))


def answers(artifacts: Mapping[str, Path]) -> Group:
    """The suspects of an audit, and the network before and after a repair, each where its stage has run."""
    found = Artifacts(artifacts)
    return Group(*_audited(found), *_repaired(found))


def _audited(found: Artifacts) -> list[RenderableType]:
    """The suspects of each class, those with the highest scores first; empty without an audit."""
    suspects, record = found.table("audit", "suspects.csv"), found.record("audit", "audit.json")
    if "score" not in suspects:
        return []
    attribute = str(record.get("attribute", ""))
    first = suspects[suspects["rank"] == 1].sort_values("score", ascending=False, kind="stable")["class"]
    columns = [
        "class",
        *([attribute] if attribute else []),
        "latent (score), the first suspects",
    ]
    table = _plain_table("Suspects: latents that push images towards a class which they are not of", columns)
    for column_ in table.columns:
        column_.justify = "left"
    for name in first[:MOST_ROWS]:
        own = records(suspects[suspects["class"] == name])
        scored = ", ".join(f"{one['latent']} ({number(one['score'])})" for one in own if one["score"] > 0)
        value = [label(own[0].get("value", ""), 32)] if attribute else []
        table.add_row(*map(Text, (label(name, 32), *value, scored or MISSING)))
    poor = poor_suspects(found)
    return [table, Text(ranked(record)), *([Text(f"Caution: {poor}", style="yellow")] if poor else [])]


def _repaired(found: Artifacts) -> list[RenderableType]:
    """The network before and after a repair; empty without one."""
    record = found.record("repair", "repair.json")
    if not record:
        return []
    names = [worst_of(record), "average", *(["changed by the mark"] if record["pairs"] else [])]
    table = _plain_table(f"Repair of {taken_out(record)}, on test images", ["network", *names])
    for name, cells in state_rows(record):
        table.add_row(Text(name), *(Text(value) for value, _ in cells))
    told = (f"Changed: {done(record) or 'nothing'}.", rough(record, NAMED), few_objects(record))
    return [table, Text(" ".join(filter(None, told)))]


def repair_ending(artifacts: Mapping[str, Path]) -> list[str]:
    """Whether a repair helped, where its files lie, and the command that undoes it; a line each.

    Args:
        artifacts: stage kind → folder, with one of a repair.
    """
    found, folder = Artifacts(artifacts), artifacts["repair"]
    record = found.record("repair", "repair.json")
    edits = [path for _, path in Artifacts({"repair": folder}).files("edits/*.json")]
    caution = [f"Caution: {cautions(found)[0]}"] if misused(found) else []
    lines = [*caution, verdict(record), f"{WEIGHTS[outcome(record)]}: {folder / REPAIRED_FILE}"]
    if not edits:
        return lines
    undo = ["salve-edit", "undo", *map(str, edits), str(folder / REPAIRED_FILE), "restored.safetensors"]
    return [*lines, f"Edit files: {', '.join(map(str, edits))}", f"Undo: {shlex.join(undo)}"]


def _plain_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for number_, name in enumerate(columns):
        table.add_column(name, justify="right" if number_ and len(columns) > 2 else "left")
    return table


def class_table(rows: pd.DataFrame, main: Headline) -> Table:
    """The table of :func:`summary_table`, from the rows of ``class_summary`` and their headline."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=0)
    table.title, table.title_justify = "SALVE, class by class", "left"
    defining = int((rows["kind"] == "class-defining").sum())
    measured = main.pointing is not None
    verdict = main.verdict
    columns: list[tuple[str, str]] = [
        ("class", f"{count_of(main.classes)} in all"),
        ("test\nacc. %", _bare(percent(main.test_accuracy))),
        ("latent", ""),
        ("kind", f"{defining} def." if defining else ""),
        ("α", ""),
        ("mean\n|Δ|", ""),
        ("largest\nloss", ""),
        ("sepa-\nrates", verdict.count.replace(" ", "\n") if verdict else MISSING),
        *([("point-\ning %", _bare(percent(main.pointing, 0)))] if measured else []),
        ("median\nα_flip", main.flip_range.replace(" to ", " to\n")),
    ]
    for name, footer in columns:
        text = name in ("class", "kind")
        justify: Literal["left", "right"] = "left" if text else "right"
        table.add_column(name, Text(footer), justify=justify, no_wrap=name != "class", overflow="fold", min_width=4)
    ordered = failing_first(records(rows), MOST_ROWS)
    for row in ordered[:MOST_ROWS]:
        failed = yes_no(row["separates"]) == "no"
        table.add_row(*map(Text, _cells(row, measured)), style="bold red" if failed else "")
    table.caption = Text(_caption(main, len(ordered)))
    table.caption_justify = "left"
    return table


def _cells(row: Mapping[str, Any], measured: bool) -> list[str]:
    return [
        label(row["class"], 32),
        _bare(percent(row["test_accuracy"])),
        latent_name(row["latent"], row["sign"]).replace("(", "").replace(")", ""),
        row["kind"].removeprefix("class-").removesuffix("-class") or MISSING,
        number(row["alpha"]),
        points(row["others_mean_change"], signed=False),
        points(row["others_worst_loss"], signed=False),
        yes_no(row["separates"]),
        *([_bare(percent(row["pointing"], 0))] if measured else []),
        number(row["alpha_flip_median"]),
    ]


def _caption(main: Headline, count: int) -> str:
    said = ["All of test images. α: strength of the edit, chosen on select images."]
    said.append("|Δ|, loss: of the other classes' accuracy, in percentage points.")
    if main.verdict is not None:
        said.append(
            f"Separates: {main.verdict.meaning}; in brackets the {percent(main.verdict.confidence, 0)} interval of the "
            "count."
        )
    if count > MOST_ROWS:
        said.append(
            f"{MOST_ROWS} of {plural(count, 'class')} are shown, first those that do not separate; the report has all."
        )
    return " ".join(said)


def _bare(text: str) -> str:
    """Without the unit, which the column's heading has."""
    return text.removesuffix(PERCENT)
