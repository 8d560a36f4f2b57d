# SPDX-License-Identifier: MIT
"""How hard each class has to be pushed before it breaks."""

import pandas as pd

from salve.report.blocks import Block, Cell, FigureFolder, Prose, Section, TableBlock
from salve.report.figures import diagnose as figures
from salve.report.tables import class_names, is_on_grid, records
from salve.report.text import PERCENT, latent_name, number, percent, yes_no
from salve.results import Artifacts

FOLD_ROWS = 25


def diagnose(artifacts: Artifacts, figure_folder: FigureFolder) -> Section:
    """How hard each class has to be pushed before it breaks."""
    blocks: list[Block] = []
    images, summary = artifacts.table("diagnose", "images.csv"), artifacts.table("diagnose", "summary.csv")
    on_grid = is_on_grid(images)
    if len(images) or len(summary):
        blocks.append(
            Prose(
                "The critical strength is the smallest α at which suppressing the class's latent breaks one image: "
                "α_logit when the class logit reaches zero, α_flip when the prediction leaves the class. A low "
                "value means that the class depends on this one latent; ∞ means that no strength breaks the image, "
                "because other channels carry it."
                + (
                    " The network behind this site is not linear. So a value is the first crossing on the grid of "
                    "strengths (edit.alpha), refined by bisection to 1 %, and ∞ means that the image holds at every "
                    f"strength of the grid. It was sought for {len(images)} test images, as many of each class "
                    "(edit.images)."
                    if on_grid
                    else ""
                )
            )
        )
    if len(images) and "class" in images:
        right = images[[yes_no(value) == "yes" for value in images["correct"]]] if "correct" in images else images
        there = set(images["class"])
        order = [name for name in class_names(artifacts) if name in there] or sorted(there)
        shown = figures.MAX_ROWS
        blocks += figure_folder.figure(
            figures.strength_distributions(right, order),
            "diagnose-strengths",
            "Per class, the distribution of the critical strengths of its images, with the share that is infinite.",
            "One dot per correctly classified test image; the box spans the quartiles around the median, the line the "
            "10th to the 90th percentile, and all of them count ∞ as a value. Boxes far to the left are classes "
            "that are easily broken; the column on the right is the share of images that no strength breaks."
            + (f" The first {shown} of {len(order)} classes are shown." if len(order) > shown else ""),
            "diagnose-images.csv",
        )
        blocks += figure_folder.figure(
            figures.agreement_scatter(right),
            "diagnose-agreement",
            "Scatter plots of approximated critical strengths against the refined ones."
            if on_grid
            else "Scatter plots of approximated and of empirical critical strengths against the exact ones.",
            "Each dot is a correctly classified image. The linear approximation follows the slope that the network has "
            "without an edit; for α_flip, that of the lead over the strongest other class."
            if on_grid
            else "Each dot is a correctly classified image. The linear approximation is exact (on the line) until a "
            "channel closes. The empirical value is the first α of the grid at or above the exact one, so it forms "
            "steps on or just above the line.",
            "diagnose-images.csv",
        )
    if len(summary) and "class" in summary:
        blocks.append(_strength_table(summary))
    return Section("diagnose", "Diagnose: how much it takes", blocks, "diagnose")


def _strength_table(summary: pd.DataFrame) -> TableBlock:
    columns = (
        ("α_flip median", "alpha_flip_median", number),
        (f"10{PERCENT}", "alpha_flip_q10", number),
        (f"90{PERCENT}", "alpha_flip_q90", number),
        ("never flips", "alpha_flip_infinite", percent),
        ("α_logit median", "alpha_logit_median", number),
        ("never zero", "alpha_logit_infinite", percent),
        ("linear = exact", "linear_exact_agreement", percent),
        ("grid brackets exact", "grid_agreement", percent),
        ("linear = refined", "linear_agreement", percent),
    )
    used = [entry for entry in columns if entry[1] in summary]
    header = [Cell("class"), Cell("latent"), Cell("images", "num"), *(Cell(title, "num") for title, _, _ in used)]
    rows = []
    for row in records(summary):
        count = f"{number(row.get('correct'), 7)} of {number(row.get('images'), 7)}" if "correct" in row else "–"
        first = [Cell(str(row["class"])), Cell(latent_name(row.get("latent"))), Cell(count, "num")]
        rows.append([*first, *(Cell(write(row.get(name)), "num") for _, name, write in used)])
    title = (
        "Critical strengths per class, on test images (images: correctly classified of all); "
        f"10{PERCENT}, 90{PERCENT}: the strength below which so many of them lose their class"
    )
    return TableBlock(title, header, rows, "diagnose-summary.csv", folded=len(rows) > FOLD_ROWS)
