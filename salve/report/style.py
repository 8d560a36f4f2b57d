# SPDX-License-Identifier: MIT
"""One look for every figure: Okabe–Ito colours, readable in print and without colour vision.

Figures are made with matplotlib's object interface: no pyplot, no global back-end, no global settings. A function that
draws is decorated with ``styled``, which holds the settings for the time of the call only.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from salve.report.text import PERCENT, with_minus

# Okabe & Ito (2008), "Color Universal Design".
BLACK, ORANGE, SKY, GREEN = "#1b1f24", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8b939c"

WIDTH = 10.0  # inches: the text width of the page at 96 px per inch
DPI = 150

RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": BLACK,
    "axes.edgecolor": "#aab1b9",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e7eaee",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b535c",
    "ytick.color": "#4b535c",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": BLACK,
    # Class names are any text: a "$" in one must not start a formula.
    "text.parse_math": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Same input, same bytes: the ids inside an SVG come from this salt.
    "svg.hashsalt": "salve",
    "svg.fonttype": "path",
}

styled = mpl.rc_context(RC)


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of ``width`` × ``height`` inches that belongs to no back-end."""
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


@styled
def save_figure(figure: Figure, folder: Path, name: str) -> tuple[int, int]:
    """Write ``name.png`` (150 dpi) and ``name.svg``, the same bytes for the same figure.

    Returns:
        Width and height in CSS pixels (96 per inch).
    """
    with warnings.catch_warnings():
        # The font lacks some scripts and draws boxes for them; the page itself shows such class names right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        # One canvas per format: ``savefig`` lays the figure out again for every file and draws it twice.
        FigureCanvasAgg(figure).print_png(
            folder / f"{name}.png", metadata={"Software": None}, pil_kwargs={"compress_level": 4}
        )
        figure.set_layout_engine("none")
        FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches()
    return round(96 * width), round(96 * height)


class _Percent(PercentFormatter):
    """Writes ticks as :func:`salve.report.text.percent` writes numbers."""

    def format_pct(self, x: float, display_range: float) -> str:
        return with_minus(super().format_pct(x, display_range))


def percent_axis(axis: Axis, decimals: int | None = 0) -> None:
    """Write an axis of fractions as percent; None chooses the decimals."""
    axis.set_major_formatter(_Percent(1.0, decimals=decimals, symbol=PERCENT))


def plain_number(value: float, _position: int | None = None) -> str:
    """Tick label of a logarithmic axis without formula text."""
    return with_minus(f"{value:g}")


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high]: steps of 1-2-5, 1-3 or whole decades, whichever gives at most ``most``."""
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in exponents for m in steps if low * 0.999 <= m * 10.0**e <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def grid_axis(axes: Axes, strengths: Iterable[float]) -> None:
    """The x axis for a grid of α: linear, or with a logarithmic part where the grid spans more than a factor of 30."""
    finite = sorted({float(v) for v in strengths if np.isfinite(v) and v > 0})
    if len(finite) > 1 and finite[-1] / finite[0] > 30:
        axes.set_xscale("symlog", linthresh=finite[0], linscale=0.5)
        axes.xaxis.set_major_locator(FixedLocator([0.0, *_round_ticks(finite[0], finite[-1], 4)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))


def log_range(values: np.ndarray) -> tuple[float, float]:
    """Limits in which a logarithmic axis shows the positive finite values; (0.1, 10) where there are none."""
    good = values[np.isfinite(values) & (values > 0)]
    if not len(good):
        return 0.1, 10.0
    low, high = float(np.quantile(good, 0.002)), float(good.max())
    return low / 1.25, max(high, low * 1.5) * 1.25


def log_axis(axes: Axes, which: str, limits: tuple[float, float]) -> None:
    """A logarithmic x or y axis with plain tick labels."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})
    axis.set_major_locator(FixedLocator(_round_ticks(*limits, 6)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain_number))
