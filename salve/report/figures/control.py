# SPDX-License-Identifier: MIT
"""What an edit does: accuracy against strength, confusion before and after, fast path against slow path."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from salve.report.style import BLUE, GREY, SKY, VERMILLION, WIDTH, grid_axis, new_figure, percent_axis, styled
from salve.report.tables import column
from salve.report.text import label, number

MAX_PANELS = 24
MAX_MATRICES = 11
COLUMNS = 4
NAMED = 12  # up to so many classes names on the axes are large
MAX_CLASSES = 100  # up to so many a confusion matrix shows all
TOUCHED = 24  # of more, it shows so many


def _curve_panel(axes: Axes, rows: pd.DataFrame) -> None:
    """Accuracy against α for one target: of its own classes, and of the others their mean and extremes."""
    rows = rows[np.isfinite(column(rows, "alpha"))].sort_values("alpha")
    names = ("alpha", "accuracy", "others_lowest", "others_highest", "others_accuracy")
    strengths, own, lowest, highest, mean = (column(rows, name).to_numpy() for name in names)
    if np.isfinite(mean).any():
        axes.fill_between(strengths, lowest, highest, color=SKY, alpha=0.28, linewidth=0)
        axes.plot(strengths, lowest, color=SKY, linewidth=0.9)
        axes.plot(strengths, mean, color=BLUE)
    axes.plot(strengths, own, color=VERMILLION, marker="o", markersize=2.8)
    grid_axis(axes, strengths)


@styled
def strength_curves(
    curves: pd.DataFrame,
    targets: Sequence[str],
    notes: Mapping[str, tuple[str, bool]],
    marks: Mapping[str, float],
    threshold: float | None = None,
) -> Figure | None:
    """Small multiples: accuracy against α, one panel per target.

    Args:
        curves: columns target, alpha, accuracy, others_accuracy, others_lowest, others_highest [fractions]; of one mode
            and one split only.
        targets: the panels and their order; the first ``MAX_PANELS`` that have rows are drawn.
        notes: by target, a short note under its name, and whether it is good news.
        marks: by target, an α to mark with a vertical line; not drawn unless finite.
        threshold: accuracy drawn as a dotted line [fraction].

    Returns:
        None where no target has a curve.
    """
    known = set(curves["target"]) if "target" in curves else set()
    targets = [target for target in targets if target in known][:MAX_PANELS]
    if not targets:
        return None
    across = min(COLUMNS, len(targets))
    down = -(-len(targets) // across)
    figure = new_figure(max(4.2, WIDTH * across / COLUMNS), 0.7 + 1.65 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for i, (axes, target) in enumerate(zip(grid.flat, targets, strict=False)):
        _curve_panel(axes, curves[curves["target"] == target])
        note, good = notes.get(target, ("", True))
        axes.set_title(label(target, 26) + "\n")
        axes.text(
            0, 1.03, note, transform=axes.transAxes, fontsize=7.5, va="bottom", color="#4b535c" if good else VERMILLION
        )
        if threshold is not None:
            axes.axhline(threshold, color=GREY, linestyle=":", linewidth=1)
        if np.isfinite(marks.get(target, np.inf)):
            axes.axvline(marks[target], color=GREY, linestyle="--", linewidth=1)
        # The lowest panel of each column carries the tick labels, also where the last row is not full.
        axes.tick_params(labelbottom=i + across >= len(targets))
    grid[0, 0].set_ylim(-0.04, 1.04)
    percent_axis(grid[0, 0].yaxis)
    for axes in list(grid.flat)[len(targets) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=VERMILLION, marker="o", markersize=3, label="the class edited for"),
        Line2D([], [], color=BLUE, label="other classes, mean"),
        Patch(color=SKY, alpha=0.35, label="other classes, lowest to highest"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    figure.supxlabel("strength α of the edit", fontsize=9)
    figure.supylabel("accuracy on test images", fontsize=9)
    return figure


def matrix_classes(counts: pd.DataFrame, targets: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The classes that confusion matrices show: all of them, or if they are too many, those that edits touch.

    Args:
        counts: columns target, true, predicted, images. targets: the edits that are drawn. classes: all names.

    Returns:
        Up to ``MAX_CLASSES`` classes all; of more, the targets that are classes, then those that their images are
        predicted as most often, up to ``TOUCHED`` in all; in the order of ``classes``.
    """
    if len(classes) <= MAX_CLASSES:
        return list(classes)
    kept = [name for name in dict.fromkeys(targets) if name in set(classes)][:TOUCHED]
    own = counts[counts["target"].isin(targets) & (counts["true"] == counts["target"])]
    taken = own.groupby("predicted", sort=False)["images"].sum().sort_values(ascending=False, kind="stable")
    kept += [name for name in taken.index if name in set(classes) and name not in kept]
    kept += [name for name in classes if name not in set(kept)][: max(0, TOUCHED - len(kept))]
    chosen = set(kept[:TOUCHED])
    return [name for name in classes if name in chosen]


def confusion_matrix(
    counts: pd.DataFrame, classes: Sequence[str], rest: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Counts of one network as a matrix, rows = true class.

    Args:
        counts: columns true, predicted, images. classes: C names. rest: gather all other true classes in one more row.

    Returns:
        ``[R, C]`` counts, R = C or C + 1, and ``[R]`` images of each row that were predicted as anything else.
    """
    place = {name: i for i, name in enumerate(classes)}
    beyond = len(classes)
    matrix = np.zeros((beyond + 1, beyond + 1))
    rows = counts["true"].map(place).fillna(beyond).astype(int)
    columns = counts["predicted"].map(place).fillna(beyond).astype(int)
    np.add.at(matrix, (rows, columns), counts["images"].to_numpy(dtype=float))
    matrix = matrix if rest else matrix[:-1]
    return matrix[:, :-1], matrix[:, -1]


def _matrix_panel(
    axes: Axes, counts: NDArray[np.floating], elsewhere: NDArray[np.floating] | None, title: str, row: int | None
) -> None:
    counts = counts if elsewhere is None else np.column_stack([counts, elsewhere])
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal", rasterized=True)
    axes.grid(False)
    axes.set_title(title, fontsize=8.5)
    axes.spines[:].set_visible(True)
    axes.tick_params(length=0)
    down, across = counts.shape
    if row is not None and down <= TOUCHED + 1:
        frame = Rectangle((-0.5, row - 0.5), across, 1, fill=False, edgecolor=VERMILLION, linewidth=1.3, clip_on=False)
        axes.add_patch(frame)
    elif row is not None:
        # Rows this thin would vanish under a frame: an arrow beside the matrix points at the row instead.
        axes.plot([across * 1.03], [row], marker="<", color=VERMILLION, markersize=6, clip_on=False)
        axes.set(xlim=(-0.5, across - 0.5), ylim=(down - 0.5, -0.5))


@styled
def confusion_matrices(
    counts: pd.DataFrame, targets: Sequence[str], titles: Sequence[str], classes: Sequence[str], some: bool
) -> Figure | None:
    """Confusion before any edit, then after each edit, rows in percent of the true class.

    Args:
        counts: columns target ("" for the untouched network), true, predicted, images.
        targets: the edits, at most ``MAX_MATRICES``; the row of one that is a class is marked. titles: their names.
        classes: the classes that are drawn; written on the axes up to ``TOUCHED``, else their numbers.
        some: there are others, which share one row and one column.

    Returns:
        None where nothing was counted.
    """
    if counts.empty:
        return None
    networks = ["", *targets]
    matrices = [confusion_matrix(counts[counts["target"] == name], classes, some) for name in networks]
    # Predictions outside the drawn classes need a column, where there are any.
    wide = any(elsewhere.any() for _, elsewhere in matrices)
    across = min(COLUMNS, len(networks))
    down = -(-len(networks) // across)
    named, many = len(classes) <= TOUCHED, len(classes) > NAMED
    figure = new_figure(
        max(3.4, WIDTH * across / COLUMNS), 0.2 + (2.5 if many else 2.15) * down + (0.9 if many else 0.75) * named
    )
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, name, title, (matrix, elsewhere) in zip(
        grid.flat, networks, ["before any edit", *titles], matrices, strict=False
    ):
        row = list(classes).index(name) if name in classes else None
        _matrix_panel(axes, matrix, elsewhere if wide else None, label(title, 28), row)
    for axes in list(grid.flat)[len(networks) :]:
        axes.set_visible(False)
    if named:
        names = [label(name, 16) for name in classes]
        rows, columns = [*names, *(["all others"] if some else [])], [*names, *(["elsewhere"] if wide else [])]
        grid[0, 0].set_yticks(range(len(rows)), rows)
        grid[0, 0].set_xticks(range(len(columns)), columns)
        for axes in grid.flat:
            axes.tick_params(labelsize=5.0 if many else 6.5)
            axes.tick_params(axis="x", labelrotation=90)
    unit = "" if named else " (number)"
    figure.supxlabel("predicted class" + unit, fontsize=9)
    figure.supylabel("true class" + unit, fontsize=9)
    return figure


@styled
def path_agreement(evaluation: pd.DataFrame) -> Figure | None:
    """Accuracy by the fast path (cached activations) against the slow path (the edited network itself).

    Args:
        evaluation: columns accuracy_cached and accuracy_edited [fractions].

    Returns:
        None where no row has both.
    """
    slow, fast = column(evaluation, "accuracy_edited").to_numpy(), column(evaluation, "accuracy_cached").to_numpy()
    both = np.isfinite(slow) & np.isfinite(fast)
    if not both.any():
        return None
    figure = new_figure(3.6, 3.4)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=1)
    axes.plot(slow[both], fast[both], "o", color=BLUE, alpha=0.5, markersize=4, markeredgewidth=0, rasterized=True)
    largest = float(np.abs(slow - fast)[both].max())
    axes.set_title(f"largest difference {number(100 * largest, 2)} points", fontweight="normal")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    axes.set_xlabel("edited network, end to end")
    axes.set_ylabel("cached activations")
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    return figure
