# SPDX-License-Identifier: MIT
"""The per-class summary behind the terminal's table and the page's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

from salve.report.text import MISSING, is_missing, number, yes_no
from salve.report.verdict import Verdict
from salve.results import Artifacts

#: By artifact and table: the column that names the class, and what the summary takes from it.
SOURCES = (
    ("features", "classes.csv", "class", ("test_images", "test_accuracy")),
    ("features", "selected.csv", "class", ("latent", "sign", "kind")),
    (
        *("control", "summary.csv", "target"),
        (
            *("alpha", "alpha_used", "accuracy_before"),
            *("accuracy_after", "accuracy_after_low", "accuracy_after_high"),
            *("others_mean_change", "others_mean_change_low", "others_mean_change_high"),
            *("others_worst_loss", "others_worst_loss_low", "others_worst_loss_high", "worst_class"),
            *("separates", "separates_share", "reason"),
        ),
    ),
    ("validate", "localisation.csv", "class", ("pointing", "random_pointing")),
    ("diagnose", "summary.csv", "class", ("alpha_flip_median",)),
)
SUMMARY_COLUMNS = ("class", *(name for *_, names in SOURCES for name in names))
TEXTS = ("class", "kind", "worst_class", "separates", "reason")

Row = TypeVar("Row", bound=Mapping[str, Any])


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows by column name."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column as floats; all NaN where the table has none."""
    if name not in frame:
        return pd.Series(np.nan, index=frame.index, dtype=float)
    return pd.to_numeric(frame[name], errors="coerce").astype(float)


def critical(images: pd.DataFrame, criterion: Literal["logit", "flip"]) -> pd.Series:
    """The critical strengths of images: exact at the last site, elsewhere crossings found on a grid."""
    return column(images, f"{criterion}_crossing" if is_on_grid(images) else f"{criterion}_exact")


def is_on_grid(images: pd.DataFrame) -> bool:
    """Whether critical strengths were found on a grid, as at all sites but the last."""
    return "flip_crossing" in images


def class_names(artifacts: Artifacts) -> list[str]:
    """Class names in the classifier's order; where there is no classifier, in the order that tables give them."""
    if names := artifacts.record("classifier", "classifier.json").get("classes"):
        return [str(name) for name in names]
    for kind, table in (("features", "selected.csv"), ("features", "classes.csv"), ("diagnose", "summary.csv")):
        frame = artifacts.table(kind, table)
        if "class" in frame and len(frame):
            return list(dict.fromkeys(frame["class"]))
    return []


def chosen_latents(artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    """By class, the row of the latent chosen for its edits."""
    table = artifacts.table("features", "selected.csv")
    return {row["class"]: row for row in records(table)} if "class" in table else {}


def class_summary(artifacts: Artifacts) -> pd.DataFrame:
    """One row per class with the numbers that the stages found, missing where a stage has not run.

    Returns:
        Columns ``SUMMARY_COLUMNS`` but for ``accuracy_before``, which replaces ``test_accuracy`` where there is an
        edit: accuracies and changes are fractions of test images, ``alpha`` is the strength that select images chose
        (inf if none takes the class away), ``separates`` is text ("True", "False" or "").
    """
    rows = pd.DataFrame({"class": class_names(artifacts)})
    for kind, name, key, columns in SOURCES:
        table = artifacts.table(kind, name)
        if key not in table:
            continue
        table = table.drop_duplicates(key).set_index(key)
        for wanted in columns:
            if wanted in table:
                rows[wanted] = rows["class"].map(table[wanted])
    for name in SUMMARY_COLUMNS:
        if name not in rows:
            rows[name] = "" if name in TEXTS else np.nan
        if name in TEXTS:
            rows[name] = [("" if is_missing(value) else str(value)) for value in rows[name]]
        else:
            rows[name] = column(rows, name)
    # At an inner site edits are measured on some of the images; what they are compared with is of the same ones.
    rows["test_accuracy"] = rows["accuracy_before"].fillna(rows["test_accuracy"])
    return rows[[name for name in SUMMARY_COLUMNS if name != "accuracy_before"]]


def failing_first(rows: Sequence[Row], most: int) -> list[Row]:
    """Rows in their order; if there are more than ``most``, those that do not separate come first."""
    if len(rows) <= most:
        return list(rows)
    return sorted(rows, key=lambda row: yes_no(row.get("separates")) != "no")


@dataclass(frozen=True)
class Headline:
    """The main result of a run; None or zero where a stage has not run."""

    classes: int
    test_accuracy: float | None
    verdict: Verdict | None
    flip_low: float | None
    flip_high: float | None
    pointing: float | None
    random_pointing: float | None

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
    """Share of all test images that the untouched classifier gets right; None where it was not measured."""
    classes = artifacts.table("features", "classes.csv")
    images = column(classes, "test_images")
    if not images.sum() > 0:
        return None
    return float((column(classes, "test_accuracy") * images).sum() / images.sum())


def headline(artifacts: Artifacts, rows: pd.DataFrame) -> Headline:
    """The main result from ``class_summary``'s rows and what stage ``control`` judged."""
    flips = rows["alpha_flip_median"].dropna()
    return Headline(
        classes=len(rows),
        test_accuracy=overall_accuracy(artifacts),
        verdict=Verdict.of(artifacts.record("control", "verdict.json")),
        flip_low=float(flips.min()) if len(flips) else None,
        flip_high=float(flips.max()) if len(flips) else None,
        pointing=mean_of_known(rows["pointing"]),
        random_pointing=mean_of_known(rows["random_pointing"]),
    )
