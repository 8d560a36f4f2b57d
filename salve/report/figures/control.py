"""What an edit does: accuracy against strength, confusion before and after, fast path against slow path."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from salve.report.inputs import column
from salve.report.style import BLUE, GREY, SKY, VERMILLION, WIDTH, grid_axis, new_figure, percent_axis, styled
from salve.report.text import label, number

MAX_PANELS = 24
MAX_MATRICES = 11
COLUMNS = 4
NAMED = 12  # up to so many classes have their names on the axes


def _curve_panel(axes: Axes, rows: pd.DataFrame, target: str) -> None:
    """Accuracy against α for one target; a set of classes has no single target line, all its classes are drawn."""
    table = rows.pivot_table(index="alpha", columns="class", values="accuracy", aggfunc="mean", sort=True)
    table = table[np.isfinite(table.index)]
    strengths = table.index.to_numpy(dtype=float)
    own = table[target].to_numpy() if target in table else None
    others = table.drop(columns=target, errors="ignore").to_numpy(dtype=float)
    if others.shape[1]:
        axes.fill_between(strengths, others.min(axis=1), others.max(axis=1), color=SKY, alpha=0.28, linewidth=0)
        axes.plot(strengths, others.min(axis=1), color=SKY, linewidth=0.9)
        axes.plot(strengths, others.mean(axis=1), color=BLUE)
    if own is not None:
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
        curves: columns target, alpha, class, accuracy [fraction]; one mode only.
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
        _curve_panel(axes, curves[curves["target"] == target], target)
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
        Patch(color=SKY, alpha=0.35, label="other classes, worst to best"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    figure.supxlabel("strength α of the edit", fontsize=9)
    figure.supylabel("accuracy on validation images", fontsize=9)
    return figure


def _matrix_panel(axes: Axes, counts: NDArray[np.floating], title: str, row: int | None) -> None:
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal", rasterized=True)
    axes.grid(False)
    axes.set_title(title, fontsize=8.5)
    axes.spines[:].set_visible(True)
    axes.tick_params(length=0)
    size = len(counts)
    if row is not None and size <= NAMED:
        frame = Rectangle((-0.5, row - 0.5), size, 1, fill=False, edgecolor=VERMILLION, linewidth=1.3, clip_on=False)
        axes.add_patch(frame)
    elif row is not None:
        # Rows this thin would vanish under a frame: an arrow beside the matrix points at the row instead.
        axes.plot([size * 1.03], [row], marker="<", color=VERMILLION, markersize=6, clip_on=False)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


@styled
def confusion_matrices(
    original: NDArray[np.floating],
    edited: NDArray[np.floating],
    titles: Sequence[str],
    rows: Sequence[int | None],
    classes: Sequence[str],
) -> Figure:
    """Confusion before any edit, then after each edit, rows in percent of the true class.

    Args:
        original: [C, C] counts, rows = true class.
        edited: [E, C, C] counts; the first ``MAX_MATRICES`` are shown.
        titles: E names of the edits.
        rows: E indices of the class edited for, marked; None for a set.
        classes: C names; written on the axes up to ``NAMED`` classes, else their numbers.
    """
    edited = edited[:MAX_MATRICES]
    count = len(edited) + 1
    across = min(COLUMNS, count)
    down = -(-count // across)
    named = len(classes) <= NAMED
    figure = new_figure(max(3.4, WIDTH * across / COLUMNS), 0.2 + (2.15 if named else 2.5) * down + 0.75 * named)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    _matrix_panel(grid.flat[0], original, "before any edit", None)
    for axes, matrix, title, row in zip(grid.flat[1:], edited, titles, rows, strict=False):
        _matrix_panel(axes, matrix, label(title, 28), row)
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    if named:
        names = [label(name, 16) for name in classes]
        grid[0, 0].set_yticks(range(len(classes)), names)
        grid[0, 0].set_xticks(range(len(classes)), names)
        for axes in grid.flat:
            axes.tick_params(labelsize=6.5)
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
