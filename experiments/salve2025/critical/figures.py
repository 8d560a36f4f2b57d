"""Figures of critical strengths."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from experiments.figures import PRINT_WIDTH
from experiments.grounds import Ground
from salve.report.style import (
    BLACK, BLUE, GREEN, GREY, ORANGE, VERMILLION, log_axis, log_range, new_figure, percent_axis, styled,
)  # fmt: skip
from salve.report.text import count_of, label, percent

Values = NDArray[np.float64]

#: Panels of the distributions; of more classes some are shown, from the most fragile to the most robust.
MOST = 20


@styled
def distributions(shares: pd.DataFrame, order: Sequence[str]) -> Figure:
    """A panel per class: the share of its images that have given way, against α; mean and range over SAEs.

    Args:
        shares: as :func:`experiments.salve2025.critical.rows.shares_of` gives them. order: of the panels.
    """
    shown = [order[k] for k in np.unique(np.linspace(0, len(order) - 1, min(MOST, len(order))).round().astype(int))]
    columns = min(5, len(shown))
    height = -(-len(shown) // columns)
    figure = new_figure(PRINT_WIDTH, 0.85 + 1.45 * height)
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flatten()
    positive = shares[shares["alpha"] > 0]
    spread = positive.groupby("alpha")[["flip_exact", "logit_exact", "flip_linear"]].mean()
    low = float(spread.index[(spread > 0.005).any(axis=1)].min())
    limits = (0.8 * (low if np.isfinite(low) else 0.1), float(shares["alpha"].max()))
    for axes, name in zip(grid, shown, strict=False):
        rows = positive[positive["class"] == name]
        for column, colour, style in (
            ("logit_exact", GREEN, "-"),
            ("flip_exact", BLUE, "-"),
            ("flip_linear", ORANGE, (0, (4, 1.5))),
        ):
            wide = rows.pivot_table(column, "alpha", "seed").to_numpy()
            alphas = np.sort(rows["alpha"].unique())
            axes.fill_between(alphas, wide.min(axis=1), wide.max(axis=1), color=colour, alpha=0.22, linewidth=0)
            axes.plot(alphas, wide.mean(axis=1), color=colour, linestyle=style, linewidth=1.3)
        dots = rows.groupby("alpha")["predicted"].mean().reset_index().to_numpy()
        axes.plot(*_thinned(dots[dots[:, 0] >= limits[0]]).T, "o", color=BLACK, markersize=2.2, markeredgewidth=0)
        axes.set_title(label(name), fontsize=8.5)
        axes.set_ylim(-0.03, 1.03)
        percent_axis(axes.yaxis)
        log_axis(axes, "x", limits)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    figure.supxlabel("strength α of suppression (logarithmic)", fontsize=9)
    figure.supylabel("images that have given way", fontsize=9)
    saes = shares["seed"].nunique()
    handles = [
        Line2D([], [], color=BLUE, label="α_flip, exact"),
        Line2D([], [], color=ORANGE, linestyle=(0, (3, 1)), label="α_flip, approximation"),
        Line2D([], [], color=BLACK, marker="o", markersize=2.6, linestyle="", label="prediction lost, edited head"),
        Line2D([], [], color=GREEN, label="α_logit, exact"),
        Patch(color=GREY, alpha=0.35, linewidth=0, label=f"range over {saes} SAEs"),
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=5, fontsize=7.5, handlelength=1.6, columnspacing=1.1
    )
    return figure


def _thinned(points: Values, apart: float = 0.09) -> Values:
    """Points ``[n, 2]`` at least ``apart`` from each other on a logarithmic x axis (decades)."""
    kept: list[int] = []
    for k, x in enumerate(np.log10(points[:, 0])):
        if not kept or x - np.log10(points[kept[-1], 0]) >= apart:
            kept.append(k)
    return points[kept]


@styled
def approximation(images: pd.DataFrame, grounds: Sequence[Ground]) -> Figure:
    """A row per ground: approximate against exact α_logit; the error against how far channels have closed, with its
    distribution; and what closed channels of either sign do to it.

    Args:
        images: rightly classified, of one SAE per ground.
    """
    figure = new_figure(PRINT_WIDTH, 0.55 + 2.35 * len(grounds))
    ratios = [1.15, 1.25, 0.3, 1.25]
    grid = figure.subplots(len(grounds), 4, squeeze=False, width_ratios=ratios)
    for row, ground in zip(grid, grounds, strict=True):
        rows = images[(images["ground"] == ground.name) & (images["logit_exact"] > 0)]
        _against_exact(row[0], rows)
        _errors(row[1], row[2], rows)
        _reasons(row[3], rows)
        row[0].set_title(ground.title, fontsize=8.5)
    for axes in grid[-1:, :].flatten():
        axes.xaxis.label.set_size(8)
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=3.5, linestyle="", label=text)
        for colour, text in (
            (GREY, "no channel closed (exact)"),
            (BLUE, "closed, a lower bound"),
            (VERMILLION, "closed, above the exact one"),
        )
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=7.5, columnspacing=1.3)
    return figure


def _parts(rows: pd.DataFrame) -> list[tuple[pd.DataFrame, str]]:
    """The images by what the approximation is for them, with the colour that says so."""
    closed, above = rows["reach"] > 1, rows["error"] > 0
    return [(rows[~closed], GREY), (rows[closed & ~above], BLUE), (rows[closed & above], VERMILLION)]


def _dots(axes: Axes, x: pd.Series, y: pd.Series, colour: str) -> None:
    axes.plot(x, y, ".", color=colour, alpha=0.3, markersize=2.6, markeredgewidth=0, rasterized=True)


def _against_exact(axes: Axes, rows: pd.DataFrame) -> None:
    both = rows[rows["error"].notna()]
    limits = log_range(np.concatenate([both["logit_exact"], both["logit_linear"]]))
    axes.plot(limits, limits, color=BLACK, linewidth=0.8)
    for part, colour in _parts(both):
        _dots(axes, part["logit_exact"], part["logit_linear"], colour)
    log_axis(axes, "x", limits)
    log_axis(axes, "y", limits)
    axes.set_aspect("equal")
    axes.set_xlabel("exact α_logit", fontsize=8)
    axes.set_ylabel("approximation", fontsize=8)
    _never(axes, rows["logit_exact"], rows["logit_linear"], ("exact", "approx."))


def _never(axes: Axes, x: pd.Series, y: pd.Series, names: tuple[str, str]) -> None:
    """How many have no value, which no point can show."""
    counts = (
        ((np.isinf(x) & np.isinf(y)).sum(), "both ∞"),
        ((np.isinf(x) & np.isfinite(y)).sum(), f"only {names[0]} ∞"),
        ((np.isfinite(x) & np.isinf(y)).sum(), f"only {names[1]} ∞"),
    )
    text = "\n".join(f"{count_of(int(count))} {what}" for count, what in counts if count)
    axes.text(0.04, 0.97, text, transform=axes.transAxes, va="top", fontsize=7, color="#4b535c")


def _errors(axes: Axes, margin: Axes, rows: pd.DataFrame) -> None:
    known = rows[rows["error"].notna()]
    for part, colour in _parts(known):
        _dots(axes, part["reach"], part["error"], colour)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    log_axis(axes, "x", log_range(known["reach"].to_numpy()))
    bottom, top = np.quantile(known["error"], [0.001, 0.999]) if len(known) else (-1, 1)
    reach = max(0.05, 1.1 * float(max(-bottom, top)))
    limits = (-min(1.05, reach) if top < -bottom else -reach, max(1.15 * float(top), 0.12 * reach))
    axes.set_ylim(limits)
    percent_axis(axes.yaxis)
    axes.set_xlabel("exact α_logit · max|c|", fontsize=8)
    axes.set_ylabel("error of the approximation", fontsize=8)
    bins = np.linspace(*limits, 41)
    parts = _parts(known)
    margin.hist(
        [part["error"].clip(*limits) for part, _ in parts],
        bins=list(bins), orientation="horizontal", stacked=True, color=[colour for _, colour in parts],
    )  # fmt: skip
    margin.set_ylim(limits)
    margin.set_xscale("symlog", linthresh=1)
    margin.tick_params(labelleft=False)
    margin.set_xlabel("images", fontsize=8)


def _reasons(axes: Axes, rows: pd.DataFrame) -> None:
    """Mean push of closed channels with positive and with negative terms, by how far channels have closed."""
    known = rows[rows["lift"].notna() & (rows["reach"] > 1)]
    axes.set_xlabel("exact α_logit · max|c|", fontsize=8)
    axes.set_ylabel("part of the exact α_logit", fontsize=8)
    if len(known) < 20:
        return
    bins = pd.qcut(known["reach"], min(12, len(known) // 10), duplicates="drop")
    by = known.groupby(bins, observed=True)
    middle = by["reach"].median()
    axes.plot(middle, -by["lift"].mean(), color=BLUE)
    axes.plot(middle, by["drop"].mean(), color=VERMILLION)
    axes.plot(middle, by["error"].mean(), color=BLACK)
    axes.axhline(0, color=GREY, linewidth=0.8)
    percent_axis(axes.yaxis)


@styled
def logit_and_flip(images: pd.DataFrame, grounds: Sequence[Ground]) -> Figure:
    """A panel per ground: exact α_logit against exact α_flip of every image; infinite ones along the edges."""
    figure = new_figure(min(PRINT_WIDTH, 0.4 + 3.4 * len(grounds)), 3.5)
    for axes, ground in zip(figure.subplots(1, len(grounds), squeeze=False)[0], grounds, strict=True):
        rows = images[images["ground"] == ground.name]
        flip, logit = rows["flip_exact"].to_numpy(), rows["logit_exact"].to_numpy()
        limits = log_range(np.concatenate([flip[np.isfinite(flip)], logit[np.isfinite(logit)]]))
        edge = limits[1] * 1.25
        outer = (limits[0], edge * 1.25)
        first = flip < logit
        for part, colour in ((first, BLUE), (~first, ORANGE)):
            x, y = flip[part].clip(limits[0], edge), logit[part].clip(limits[0], edge)
            axes.plot(x, y, ".", color=colour, alpha=0.3, markersize=3, markeredgewidth=0, rasterized=True)
        axes.plot(outer, outer, color=BLACK, linewidth=0.8)
        log_axis(axes, "x", outer)
        log_axis(axes, "y", outer)
        axes.set_aspect("equal")
        axes.set_title(ground.title)
        axes.set_xlabel("α_flip: the prediction leaves the class")
        axes.set_ylabel("α_logit: the class's logit reaches 0")
        text = f"{percent(first.mean(), 1)} lose the prediction first"
        axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=7.5, color=BLUE)
    return figure
