# SPDX-License-Identifier: MIT
"""Edit methods beside each other, each at the strength of the same effect."""

from salve.report.blocks import Block, Cell, Prose, Section, TableBlock, numbers
from salve.report.tables import column, mean_of_known
from salve.report.text import MISSING, percent, points, yes_no
from salve.results import Artifacts


def compare(artifacts: Artifacts) -> Section | None:
    """Edit methods in a table, means over classes; None where the stage did not run."""
    edits = artifacts.table("compare", "edits.csv")
    if not {"method", "selectivity"} <= set(edits.columns):
        return None
    header = [
        *(Cell("method"), Cell("selectivity", "num"), Cell("classes taken", "num"), Cell("left", "num")),
        *(Cell("others change", "num"), Cell("worst loss", "num"), Cell("permanent")),
    ]
    rows = []
    for method, mine in edits.groupby("method", sort=False):
        reached = mine[[yes_no(value) == "yes" for value in mine["reached"]]]
        permanent = MISSING
        if len(reached):
            permanent = yes_no(all(yes_no(value) == "yes" for value in reached["permanent"]))
        means = {name: mean_of_known(column(reached, name)) for name in ("after", "drift", "worst_loss")}
        selectivity = mean_of_known(column(mine, "selectivity"))
        rows.append(
            [
                Cell(str(method)),
                *numbers(_points(selectivity), f"{len(reached)} of {len(mine)}", percent(means["after"])),
                *numbers(_points(means["drift"]), _points(means["worst_loss"])),
                Cell(permanent),
            ]
        )
    blocks: list[Block] = [
        Prose(
            "Every method takes each class away in turn, at the strength at which the class is at 5 % of select images "
            "or less. The numbers are of test images, in percentage points, and means over the classes that a method "
            "takes away; selectivity, what the class loses minus the mean absolute change of the others, is over all."
        ),
        TableBlock("Edit methods at a matched effect", header, rows, "compare-edits.csv"),
    ]
    return Section("compare", "Compare: other edits of the same effect", blocks, "compare")


def _points(value: float | None) -> str:
    return MISSING if value is None else points(value, signed=False)
