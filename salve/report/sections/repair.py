# SPDX-License-Identifier: MIT
"""Suspects, for a person to judge, and what a repair did."""

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from salve.report.blocks import Block, Cell, FigureFolder, Prose, Section, StripBlock, TableBlock, numbers
from salve.report.figures import validate as figures
from salve.report.tables import records
from salve.report.text import is_missing, label, latent_name, number, percent, plural, slug, span, times
from salve.results import Artifacts

#: Suspects with pictures on the page, at most.
MOST_STRIPS = 24
#: The states of a network that a repair is told by, with their names.
STATES = {
    "before": "before",
    "recalibrated": "biases alone",
    "edited": "edit alone",
    "after": "repaired",
}
#: The method of a repair that leaves the network as it was.
NOTHING = "nothing"
#: What a repair that edits no latent does, in words.
WITHOUT_LATENTS = {"dfr": "the head trained anew (dfr)", "leace": "the attribute erased (leace)"}


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
        *(Cell("class"), Cell("rank", "num"), Cell("latent"), Cell("effect", "num"), Cell("lift", "num")),
        *([Cell("separation", "num")] if "separation" in has else []),
        *([Cell("off the object", "num")] if "off_object" in has else []),
        *([Cell("turned by the mark", "num"), Cell("undone", "num")] if "counterfactual" in has else []),
    ]
    body = []
    for row in rows:
        cells = [Cell(str(row["class"])), *numbers(number(row["rank"])), Cell(latent_name(row["latent"], row["sign"]))]
        cells += numbers(number(row["effect"]), times(row["lift"]))
        if "separation" in has:
            cells.append(Cell(number(row["separation"]), "num", str(row.get("value", ""))))
        if "off_object" in has:
            cells += numbers(percent(row["off_object"], 0))
        if "counterfactual" in has:
            cells += numbers(percent(row["turned"]), percent(row["counterfactual"], 0))
        body.append(cells)
    how = (
        f"They are ranked on {plural(record['labelled'], 'select image')} whose {record['attribute']} is known, "
        f"at most {record['labels']} of each group: by how well the latent tells it within a class, times its effect."
        if record.get("labels")
        else "They are ranked without labels, on select images: by the effect, times how far the lift is above 1."
    )
    blocks: list[Block] = [
        Prose(
            "A suspect is a latent that pushes images towards a class which they are not of. Effect: how much the "
            "class's logit falls per strength of the gate, on the images of other classes that come nearest to it. "
            "Lift: how much likelier images of other classes are taken for it, or nearly so, where the latent is "
            f"active. {how} All numbers here are of test images. Whether the network may rely on a suspect is for you "
            "to say: look at its images, all of other classes."
        ),
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
    latents = ", ".join(map(str, record["latents"]))
    what = f"{record['method']} of the {'latent' if len(record['latents']) == 1 else 'latents'} {latents}"
    biases = " and ".join(
        f"the bias of {name} {'raised' if shift > 0 else 'lowered'} by {number(abs(shift))} logits"
        for name, shift in record["shifts"].items()
        if shift
    )
    absent = left = ""
    if names := record["groups_without_images"]:
        absent = f" No test image is in the group {'; '.join(names)}, so the worst group leaves it out."
    if few := record.get("small_groups"):
        named = "; ".join(f"{name} ({count})" for name, count in few.items())
        absent += f" Groups of few test images, whose accuracy is rough: {named}."
    if whys := list(dict.fromkeys(record["left_out"])):
        left = f" Left out: {' '.join(whys)}"
    pairs = " Test images count with the mark and without it." if record["pairs"] else ""
    by_groups = f"groups are classes × {record['attribute']}" if record["attribute"] else "groups are classes"
    what = what if latents else WITHOUT_LATENTS.get(record["method"], record["method"])
    at = "" if record["method"] == "dfr" else f" at α = {number(record['alpha'])}"
    edit = f"{what}{at}, with " if record["alpha"] else ""
    if edit or biases:
        chosen = f"{edit}{biases or 'no bias changed'}. This was chosen on select images and is in"
    else:
        chosen = "nothing that was tried helps within the budget on select images. The untouched weights are in"
    blocks: list[Block] = [
        Prose(
            f"The repair of {record['suspects']}: {chosen} "
            "repaired.safetensors, a plain state_dict; the edit files undo it. Biases alone are the "
            f"control that a repair must beat. All numbers are of test images; {by_groups}, and the average weighs "
            f"them by their shares of the train images.{pairs} Below the numbers are 95\u00a0% intervals.{absent}{left}"
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


def helped(record: dict[str, Any]) -> bool:
    """Whether a repair's worst group is better than that of the untouched network and of new biases alone, by more than
    the standard error of both together: on few test images less is chance."""
    after, before = record["worst_group_after"], max(record["worst_group_before"], record["worst_group_recalibrated"])
    spans = [record[f"worst_group_{one}_high"] - record[f"worst_group_{one}_low"] for one in ("before", "after")]
    error = math.hypot(*spans) / 4  # an interval of 95 % is about four standard errors wide
    return bool(after - before > error)


def verdict(record: dict[str, Any]) -> str:
    """Whether the repair helped on test images, in a sentence or two."""
    if record["method"] == NOTHING and not record["labels"]:
        return (
            "The network stays as it was: nothing that was tried keeps the accuracy on select images within the budget "
            "(repair.max_accuracy_loss)."
        )
    if record["method"] == NOTHING:
        return (
            "The network stays as it was: on select images nothing that was tried gains the worst group more than its "
            "standard error within the budget (repair.max_accuracy_loss)." + _forgone(record)
        )
    if not record["attribute"]:
        return (
            "Whether this helped cannot be told without groups or a mark on test images: look at the images in "
            "changed.csv, and judge."
        )
    before, alone, after = (percent(record[f"worst_group_{one}"]) for one in ("before", "recalibrated", "after"))
    average = " instead of ".join(percent(record[f"average_{one}"]) for one in ("after", "before"))
    numbers_ = (
        f"the worst group was right on {before}, on {alone} with new biases alone, and on {after} repaired, and the "
        f"average is {average}"
    )
    paid = ""
    if record["average_before"] - record["average_after"] > record.get("max_accuracy_loss", math.inf):
        paid = " That is more than the budget, which could only be held on select images."
    if helped(record):
        return f"The repair helped: on test images {numbers_}.{paid}{_forgone(record)}"
    if record["worst_group_after"] > max(record["worst_group_before"], record["worst_group_recalibrated"]):
        return f"The repair may have helped, by no more than chance: on test images {numbers_}.{paid}{_forgone(record)}"
    return f"The repair did NOT help: on test images {numbers_}. Keep the network as it was.{_forgone(record)}"


def _forgone(record: dict[str, Any]) -> str:
    """What a larger budget would have allowed."""
    other = record.get("beyond_budget")
    if not other or not record["labels"]:  # without labels the score is no share of a group
        return ""
    share, chosen = (percent(value) for value in (other["select_score"], record["select_score"][0]))
    return (
        f" Beyond the budget, {other['method']} has {share} of the worst group of select images in place of {chosen}; "
        "a larger repair.max_accuracy_loss allows it."
    )


def state_rows(record: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each state its name, and each measure with its interval as text."""
    measures = ["worst_group", "average", *(["counterfactual_flips"] if record["pairs"] else [])]
    rows = []
    for state, name in STATES.items():
        cells = []
        for measure in measures:
            key = f"{measure}_{state}"
            cells.append((percent(record[key]), span(record[f"{key}_low"], record[f"{key}_high"], percent)))
        rows.append((name, cells))
    return rows


def _states(record: dict[str, Any]) -> TableBlock:
    names = ["worst group", "average", *(["prediction changed by the mark"] if record["pairs"] else [])]
    header = [Cell("network"), *(Cell(name, "num") for name in names), Cell("which group is worst")]
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
