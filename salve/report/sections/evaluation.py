# SPDX-License-Identifier: MIT
"""The original and the edited networks on evaluation sets."""

from collections.abc import Sequence

import pandas as pd

from salve.report.blocks import Block, Cell, Prose, Section, TableBlock, numbers
from salve.report.grouped import REPAIRED, sets_of, worst_group
from salve.report.tables import column, mean_of_known
from salve.report.text import MISSING, count_of, percent, plural
from salve.results import Artifacts

_CSV = "evaluation-evaluation.csv"


def evaluation(artifacts: Artifacts) -> Section | None:
    """Tables of sets and of groups; None where nothing was evaluated."""
    table = artifacts.table("evaluation", "evaluation.csv")
    if not {"set", "target", "class", "attribute_value", "accuracy"} <= set(table.columns):
        return None
    sets = sets_of(table)
    blocks: list[Block] = [
        Prose(
            "These measures decide nothing in the run. The original network is measured on them, and each "
            "that stage control edited: of these, the mean and the lowest are shown. A group is a class with a value "
            "of the attribute; the worst one counts, of those with images. Flips: how often the prediction changes "
            "when the shortcut is put into an image."
        ),
        _by_set(sets),
    ]
    for name, mine in sets.items():
        blocks += _by_group(name, mine)
    return Section("evaluation", "Evaluate: on other images", blocks, "evaluation")


def _by_set(sets: dict[str, pd.DataFrame]) -> TableBlock:
    repaired = any((mine["target"] == REPAIRED).any() for mine in sets.values())
    header = [
        Cell("set"),
        *numbers("images", "accuracy", "edited: mean", "edited: lowest", "worst group", "flips", "edited: flips"),
        *(numbers("repaired: accuracy", "repaired: worst group", "repaired: flips") if repaired else ()),
    ]
    rows = []
    for name, mine in sets.items():
        whole = mine[(mine["class"] == "") & (mine["attribute_value"] == "")]
        original, repair = whole[whole["target"] == ""], whole[whole["target"] == REPAIRED]
        edited = whole[~whole["target"].isin(["", REPAIRED])]
        accuracies = column(edited, "accuracy")
        worst = worst_group(mine[mine["target"] == ""])
        rows.append(
            [
                Cell(name),
                *numbers(count_of(int(original["images"].iloc[0])), percent(original["accuracy"].iloc[0])),
                *numbers(percent(mean_of_known(accuracies)), percent(accuracies.min() if len(accuracies) else None)),
                Cell(*_worst(worst)),
                *numbers(percent(original["flips"].iloc[0]), percent(mean_of_known(column(edited, "flips")))),
            ]
        )
        if repaired:
            after = Cell(*_worst(worst_group(mine[mine["target"] == REPAIRED])))
            accuracy, flips = numbers(percent(repair["accuracy"].iloc[0]), percent(repair["flips"].iloc[0]))
            rows[-1] += [accuracy, after, flips]
    return TableBlock("Accuracy on each set", header, rows, _CSV)


def _worst(worst: pd.Series | None) -> tuple[str, str, str]:
    if worst is None:
        return MISSING, "num", ""
    return percent(worst["accuracy"]), "num", f"{worst['class']}, {worst['attribute']} {worst['attribute_value']}"


def _by_group(name: str, mine: pd.DataFrame) -> Sequence[Block]:
    """The groups of one set, of the original network."""
    groups = mine[(mine["attribute_value"] != "") & (mine["target"] == "")]
    if not len(groups):
        return []
    values = list(dict.fromkeys(groups["attribute_value"]))
    header = [Cell("class"), *(Cell(f"{groups['attribute'].iloc[0]} {value}", "num") for value in values)]
    rows = []
    for of_class, own in groups.groupby("class", sort=False):
        cells = {
            row["attribute_value"]: Cell(percent(row["accuracy"]), "num", plural(int(row["images"]), "image"))
            for row in own.to_dict("records")
        }
        rows.append([Cell(str(of_class)), *(cells.get(value, Cell(MISSING, "num")) for value in values)])
    blocks: list[Block] = [
        TableBlock(f"{name}: accuracy of each group, before any edit", header, rows, _CSV, folded=True)
    ]
    empty = groups[groups["images"] == 0]
    if len(empty):
        names = [f"{row['class']} with {row['attribute']} {row['attribute_value']}" for row in empty.to_dict("records")]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        blocks.append(Prose(f"Set {name} has no image of {', '.join(names[:5])}{more}: such groups are left out."))
    return blocks
