# SPDX-License-Identifier: MIT
"""Suspects, for a person to judge, and what a repair did."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from salve.report.audited import poor_suspects, ranked
from salve.report.blocks import Block, Cell, FigureFolder, Prose, Section, StripBlock, TableBlock, numbers
from salve.report.figures import validate as figures
from salve.report.repaired import STATES, done, rough, state_rows, taken_out, verdict, worst_of
from salve.report.tables import records
from salve.report.text import is_missing, label, latent_name, number, percent, slug, span, times
from salve.results import Artifacts

#: Suspects with pictures on the page, at most.
MOST_STRIPS = 24


def audit(artifacts: Artifacts, figure_folder: FigureFolder) -> Section | None:
    """The suspects of each class with their numbers and pictures; None where the stage did not run."""
    table, record = artifacts.table("audit", "suspects.csv"), artifacts.record("audit", "audit.json")
    if not {"class", "latent", "score"} <= set(table.columns):
        return None
    rows = records(table)
    has = {
        name for name in ("separation", "off_object", "counterfactual") if name in table and table[name].notna().any()
    }
    header = [
        *(Cell("class"), Cell("rank", "num"), Cell("latent"), Cell("score", "num")),
        *(Cell("effect", "num"), Cell("lift", "num")),
        *([Cell("separation", "num")] if "separation" in has else []),
        *([Cell("off the object", "num")] if "off_object" in has else []),
        *([Cell("turned by the mark", "num"), Cell("undone", "num")] if "counterfactual" in has else []),
    ]
    body = []
    for row in rows:
        cells = [Cell(str(row["class"])), *numbers(number(row["rank"])), Cell(latent_name(row["latent"], row["sign"]))]
        cells += numbers(number(row["score"]), number(row["effect"]), times(row["lift"]))
        if "separation" in has:
            cells.append(Cell(number(row["separation"]), "num", str(row.get("value", ""))))
        if "off_object" in has:
            cells += numbers(percent(row["off_object"], 0))
        if "counterfactual" in has:
            cells += numbers(percent(row["turned"]), percent(row["counterfactual"], 0))
        body.append(cells)
    blocks: list[Block] = [
        Prose(
            "A suspect is a latent that pushes images towards a class which they are not of. Effect: how much the "
            "class's logit falls per strength of the gate, on the images of other classes that come nearest to it. "
            "Lift: how much likelier images of other classes are taken for it, or nearly so, where the latent is "
            f"active. {ranked(record)} All other numbers here are of test images. Whether the network may rely on a "
            "suspect is for you to say: look at its images, all of other classes."
        ),
        *([Prose(poor)] if (poor := poor_suspects(artifacts)) else []),
        *_strips(artifacts, figure_folder, rows),
        TableBlock("Suspects", header, body, "audit-suspects.csv", folded=len(body) > 25),
    ]
    return Section("audit", "Audit: what pushes images towards a class", blocks, "audit")


def _strips(artifacts: Artifacts, figure_folder: FigureFolder, rows: list[dict[str, Any]]) -> list[StripBlock]:
    """The images of other classes that excite the suspects most, of the classes with the highest scores first."""
    pictures = artifacts.tensors("audit", "pictures.safetensors")
    table = artifacts.table("audit", "pictures.csv")
    images = pictures.get("images", np.zeros((0,), np.uint8))
    named = ((figures.OWN_MAP, "own_maps"), (figures.GRAD_FAM, "maps"))
    maps = {name: pictures[key] for name, key in named if key in pictures}
    best: dict[str, float] = {}
    for row in rows:
        best[row["class"]] = max(best.get(row["class"], 0.0), float(row["score"]))
    numbered = list(enumerate(rows))[: len(images)]
    numbered.sort(key=lambda one: (-best[one[1]["class"]], one[0]))
    blocks = []
    for at, row in numbered[:MOST_STRIPS]:
        own = table[(table["class"] == row["class"]) & (table["rank"] == row["rank"])] if len(table) else pd.DataFrame()
        captions = [
            (f"{label(one['label'], 9)}{' → ' + label(one['taken_for'], 9) if wrong else ''}", wrong)
            for one in records(own)
            for wrong in [one["taken_for"] == row["class"]]
        ]
        shown = {kind: of_kind[at] for kind, of_kind in maps.items()}
        figure = figures.class_strip(None, images[at], shown, captions)
        name = f"audit-{at:03d}-{slug(str(row['class']))}"
        alt = f"Test images of other classes that excite a suspect of {row['class']} most, and the same under its maps."
        saved = figure_folder.figure(figure, name, alt)
        facts = [("Effect", number(row["effect"]), ""), ("Lift", times(row["lift"]), "")]
        if not is_missing(row.get("separation")):
            facts.append(("Separation", number(row["separation"]), str(row.get("value", ""))))
        if not is_missing(row.get("off_object")):
            facts.append(("Off the object", percent(row["off_object"], 0), ""))
        if not is_missing(row.get("counterfactual")):
            facts.append(("Undone", percent(row["counterfactual"], 0), "of what the mark turns"))
        subtitle = f"suspect {number(row['rank'])}, latent {latent_name(row['latent'], row['sign'])}"
        blocks.append(StripBlock(str(row["class"]), subtitle, saved[0] if saved else None, facts))
    return blocks


def repair(artifacts: Artifacts) -> Section | None:
    """What was chosen, and the network before and after; None where the stage did not run."""
    record = artifacts.record("repair", "repair.json")
    if not record:
        return None
    absent = left = ""
    if names := record["groups_without_images"]:
        absent = f" No test image is in the group {'; '.join(names)}, so the worst group leaves it out."
    if few := rough(record):
        absent += f" {few}"
    if whys := list(dict.fromkeys(record["left_out"])):
        left = f" Left out: {' '.join(whys)}"
    pairs = " Test images count with the mark and without it." if record["pairs"] else ""
    by_groups = f"groups are classes × {record['attribute']}" if record["attribute"] else "groups are classes"
    if what := done(record):
        chosen = (
            f"{what}. This was chosen on select images and is in repaired.safetensors, a plain state_dict; the edit "
        )
        chosen += "files undo it."
    else:
        chosen = "the network stays as it was, and repaired.safetensors holds its weights unchanged."
    blocks: list[Block] = [
        Prose(
            f"The repair of {taken_out(record)}: {chosen} {verdict(record)} Biases alone are the control that a "
            f"repair must beat. All numbers are of test images; {by_groups}, and the average weighs them by their "
            "shares of the train images, or of the test images where no train image's group is known."
            f"{pairs} Below the numbers are 95\u00a0% intervals.{absent}{left}"
        ),
        _states(record),
        _groups(artifacts, record["attribute"]),
    ]
    rivals = artifacts.table("repair", "rivals.csv")
    if len(rivals):
        blocks.insert(2, _rivals(rivals, record))
    changed = artifacts.table("repair", "changed.csv")
    if len(changed):
        blocks.append(_changed(changed))
    return Section("repair", "Repair: what the network relies on, before and after", blocks, "repair")


def _states(record: dict[str, Any]) -> TableBlock:
    names = [worst_of(record), "average", *(["prediction changed by the mark"] if record["pairs"] else [])]
    header = [Cell("network"), *(Cell(name, "num") for name in names), Cell(f"which is the {worst_of(record)}")]
    body = [
        [
            Cell(name),
            *(Cell(value, "num", interval) for value, interval in cells),
            Cell(record[f"worst_group_of_{state}"]),
        ]
        for (name, cells), state in zip(state_rows(record), STATES, strict=True)
    ]
    return TableBlock("Before and after", header, body)


def _rivals(rivals: pd.DataFrame, record: dict[str, Any]) -> TableBlock:
    """Every method at its best candidate on select images."""
    measures = {"worst_group": "worst group", "average": "average"}
    if record["pairs"]:
        measures["counterfactual_flips"] = "prediction changed by the mark"
    names = (*measures.values(), "within the budget", "in the weights")
    header = [Cell("method"), Cell("latents"), Cell("α", "num"), *(Cell(name, "num") for name in names)]
    body = [
        [
            *(Cell(str(row["method"])), Cell(str(row["latents"] or "–")), Cell(number(row["alpha"]), "num")),
            *(
                Cell(percent(row[name]), "num", span(row[f"{name}_low"], row[f"{name}_high"], percent))
                for name in measures
            ),
            *(Cell("yes" if row[name] else "no", "num") for name in ("allowed", "permanent")),
        ]
        for row in records(rivals)
    ]
    return TableBlock(
        "All methods, each as select images choose it, with new biases", header, body, "repair-rivals.csv"
    )


def _groups(artifacts: Artifacts, attribute: str) -> TableBlock:
    table = artifacts.table("repair", "groups.csv")
    header = [
        Cell("class"),
        Cell(attribute or "value"),
        Cell("images", "num"),
        *(Cell(name, "num") for name in STATES.values()),
    ]
    write = partial(percent, decimals=0)
    body = [
        [
            *(Cell(str(row["class"])), Cell(str(row["value"])), Cell(number(row["images"]), "num")),
            *(
                Cell(write(row[state]), "num", span(row[f"{state}_low"], row[f"{state}_high"], write))
                for state in STATES
            ),
        ]
        for row in records(table)
    ]
    return TableBlock("Accuracy of each group", header, body, "repair-groups.csv", folded=len(body) > 25)


def _changed(changed: pd.DataFrame) -> TableBlock:
    named = "file" in changed and not all(map(is_missing, changed["file"]))
    header = [Cell("image", "num"), *([Cell("file")] if named else []), Cell("value"), Cell("class")]
    header += [Cell("before"), Cell("after")]
    body = []
    for row in records(changed):
        right = {state: row["class"] == row[state] for state in ("before", "after")}
        styles = {state: "good" if right[state] else "bad" for state in right}
        body.append(
            [
                *(Cell(number(row["image"]), "num"), *([Cell(str(row["file"]))] if named else [])),
                *(Cell(str(row["value"])), Cell(str(row["class"]))),
                *(Cell(str(row[state]), styles[state]) for state in ("before", "after")),
            ]
        )
    return TableBlock("Test images whose prediction changes", header, body, "repair-changed.csv", folded=True)
