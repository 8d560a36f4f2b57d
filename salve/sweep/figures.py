# SPDX-License-Identifier: MIT
"""The standard pictures of a sweep: from tables to matplotlib figures; nothing is read or written here."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from salve.report.names import short_names, value_text
from salve.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    grid_axis,
    log_axis,
    new_figure,
    percent_axis,
    styled,
)
from salve.report.tables import column
from salve.report.text import NEVER, label

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = "os^DvPX"
STYLES = ("-", "--", ":")
MAX_LINES = len(COLOURS) * len(STYLES)
MAX_PANELS = 12
MAX_NAMED_POINTS = 30
ACROSS = 3

#: What the activations depend on: runs that differ in it get a panel each.
PANEL_SETTINGS = ("backbone.name", "layer", "data")
#: The setting that makes latents sparse, and its name on an axis.
KNOBS = {"sae.sparsity": "λ, weight of the L1 penalty", "sae.k": "k, latents that may fire per image"}


@dataclass(frozen=True)
class Axis:
    """A measure on the vertical axis: its column, its label, its meaning, and the factor to the label's unit."""

    column: str
    label: str
    meaning: str
    factor: float = 1.0


#: Settings are chosen by these, so they are drawn on select images; the table also has those of test images.
ON_SELECT = "on select images, which may choose"
FVE, L0 = "select_fve", "select_l0"
SELECTIVITY = Axis(
    "select_selectivity",
    "selectivity (percentage points)",
    f"selectivity: accuracy that the edited class loses, less the mean |Δ| of the others, over all edits, {ON_SELECT}",
    100.0,
)
ALPHA_FLIP = Axis(
    "alpha_flip_median",
    "α_flip (strength of the edit)",
    "α_flip: strength at which half of the test images have left their class; a result, not to choose by",
)


def is_seed(name: str) -> bool:
    """Whether a setting is a seed; results are averaged over seeds."""
    return name.split(".")[-1] == "seed"


def knob_of(table: pd.DataFrame) -> pd.Series:
    """By run, which of ``KNOBS`` makes its SAE sparse: k if it has one, else λ."""
    return pd.Series(np.where(column(table, "sae.k").notna(), "sae.k", "sae.sparsity"), index=table.index)


def averaged(table: pd.DataFrame, settings: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Mean and spread over the runs that differ in nothing but seeds.

    Returns:
        One row per combination of ``settings``: these, and for each measure ``<measure>`` (mean), ``<measure>_sd``
        (sample standard deviation, NaN for one run); runs without a value of a measure do not count in it. A mean
        with an infinite value is infinite.
    """
    known = table.assign(**{name: column(table, name) for name in measures})
    if not settings:
        known, settings = known.assign(_=0), ["_"]
    groups = known.groupby(list(settings), dropna=False, sort=True)[list(measures)]
    with np.errstate(invalid="ignore"):  # the spread of values of which one is infinite
        return groups.mean().join(groups.std(ddof=1).add_suffix("_sd")).reset_index()


def pareto_front(cost: NDArray[np.floating], gain: NDArray[np.floating]) -> NDArray[np.intp]:
    """Indices of the points that no other point beats, by rising cost: none costs as little and gains more.

    Args:
        cost, gain: ``[n]``; points with a NaN are on no front.
    """
    known = np.flatnonzero(~(np.isnan(cost) | np.isnan(gain)))
    order = known[np.lexsort((-gain[known], cost[known]))]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], gain[order]]))
    return order[gain[order] > best[:-1]]


@styled
def fve_against_l0(table: pd.DataFrame, varying: Sequence[str]) -> Figure | str:
    """FVE against L0 on select images with the Pareto front, a panel for each kind of activations.

    Args:
        table: one row per run. varying: the settings that tell the runs apart.

    Returns:
        The figure, or why there is none.
    """
    known = table[column(table, FVE).notna() & column(table, L0).notna()]
    known = known.assign(knob=knob_of(known))
    settings = [name for name in varying if name in known and not is_seed(name)]
    points = averaged(known, [*settings, "knob"], [L0, FVE])
    if len(points) < 2:
        return "FVE and L0 on select images are known of fewer than two configurations"
    layout = _Layout(points, settings)
    figure, panels = layout.open(4.1)
    many = len(points) > MAX_NAMED_POINTS * len(panels)
    for axes, rows in panels:
        for line, style in layout.lines(rows):
            line = line.sort_values(L0)
            axes.errorbar(
                line[L0], line[FVE], line[f"{FVE}_sd"], line[f"{L0}_sd"], elinewidth=0.8, capsize=1.5, zorder=3,
                **style | {"linewidth": 0.8},
            )  # fmt: skip
            for row in [] if many else line.to_dict("records"):
                if row["knob"] in settings:
                    name = f"{'λ' if row['knob'] == 'sae.sparsity' else 'k'} {value_text(row[row['knob']])}"
                    axes.annotate(
                        name, (row[L0], row[FVE]), (3, -8), textcoords="offset points", fontsize=6.5,
                        color=style["color"],
                    )  # fmt: skip
        front = rows.iloc[pareto_front(rows[L0].to_numpy(), rows[FVE].to_numpy())]
        axes.step(front[L0], front[FVE], where="post", color=GREY, linewidth=4, alpha=0.4, zorder=1)
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        percent_axis(axes.yaxis, decimals=None)
    _scale(panels, "x", points[L0].to_numpy())
    figure.supylabel("FVE: variance explained", fontsize=9)
    spread = bool(points[f"{FVE}_sd"].notna().any())
    layout.explain(figure, "L0: active latents per image", f"{ON_SELECT}; grey: Pareto front", spread)
    return figure


@styled
def against_knob(table: pd.DataFrame, varying: Sequence[str], knob: str, measure: Axis) -> Figure | str:
    """A measure against λ or k: mean over seeds with their standard deviation, a line for each kind of SAE.

    Args:
        table: one row per run. varying: the settings that tell the runs apart. knob: one of ``KNOBS``.
        measure: what is drawn; infinite values stand at the upper edge.

    Returns:
        The figure, or why there is none.
    """
    rows = table[knob_of(table) == knob]
    if measure.column == ALPHA_FLIP.column:
        # A median that metrics.json cannot hold: more than half of the images never flip.
        never = column(rows, measure.column).isna() & (column(rows, "alpha_flip_infinite") > 0.5)
        rows = rows.assign(**{measure.column: column(rows, measure.column).mask(never, np.inf)})
    rows = rows[column(rows, measure.column).notna()]
    if rows.empty:
        return f"{measure.column} is not known of any such run"
    if column(rows, knob).nunique() < 2:
        return f"{knob} does not vary"
    if not np.isfinite(column(rows, measure.column)).any():
        return f"{measure.column} is infinite in every run"
    settings = [name for name in varying if name in rows and not is_seed(name) and name != knob]
    points = averaged(rows, [*settings, knob], [measure.column])
    points[[measure.column, f"{measure.column}_sd"]] *= measure.factor
    layout = _Layout(points, settings)
    figure, panels = layout.open(3.1)
    infinite = False
    for axes, part in panels:
        for line, style in layout.lines(part):
            line = line.sort_values(knob)
            values = line[measure.column].to_numpy()
            never = np.isinf(values)
            infinite |= bool(never.any())
            spread = line[f"{measure.column}_sd"].to_numpy()
            axes.errorbar(
                line[knob], np.where(never, np.nan, values), np.where(np.isfinite(spread), spread, np.nan),
                elinewidth=0.9, capsize=2, **style,
            )  # fmt: skip
            if never.any():
                axes.plot(
                    line[knob][never], np.ones(never.sum()), linestyle="", transform=axes.get_xaxis_transform(),
                    color=style["color"], marker=style["marker"], markersize=6, markerfacecolor="none", clip_on=False,
                )  # fmt: skip
    _scale(panels, "x", points[knob].to_numpy())
    if measure.factor == 1.0:
        _scale(panels, "y", points[measure.column].to_numpy())
    figure.supylabel(measure.label, fontsize=9)
    note = measure.meaning + (f"; hollow, at the upper edge: {NEVER}" if infinite else "")
    layout.explain(figure, KNOBS[knob], note, bool(points[f"{measure.column}_sd"].notna().any()))
    return figure


class _Layout:
    """A panel for each kind of activations, and in it a line for every other difference."""

    def __init__(self, points: pd.DataFrame, settings: Sequence[str]) -> None:
        self._short = short_names(settings)
        self._panel = [name for name in settings if name in PANEL_SETTINGS]
        self._line = [name for name in settings if name not in (*self._panel, *KNOBS)]
        if "knob" in points and len(set(points["knob"])) > 1 and "sae.variant" not in self._line:
            self._line.append("knob")
            self._short["knob"] = "sparse by"
        self._points = points
        kinds = points[self._line].drop_duplicates().to_numpy() if self._line else [()]
        keys = [tuple(map(value_text, kind)) for kind in kinds]
        self._styles: dict[tuple[str, ...], dict[str, Any]] = {
            key: {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": STYLES[i // len(COLOURS)],
            }
            for i, key in enumerate(dict.fromkeys(keys))
            if i < MAX_LINES
        }
        self._hidden = len(dict.fromkeys(keys)) - len(self._styles)

    def open(self, height: float) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
        """A figure with an axes and the rows for each panel."""
        parts: list[tuple[str, pd.DataFrame]] = [("", self._points)]
        if self._panel:
            groups = self._points.groupby(self._panel, dropna=False, sort=True)
            parts = [(", ".join(map(value_text, key)), rows) for key, rows in groups]
        self._hidden_panels = max(0, len(parts) - MAX_PANELS)
        parts = parts[:MAX_PANELS]
        across = min(ACROSS, len(parts))
        down = -(-len(parts) // across)
        width = WIDTH * 0.66 if len(parts) == 1 else WIDTH
        figure = new_figure(width, 0.7 + (height if len(parts) == 1 else 2.6) * down)
        grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for axes in list(grid.flat)[len(parts) :]:
            axes.set_visible(False)
        for i, (axes, (title, _)) in enumerate(zip(grid.flat, parts, strict=False)):
            axes.set_title(label(title, 44))
            axes.tick_params(labelbottom=i + across >= len(parts))
        return figure, [(axes, rows) for axes, (_, rows) in zip(grid.flat, parts, strict=False)]

    def lines(self, rows: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, dict[str, Any]]]:
        """The rows of each line and how it is drawn."""
        if not self._line:
            yield rows, self._styles[()]
            return
        for key, line in rows.groupby(self._line, dropna=False, sort=False):
            style = self._styles.get(tuple(map(value_text, key)))
            if style is not None:
                yield line, style

    def explain(self, figure: Figure, x_label: str, note: str, spread: bool) -> None:
        """Add the legend of the lines, and notes for the reader under the horizontal axis."""
        notes = [note, "bars: ± standard deviation over seeds" if spread else ""]
        notes += [f"{self._hidden} more lines are in the table" if self._hidden else ""]
        notes += [f"{self._hidden_panels} more panels are in the table" if self._hidden_panels else ""]
        below = textwrap.fill("; ".join(filter(None, notes)), int(13 * figure.get_figwidth()))
        figure.supxlabel(f"{x_label}\n{below}", fontsize=8)
        handles = [
            Line2D([], [], label=label(self._named(key), 60), **style) for key, style in self._styles.items() if key
        ]
        if handles:
            across = max(1, int(figure.get_figwidth() / 3.2))
            figure.legend(handles=handles, loc="outside upper left", ncols=min(across, len(handles)))

    def _named(self, key: Sequence[str]) -> str:
        return ", ".join(f"{self._short[name]} {value}" for name, value in zip(self._line, key, strict=True))


def _scale(panels: Sequence[tuple[Axes, pd.DataFrame]], which: str, values: NDArray[np.floating]) -> None:
    """A logarithmic axis where the values span a decade; shared by all panels."""
    good = values[np.isfinite(values)]
    positive = good[good > 0]
    if not len(positive) or positive.max() / positive.min() < 10 or (good < 0).any():
        return
    for axes, _ in panels:
        if len(positive) == len(good):
            log_axis(axes, which, (float(positive.min()) / 1.25, float(positive.max()) * 1.25))
        elif which == "x":
            grid_axis(axes, good)
