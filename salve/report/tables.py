"""The per-class summary: one table of numbers behind the terminal's summary and the page's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from salve.report.inputs import Artifacts, column, records
from salve.report.text import MISSING, is_missing, label, latent_name, number, percent, points, yes_no

SUMMARY_COLUMNS = (
    *("class", "val_accuracy", "latent", "sign", "kind", "alpha", "accuracy_after", "others_mean_change"),
    *("others_worst_change", "worst_class", "separates", "separates_strictly", "reason"),
    *("pointing", "random_pointing", "alpha_flip_median"),
)


def class_summary(artifacts: Artifacts) -> pd.DataFrame:
    """One row per class with the numbers that the stages found, missing where a stage has not run.

    Returns:
        Columns ``SUMMARY_COLUMNS``: accuracies and changes are fractions, ``alpha`` is the first strength of the grid
        at which the class's accuracy is at most 5 % (inf if none), ``separates`` is text ("True", "False" or "").
    """
    rows = pd.DataFrame({"class": artifacts.classes()})
    for kind, name, key, columns in (
        ("features", "classes.csv", "class", ("val_accuracy",)),
        ("features", "selected.csv", "class", ("latent", "sign", "kind")),
        (
            *("control", "summary.csv", "target"),
            (
                "alpha",
                "accuracy_after",
                "others_mean_change",
                "others_worst_change",
                "worst_class",
                "separates",
                "separates_strictly",
                "reason",
            ),
        ),
        ("validate", "localisation.csv", "class", ("pointing", "random_pointing")),
        ("diagnose", "summary.csv", "class", ("alpha_flip_median",)),
    ):
        table = artifacts.table(kind, name)
        if key not in table:
            continue
        table = table.drop_duplicates(key).set_index(key)
        for wanted in columns:
            if wanted in table:
                rows[wanted] = rows["class"].map(table[wanted])
    for name in SUMMARY_COLUMNS:
        text = name in ("class", "kind", "worst_class", "separates", "separates_strictly", "reason")
        if name not in rows:
            rows[name] = "" if text else np.nan
        if text:
            rows[name] = [("" if is_missing(value) else str(value)) for value in rows[name]]
        else:
            rows[name] = column(rows, name)
    return rows[list(SUMMARY_COLUMNS)]


@dataclass(frozen=True)
class Headline:
    """The main result of a run; None or zero where a stage has not run."""

    classes: int
    val_accuracy: float | None
    separate: int
    strictly: int
    judged: int
    flip_low: float | None
    flip_high: float | None
    pointing: float | None
    random_pointing: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.strictly <= self.separate <= self.judged <= self.classes:
            raise ValueError("More classes separate than were judged, or more were judged than there are.")

    @property
    def flip_range(self) -> str:
        """Lowest and highest class median of α_flip."""
        if self.flip_low is None or self.flip_high is None:
            return MISSING
        low, high = number(self.flip_low), number(self.flip_high)
        return low if low == high else f"{low} to {high}"


def mean_of_known(values: pd.Series) -> float | None:
    """Mean of the values that are not missing; None where all are."""
    known = values.dropna()
    return float(known.mean()) if len(known) else None


def overall_accuracy(artifacts: Artifacts) -> float | None:
    """Share of all validation images that the untouched classifier gets right; None where it was not measured."""
    classes = artifacts.table("features", "classes.csv")
    if not len(classes):
        return None
    return float((column(classes, "val_accuracy") * column(classes, "val_images")).sum() / classes["val_images"].sum())


def headline(artifacts: Artifacts, rows: pd.DataFrame) -> Headline:
    """The main result from ``class_summary``'s rows and the classifier's record."""
    flips = rows["alpha_flip_median"].dropna()
    accuracy = overall_accuracy(artifacts)
    verdicts = [yes_no(value) for value in rows["separates"]]
    return Headline(
        classes=len(rows),
        val_accuracy=accuracy,
        separate=verdicts.count("yes"),
        strictly=[yes_no(value) for value in rows["separates_strictly"]].count("yes"),
        judged=len(verdicts) - verdicts.count(MISSING),
        flip_low=float(flips.min()) if len(flips) else None,
        flip_high=float(flips.max()) if len(flips) else None,
        pointing=mean_of_known(rows["pointing"]),
        random_pointing=mean_of_known(rows["random_pointing"]),
    )


def summary_table(artifacts: Mapping[str, Path]) -> Table:
    """The run's summary for the terminal: one row per class and a footer with the main result.

    Args:
        artifacts: stage kind → folder; columns of stages that have not run show "–".

    Returns:
        A rich table: validation accuracy, the class's latent with its sign and kind, the first α at which its accuracy
        is at most 5 %, mean absolute and worst change of the other classes there (percentage points), whether the
        class separates, the pointing game's hits (only where it was measured), and the median α_flip.
    """
    found = Artifacts(artifacts)
    rows = class_summary(found)
    main = headline(found, rows)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, padding=0)
    table.title, table.title_justify = "SALVE, class by class", "left"
    defining = int((rows["kind"] == "class-defining").sum())
    measured = main.pointing is not None
    columns: list[tuple[str, str]] = [
        ("class", f"{main.classes} in all"),
        ("val\nacc. %", _bare(percent(main.val_accuracy))),
        ("latent", ""),
        ("kind", f"{defining} def." if defining else ""),
        ("α to\n≤5 %", ""),
        ("mean\n|Δ|", ""),
        ("worst\nΔ", ""),
        ("sepa-\nrates", f"{main.separate}/{main.judged}" if main.judged else MISSING),
        *([("point-\ning %", _bare(percent(main.pointing, 0)))] if measured else []),
        ("median\nα_flip", main.flip_range.replace(" to ", " to\n")),
    ]
    for name, footer in columns:
        text = name in ("class", "kind")
        justify: Literal["left", "right"] = "left" if text else "right"
        table.add_column(name, Text(footer), justify=justify, no_wrap=name != "class", overflow="fold", min_width=4)
    for row in records(rows):
        verdict = yes_no(row["separates"])
        cells = [
            label(row["class"], 32),
            _bare(percent(row["val_accuracy"])),
            latent_name(row["latent"], row["sign"]).replace("(", "").replace(")", ""),
            row["kind"].removeprefix("class-").removesuffix("-class") or MISSING,
            number(row["alpha"]),
            points(row["others_mean_change"], signed=False),
            points(row["others_worst_change"]),
            verdict,
            *([_bare(percent(row["pointing"], 0))] if measured else []),
            number(row["alpha_flip_median"]),
        ]
        table.add_row(*map(Text, cells), style="bold red" if verdict == "no" else "")
    table.caption = "|Δ|, Δ: change of the other classes' accuracy at that α, in percentage points."
    table.caption_justify = "left"
    return table


def _bare(text: str) -> str:
    """Without the unit, which the column's heading has."""
    return text.removesuffix("\u00a0%")
