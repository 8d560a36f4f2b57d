# SPDX-License-Identifier: MIT
"""What edits do to the class they are for and to all others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from salve.report.blocks import MOST_ROWS, Block, Cell, FigureBlock, FigureFolder, Prose, Section, TableBlock, numbers
from salve.report.figures import control as figures
from salve.report.tables import class_names, failing_first, records
from salve.report.text import (
    is_missing,
    label,
    number,
    percent,
    plural,
    points,
    sign_of,
    slug,
    span,
    yes_no,
)
from salve.report.verdict import Verdict
from salve.results import Artifacts

FOLD_ROWS = 25
#: |Δ| without a line break in it.
CHANGE = "|\u2060Δ\u2060|"
INTERVALS = "95\u00a0% intervals (Wilson for the accuracy, else resampled test images)."


def accuracy_cell(row: Mapping[str, Any]) -> Cell:
    """Accuracy of the edited class after the edit, with its interval."""
    interval = span(row.get("accuracy_after_low"), row.get("accuracy_after_high"), percent)
    return Cell(percent(row.get("accuracy_after")), "num", interval)


def change_cell(row: Mapping[str, Any], name: str, of: Any = "") -> Cell:
    """A change of the other classes in points, with its interval and the name of the class that changes."""

    def write(value: Any) -> str:
        return points(value, signed=False)

    interval = span(row.get(f"{name}_low"), row.get(f"{name}_high"), write)
    whose = label(of, 30) if not is_missing(of) and (row.get(name) or 0) > 0 else ""
    return Cell(write(row.get(name)), "num", " · ".join(filter(None, (interval, whose))))


def strength_cell(row: Mapping[str, Any]) -> Cell:
    """The chosen strength; if none takes the class away, also the one that was used instead."""
    alpha, used = row.get("alpha"), row.get("alpha_used")
    none = not is_missing(alpha) and math.isinf(float(alpha or 0.0)) and not is_missing(used)
    return Cell(number(alpha), "num", f"used: {number(used)}" if none else "")


def verdict_cell(row: Mapping[str, Any]) -> Cell:
    """ "yes" or "no" with the reason below it, and in how many resampled test sets it is "yes"."""
    text, share = yes_no(row.get("separates")), percent(row.get("separates_share"), 0)
    parts = [str(row.get("reason") or "")] if text == "no" else []
    if text in ("yes", "no") and not is_missing(row.get("separates_share")):
        parts.append(f"“yes” in {share} of resampled test sets")
    return Cell(text, {"yes": "good", "no": "bad"}.get(text, "dim"), "; ".join(filter(None, parts)))


def control(artifacts: Artifacts, figure_folder: FigureFolder) -> Section:
    """What edits do to the class they are for and to all others."""
    blocks: list[Block] = []
    curves, summary = artifacts.table("control", "curves.csv"), artifacts.table("control", "summary.csv")
    evaluation = artifacts.table("control", "evaluation.csv")
    verdict = Verdict.of(artifacts.record("control", "verdict.json"))
    edits = records(summary) if "target" in summary else []
    if edits or len(curves):
        separates = f" An edit separates its class when {verdict.meaning}." if verdict else ""
        what = (
            "An edit scales the weights that read the activation, channel by channel, by how much the latent "
            "contributes to each: suppressing closes channels as the strength α grows, enhancing opens them."
        )
        if verdict and verdict.method:
            what = f"The edits are those of the method {verdict.method}: at α = 1 {verdict.full_size}."
        blocks.append(
            Prose(f"{what} Select images choose the strength; every number here is of test images.{separates}")
        )
    if {"target", "mode", "split"} <= set(curves.columns):
        blocks += _curve_figures(curves[curves["split"] == "test"], edits, verdict, figure_folder)
    if edits:
        blocks.append(_edit_table(edits))
    blocks += _confusion(artifacts, figure_folder, edits)
    if len(evaluation):
        blocks += figure_folder.figure(
            figures.path_agreement(evaluation),
            "control-agreement",
            "Scatter plot: accuracy from cached activations against accuracy of the edited network.",
            "Each point is one class under one edit: its accuracy computed from cached activations (fast) against the "
            "edited network run on the images (slow). The two paths must agree, so every point belongs on the line.",
            "control-evaluation.csv",
        )
    return Section("control", "Control: what an edit changes", blocks, "control")


def panel_order(edits: Sequence[Mapping[str, Any]], drawn: Sequence[str]) -> list[str]:
    """Targets in the order of the panels; if not all fit, those that fail come first."""
    verdict = {str(row["target"]): row for row in edits}
    known = set(drawn)
    rows = [row for name, row in verdict.items() if name in known]
    rows += [{"target": name} for name in drawn if name not in verdict]
    return [str(row["target"]) for row in failing_first(rows, figures.MAX_PANELS)]


def _panel_note(row: Mapping[str, Any], mode: str) -> tuple[str, bool]:
    sign = sign_of(row.get("sign"))
    note = label(f"latent {row.get('latents', '')}" + (f" ({sign})" if sign else ""), 18)
    verdict = yes_no(row.get("separates"))
    if mode != "suppress" or verdict not in ("yes", "no"):
        return note, True
    share = "" if is_missing(row.get("separates_share")) else f" ({percent(row['separates_share'], 0)})"
    return f"{note} · {'separates' if verdict == 'yes' else 'does not'}{share}", verdict == "yes"


def _how_to_read(mode: str, verdict: Verdict | None) -> str:
    if mode == "enhance":
        return (
            "Enhancing: the edited class (orange) should hold or rise. Where the others (blue) fall, their images "
            "are now taken for it."
        )
    dotted = f" The dotted line is at {percent(verdict.accuracy, 0)}." if verdict else ""
    return (
        "Suppressing: the edited class (orange) should fall to zero while the others (blue) stay where they were. The "
        "dashed line is the strength that select images chose: of those that separate the class there, else of those "
        f"that take it away, the one that costs the others least for what the class loses.{dotted} Above each panel, "
        "whether the edit separates its class on test images, in brackets in how many of the resampled test sets."
    )


def _curve_figures(
    curves: pd.DataFrame, edits: Sequence[Mapping[str, Any]], verdict: Verdict | None, figure_folder: FigureFolder
) -> list[FigureBlock]:
    blocks: list[FigureBlock] = []
    marks = {str(row["target"]): float(row.get("alpha", math.inf)) for row in edits}
    for mode in ("suppress", "enhance"):
        rows = curves[curves["mode"] == mode]
        targets = panel_order(edits, list(dict.fromkeys(rows["target"])))
        notes = {str(row["target"]): _panel_note(row, mode) for row in edits}
        limit, suppress = figures.MAX_PANELS, mode == "suppress"
        more = (
            f" {limit} of {plural(len(targets), 'edit')} are shown, first those that do not separate."
            if len(targets) > limit
            else ""
        )
        blocks += figure_folder.figure(
            figures.strength_curves(
                rows,
                targets,
                notes,
                marks if suppress else {},
                verdict.accuracy if suppress and verdict else None,
            ),
            f"control-{mode}",
            f"Small line plots, one per edit ({mode}): accuracy of the edited class and of the others against "
            "strength.",
            _how_to_read(mode, verdict)
            + " The blue band runs from the lowest of the other classes to the highest."
            + more,
            "control-curves.csv",
        )
    return blocks


def _edit_table(edits: Sequence[Mapping[str, Any]]) -> TableBlock:
    header = [
        *(Cell("edit for"), Cell("latent"), Cell("kind")),
        *numbers("α", "accuracy before", "after", f"others: mean\u00a0{CHANGE}", "mean Δ", "largest loss", "KL (nats)"),
        *(Cell("separates"), Cell("published sense")),
    ]
    rows = []
    for row in failing_first(edits, MOST_ROWS):
        sign = sign_of(row.get("sign"))
        rows.append(
            [
                Cell(str(row["target"])),
                Cell(f"{row.get('latents', '')}" + (f"\u00a0({sign})" if sign else "")),
                Cell(str(row.get("kind", "")), f"kind-{slug(row.get('kind', ''))}"),
                strength_cell(row),
                Cell(percent(row.get("accuracy_before")), "num"),
                accuracy_cell(row),
                change_cell(row, "others_mean_change"),
                Cell(points(row.get("others_signed_change")), "num"),
                change_cell(row, "others_worst_loss", row.get("worst_class")),
                Cell(number(row.get("kl_others"), 2), "num"),
                verdict_cell(row),
                Cell(yes_no(row.get("separates_published")), "dim"),
            ]
        )
    title = (
        "Suppressing edits at the strength that select images chose, measured on test images. Others: changes of the "
        f"other classes' accuracy in percentage points; mean {CHANGE}: of the absolute changes; mean Δ: gains make up "
        "for losses, as in the published sense; largest loss: of any other class, with its name. Below the numbers: "
        f"{INTERVALS}"
    )
    return TableBlock(title, header, rows, "control-summary.csv", folded=len(rows) > FOLD_ROWS)


def _confusion(
    artifacts: Artifacts, figure_folder: FigureFolder, edits: Sequence[Mapping[str, Any]]
) -> list[FigureBlock]:
    counts, classes = artifacts.table("control", "confusion.csv"), class_names(artifacts)
    if not {"target", "true", "predicted", "images"} <= set(counts.columns) or not classes:
        return []
    targets = [name for name in dict.fromkeys(counts["target"]) if name]
    shown = targets[: figures.MAX_MATRICES]
    names = figures.matrix_classes(counts, shown, classes)
    strength = {str(row["target"]): row.get("alpha_used") for row in edits}
    titles = [
        f"{label(name, 16)}, α = {number(strength[name])}" if not is_missing(strength.get(name)) else name
        for name in shown
    ]
    some = (
        f" Of {plural(len(classes), 'class')} those are drawn that the edits are for and those that take most of their "
        "images; the rest is one row and one column."
        if len(names) < len(classes)
        else ""
    )
    more = len(targets) - len(shown)
    return figure_folder.figure(
        figures.confusion_matrices(counts, shown, titles, names, some=bool(some)),
        "control-confusion",
        "Confusion matrices before and after each edit.",
        "Confusion on test images before any edit, and of the edited network for each class's edit; dark cells hold "
        "most images of their row. A clean edit empties the diagonal in the marked row alone, and the row shows which "
        "classes its images go to." + some + (f" {plural(more, 'more edit')} in the table." if more > 0 else ""),
        "control-confusion.csv",
    )
