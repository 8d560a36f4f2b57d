"""What edits do to the class they are for and to all others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from salve.report.blocks import Block, Cell, FigureBlock, Prose, Section, Shelf, TableBlock, numbers
from salve.report.figures import control as figures
from salve.report.inputs import Artifacts, records
from salve.report.text import label, number, percent, plural, points, sign_of, slug, yes_no

FOLD_ROWS = 25
HOW_TO_READ = {
    "suppress": "Suppressing: the edited class (orange) should fall to zero while the others (blue) stay where they "
    "were. The dashed line is the first α of the grid at which the class is at 5 % (dotted) or less.",
    "enhance": "Enhancing: the edited class (orange) should hold or rise. Where the others (blue) fall, images of "
    "theirs are being pulled into it.",
}


def verdict_cell(value: object, reason: str = "") -> Cell:
    """ "yes" or "no" with the reason below it."""
    text = yes_no(value)
    return Cell(text, {"yes": "good", "no": "bad"}.get(text, "dim"), reason if text == "no" else "")


def control(artifacts: Artifacts, shelf: Shelf) -> Section:
    """What edits do to the class they are for and to all others."""
    blocks: list[Block] = []
    curves, summary = artifacts.table("control", "curves.csv"), artifacts.table("control", "summary.csv")
    evaluation = artifacts.table("control", "evaluation.csv")
    edits = records(summary) if "target" in summary else []
    if edits or len(curves):
        blocks.append(
            Prose(
                "An edit scales the weights that read the activation, channel by channel, by how much the latent "
                "contributes to each: suppressing closes channels as the strength α grows, enhancing opens them. A "
                "class separates when some α takes it to 5 % accuracy or less while the mean accuracy of the others "
                "changes by less than 3 points."
            )
        )
    if "target" in curves and "mode" in curves:
        blocks += _curve_figures(curves, edits, shelf)
    if edits:
        blocks.append(_edit_table(edits))
    blocks += _confusion(artifacts, shelf, [str(row["target"]) for row in edits], evaluation)
    if len(evaluation):
        blocks += shelf.figure(
            figures.path_agreement(evaluation),
            "control-agreement",
            "Scatter plot: accuracy from cached activations against accuracy of the edited network.",
            "Each point is one class under one edit: its accuracy computed from cached activations (fast) against the "
            "edited network run on the images (slow). The two paths must agree, so every point belongs on the line.",
            "control-evaluation.csv",
        )
    return Section("control", "Control: what an edit changes", blocks, "control")


def panel_order(edits: Sequence[Mapping[str, Any]], drawn: Sequence[str]) -> list[str]:
    """Targets in the order of the panels: as they come, or first those that fail where not all can be shown."""
    verdict = {str(row["target"]): yes_no(row.get("separates")) for row in edits}
    order = [name for name in verdict if name in set(drawn)] + [name for name in drawn if name not in verdict]
    if len(order) > figures.MAX_PANELS:
        order.sort(key=lambda name: verdict.get(name) != "no")
    return order


def _panel_note(row: Mapping[str, Any], mode: str) -> tuple[str, bool]:
    sign = sign_of(row.get("sign"))
    note = label(f"latent {row.get('latents', '')}" + (f" ({sign})" if sign else ""), 18)
    verdict = yes_no(row.get("separates"))
    if mode != "suppress" or verdict not in ("yes", "no"):
        return note, True
    return f"{note} · " + ("separates" if verdict == "yes" else "does not separate"), verdict == "yes"


def _curve_figures(curves: pd.DataFrame, edits: Sequence[Mapping[str, Any]], shelf: Shelf) -> list[FigureBlock]:
    blocks: list[FigureBlock] = []
    marks = {str(row["target"]): float(row.get("alpha", math.inf)) for row in edits}
    for mode, how in HOW_TO_READ.items():
        rows = curves[curves["mode"] == mode]
        targets = panel_order(edits, list(dict.fromkeys(rows["target"])))
        notes = {str(row["target"]): _panel_note(row, mode) for row in edits}
        limit = figures.MAX_PANELS
        more = (
            f" {limit} of {len(targets)} edits are shown, first those that do not separate."
            if len(targets) > limit
            else ""
        )
        blocks += shelf.figure(
            figures.strength_curves(
                rows, targets, notes, marks if mode == "suppress" else {}, 0.05 if mode == "suppress" else None
            ),
            f"control-{mode}",
            f"Small line plots, one per edit ({mode}): accuracy of the edited class and of the others against "
            "strength.",
            how + " The blue band runs from the worst of the other classes to the best." + more,
            "control-curves.csv",
        )
    return blocks


def _edit_table(edits: Sequence[Mapping[str, Any]]) -> TableBlock:
    header = [
        *(Cell("edit for"), Cell("latent"), Cell("kind")),
        *(Cell("α to ≤\u00a05\u00a0%", "num"), Cell("accuracy before", "num"), Cell("after", "num")),
        *(
            Cell("others: mean\u00a0|\u2060Δ\u2060|", "num"),
            Cell("mean Δ", "num"),
            Cell("worst Δ", "num"),
            Cell("KL (nats)", "num"),
        ),
        Cell("separates"),
    ]
    rows = []
    for row in edits:
        sign = sign_of(row.get("sign"))
        rows.append(
            [
                Cell(str(row["target"])),
                Cell(f"{row.get('latents', '')}" + (f"\u00a0({sign})" if sign else "")),
                Cell(str(row.get("kind", "")), f"kind-{slug(row.get('kind', ''))}"),
                *numbers(
                    number(row.get("alpha")),
                    percent(row.get("accuracy_before")),
                    percent(row.get("accuracy_after")),
                    points(row.get("others_mean_change"), signed=False),
                    points(row.get("others_signed_change")),
                ),
                Cell(points(row.get("others_worst_change")), "num", label(row.get("worst_class") or "", 30)),
                Cell(number(row.get("kl_others"), 2), "num"),
                verdict_cell(row.get("separates"), str(row.get("reason") or "")),
            ]
        )
    title = "Suppressing edits, at the strength shown; changes of the other classes in percentage points"
    return TableBlock(title, header, rows, "control-summary.csv", folded=len(rows) > FOLD_ROWS)


def _confusion(
    artifacts: Artifacts, shelf: Shelf, targets: Sequence[str], evaluation: pd.DataFrame
) -> list[FigureBlock]:
    tensors, classes = artifacts.tensors("control", "confusion.safetensors"), artifacts.classes()
    if not {"original", "edited", "targets"} <= set(tensors) or not classes:
        return []
    names = [targets[int(i)] if 0 <= int(i) < len(targets) else f"edit {int(i)}" for i in tensors["targets"]]
    strength = {} if "target" not in evaluation else evaluation.groupby("target")["alpha"].max().to_dict()
    titles = [f"{label(name, 16)}, α = {number(strength[name])}" if name in strength else name for name in names]
    more = len(names) - figures.MAX_MATRICES
    return shelf.figure(
        figures.confusion_matrices(
            tensors["original"],
            tensors["edited"],
            titles,
            [classes.index(name) if name in classes else None for name in names],
            classes,
        ),
        "control-confusion",
        "Confusion matrices before and after each edit.",
        "Confusion before any edit, and of the edited network for each class's edit; dark cells hold most images "
        "of their row. A clean edit empties the diagonal in the marked row alone, and the row shows which classes "
        "its images "
        "go to." + (f" {plural(more, 'more edit')} in the tables." if more > 0 else ""),
        "control-evaluation.csv",
    )
