"""Figures of critical strengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import NDArray

from experiments.figures import PRINT_WIDTH, class_panels, entry, mean_and_range, printed
from experiments.testbeds import Testbed
from salve.report import style
from salve.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILLION
from salve.report.text import count_of

Values = NDArray[np.float64]

_DASHED = (0, (3, 1.3))
LINES: dict[str, tuple[str, Any]] = {
    "logit_linear": (GREEN, _DASHED), "logit_exact": (GREEN, "-"), "flip_linear": (BLUE, _DASHED),
    "flip_exact": (BLUE, "-"),
}  # fmt: skip

#: Panels of the distributions; of more classes some are shown, from the most fragile to the most robust.
MOST = 20


@printed
def distributions(shares: pd.DataFrame, order: Sequence[str]) -> Figure:
    """A panel per class: the share of its images that have given way, against α; mean and range over SAEs."""
    shown = [order[k] for k in np.unique(np.linspace(0, len(order) - 1, min(MOST, len(order))).round().astype(int))]
    x, y = "strength α of suppression (logarithmic)", "images that have given way"
    figure, panels = class_panels(shown, x, y, above=1.0, row=1.45)
    positive = shares[shares["alpha"] > 0]
    spread = positive.groupby("alpha")[list(LINES)].mean()
    low = float(spread.index[(spread > 0.03).any(axis=1)].min())
    limits = (0.8 * (low if np.isfinite(low) else 0.1), float(shares["alpha"].max()))
    ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 3) if limits[0] <= m * 10.0**e <= 0.7 * limits[1]]
    for axes, name in zip(panels, shown, strict=True):
        rows = positive[positive["class"] == name]
        for column, (colour, dashes) in LINES.items():
            wide = rows.pivot_table(column, "seed", "alpha")
            mean_and_range(axes, wide.columns, wide.to_numpy(), colour, 0.22, linestyle=dashes, linewidth=1.3)
        dots = rows.groupby("alpha")["predicted"].mean().reset_index().to_numpy()
        axes.plot(*_thinned(dots[dots[:, 0] >= limits[0]]).T, "o", color=BLACK, markersize=2.2, markeredgewidth=0)
        style.log_axis(axes, "x", limits)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
    handles = [
        entry(f"{name}, {what}", colour, linestyle=dashes)
        for name, colour in (("α_flip", BLUE), ("α_logit", GREEN))
        for what, dashes in (("exact", "-"), ("approximation", _DASHED))
    ]
    handles.append(entry("prediction lost, edited head", BLACK, "o", markersize=2.6))
    band = Patch(color=GREY, alpha=0.35, linewidth=0, label=f"range over {shares['seed'].nunique()} SAEs")
    figure.legend(handles=[*handles, band], loc="outside upper center", ncols=3, handlelength=2.2)
    return figure


def _thinned(points: Values, apart: float = 0.09) -> Values:
    """Points ``[n, 2]`` at least ``apart`` from each other on a logarithmic x axis (decades)."""
    kept: list[int] = []
    for k, x in enumerate(np.log10(points[:, 0])):
        if not kept or x - np.log10(points[kept[-1], 0]) >= apart:
            kept.append(k)
    return points[kept]


@printed
def approximation(images: pd.DataFrame, testbeds: Sequence[Testbed]) -> Figure:
    """A row per testbed: approximate against exact α_logit; the error against how far channels have closed, with its
    distribution; and what closed channels of either sign do to it."""
    figure = style.new_figure(PRINT_WIDTH, 0.6 + 2.3 * len(testbeds))
    grid = figure.subplots(len(testbeds), 4, squeeze=False, width_ratios=[1.2, 1.25, 0.4, 1.15])
    for row, testbed in zip(grid, testbeds, strict=True):
        rows = images[(images["testbed"] == testbed.name) & (images["logit_exact"] > 0)]
        _against_exact(row[0], rows)
        _errors(row[1], row[2], rows)
        _reasons(row[3], rows)
        row[0].set_title(testbed.title)
    dots = ((GREY, "no channel closed: exact"), (BLUE, "closed: a lower bound"), (VERMILLION, "closed: too large"))
    lines = ((BLACK, 1, "error (mean, 80 % of images)"), (BLUE, 2.6, "from terms for the class"),
             (VERMILLION, 1.8, "from terms against it"))  # fmt: skip
    handles = [
        handle
        for (colour, what), (line, width, text) in zip(dots, lines, strict=True)
        for handle in (entry(what, colour, "o", markersize=3.5), entry(text, line, linewidth=width))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _parts(rows: pd.DataFrame) -> list[tuple[pd.DataFrame, str]]:
    """The images by what the approximation is for them, with the colour that says so."""
    closed, above = rows["reach"] > 1, rows["error"] > 0
    return [(rows[~closed], GREY), (rows[closed & ~above], BLUE), (rows[closed & above], VERMILLION)]


def _dots(axes: Axes, x: pd.Series, y: pd.Series, colour: str) -> None:
    alpha = 0.9 if colour == VERMILLION else 0.3  # few, and on top of many
    axes.plot(x, y, ".", color=colour, alpha=alpha, markersize=2.6, markeredgewidth=0, rasterized=True)


def _against_exact(axes: Axes, rows: pd.DataFrame) -> None:
    both = rows[rows["error"].notna()]
    across, up = style.log_range(both["logit_exact"].to_numpy()), style.log_range(both["logit_linear"].to_numpy())
    axes.plot(across, across, color=BLACK, linewidth=0.8, scalex=False, scaley=False)
    for part, colour in _parts(both):
        _dots(axes, part["logit_exact"], part["logit_linear"], colour)
    style.log_axis(axes, "x", across)
    style.log_axis(axes, "y", (up[0], max(up[1] * 1.3, across[0] * 1.5)))
    axes.set(xlabel="exact α_logit", ylabel="approximate α_logit")
    _never(axes, rows["logit_exact"], rows["logit_linear"], ("exact", "approx."))


def _never(axes: Axes, x: pd.Series, y: pd.Series, names: tuple[str, str]) -> None:
    """How many have no value, which no point can show."""
    counts = (
        ((np.isinf(x) & np.isinf(y)).sum(), "both ∞"),
        ((np.isinf(x) & np.isfinite(y)).sum(), f"only {names[0]} ∞"),
        ((np.isfinite(x) & np.isinf(y)).sum(), f"only {names[1]} ∞"),
    )
    text = "\n".join(f"{count_of(int(count))} {what}" for count, what in counts if count)
    axes.text(0.97, 0.04, text, transform=axes.transAxes, ha="right", fontsize=7, color="#4b535c")


def _errors(axes: Axes, margin: Axes, rows: pd.DataFrame) -> None:
    known = rows[rows["error"].notna()]
    for part, colour in _parts(known):
        _dots(axes, part["reach"], part["error"], colour)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    style.log_axis(axes, "x", style.log_range(known["reach"].to_numpy()))
    bottom, top = np.quantile(known["error"], [0.001, 0.999]) if len(known) else (-1, 1)
    reach = max(0.05, 1.1 * float(max(-bottom, top)))
    limits = (-min(1.05, reach) if top < -bottom else -reach, max(1.15 * float(top), 0.12 * reach))
    style.percent_axis(axes.yaxis)
    axes.set(xlabel="exact α_logit · max|c|", ylabel="error of the approximation", ylim=limits)
    parts = _parts(known)
    margin.hist(
        [part["error"].clip(*limits) for part, _ in parts],
        bins=list(np.linspace(*limits, 41)), orientation="horizontal", stacked=True,
        color=[colour for _, colour in parts],
    )  # fmt: skip
    margin.set(xlabel="images", ylim=limits)
    margin.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    margin.tick_params(labelleft=False)


def _reasons(axes: Axes, rows: pd.DataFrame) -> None:
    """Mean push of closed channels with positive and with negative terms, by how far channels have closed."""
    known = rows[rows["lift"].notna() & (rows["reach"] > 1)]
    axes.set(xlabel="exact α_logit · max|c|", ylabel="error from closed channels")
    if len(known) < 20:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "too few images", transform=axes.transAxes, ha="center", fontsize=7.5)
        return
    bins = pd.qcut(known["reach"], min(12, len(known) // 10), duplicates="drop")
    by = known.groupby(bins, observed=True)
    middle = by["reach"].median()
    axes.fill_between(middle, by["error"].quantile(0.1), by["error"].quantile(0.9), color=GREY, alpha=0.4, linewidth=0)
    axes.plot(middle, by["drop"].mean(), color=VERMILLION)
    axes.plot(middle, -by["lift"].mean(), color=BLUE, linewidth=2.6)
    axes.plot(middle, by["error"].mean(), color=BLACK, linewidth=1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    style.log_axis(axes, "x", style.log_range(middle.to_numpy()))
    style.percent_axis(axes.yaxis)


@printed
def logit_and_flip(images: pd.DataFrame, testbeds: Sequence[Testbed]) -> Figure:
    """A panel per testbed: exact α_logit against exact α_flip of every image; infinite ones along the edges."""
    figure = style.new_figure(min(PRINT_WIDTH, 0.4 + 3.4 * len(testbeds)), 3.1)
    for axes, testbed in zip(figure.subplots(1, len(testbeds), squeeze=False)[0], testbeds, strict=True):
        rows = images[images["testbed"] == testbed.name]
        flip, logit = rows["flip_exact"], rows["logit_exact"]
        (left, right), (low, high) = style.log_range(flip.to_numpy()), style.log_range(logit.to_numpy())
        edges = (right * 1.3, high * 1.3)
        for part, colour in ((flip < logit, BLUE), (flip >= logit, ORANGE)):
            x, y = flip[part].clip(left, edges[0]), logit[part].clip(low, edges[1])
            axes.plot(x, y, ".", color=colour, alpha=0.3, markersize=3, markeredgewidth=0, rasterized=True)
        both = (min(left, low), max(edges) * 1.3)
        axes.plot(both, both, color=BLACK, linewidth=0.8)
        style.log_axis(axes, "x", (left / 1.15, edges[0] * 1.2))
        style.log_axis(axes, "y", (min(low, right) / 1.3, edges[1] * 1.3))
        axes.set_title(testbed.title, pad=16)
        axes.set(xlabel="α_flip: the prediction leaves the class", ylabel="α_logit: the class's logit reaches 0")
        counts = [f"prediction lost first: {count_of((flip < logit).sum())} of {count_of(len(rows))}"]
        counts += [f"{name} = ∞: {count_of(np.isinf(values).sum())}"
                   for name, values in (("α_logit", logit), ("α_flip", flip)) if np.isinf(values).any()]  # fmt: skip
        text = axes.text(0, 1.02, "; ".join(counts), transform=axes.transAxes, fontsize=7.5, color="#4b535c")
        text.set_in_layout(False)
    return figure
