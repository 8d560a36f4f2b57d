"""The figure: what each method takes and what it harms, at a matched effect."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.compare import LEVEL_TEXT
from experiments.figures import PRINT_WIDTH, class_rows, entry, printed
from experiments.salve2025.baselines.methods import GATE, summarise
from salve.report.style import BLACK, BLUE, GREY, ORANGE, grid_axis, new_figure

#: By direction: colour, marker, and what it is called.
LOOKS = {
    "latent": (BLUE, "o", "along the class's latent"),
    "none": (ORANGE, "D", "in the head, no SAE"),
    "random": (GREY, "s", "along a random direction"),
}
#: By measure: the name of its axis, the factor to the axis's unit, and, for a measure that is never negative, where the
#: axis turns from linear to logarithmic.
PANELS = {
    "selectivity": ("selectivity\n(points)", 100, None),
    "ahead": ("gate ahead by\n(points)", 100, None),
    "drift": ("others' change\n(points)", 100, 0.3),
    "kl": ("others' KL\n(nats)", 1, 0.03),
}
#: How far a method's two directions lie above and below its line, and how far each one's classes are spread.
_ASIDE, _SPREAD = 0.2, 0.13


@printed
def baselines_figure(edits: pd.DataFrame) -> Figure:
    """A row of panels per testbed, a line per method.

    Large markers: mean over classes and SAE seeds, with the interval over seeds; dots: each class, mean over seeds. At
    the right, for how many classes a strength takes the class to ``LEVEL`` on select, and what it leaves on test; drift
    and KL are those of these.

    Args:
        edits: see :func:`compare_methods`, with ``testbed``, its title.
    """
    testbeds = list(dict.fromkeys(edits["testbed"]))
    lines = list(dict.fromkeys(edits["method"]))
    shown = by_class(edits)
    both = set(edits[edits["direction"] == "random"]["method"])
    aside = {"latent": -_ASIDE, "random": _ASIDE, "none": 0.0}
    figure = new_figure(PRINT_WIDTH, 0.85 + 0.4 * len(lines) * len(testbeds))
    grid = figure.subplots(len(testbeds), len(PANELS), squeeze=False, sharex="col")
    for row, testbed in zip(grid, testbeds, strict=True):
        for one in summarise(edits[edits["testbed"] == testbed]).to_dict("records"):
            name, direction = one["method"], one["direction"]
            place = lines.index(name) + (aside[direction] if name in both else 0)
            for axes, (measure, (_, unit, linear)) in zip(row, PANELS.items(), strict=True):
                mean, half = unit * one[measure], unit * np.nan_to_num(one[f"{measure}_half"])
                low = half if linear is None else min(half, mean)
                _draw(axes, place, unit * shown.loc[(testbed, name, direction), measure], mean, (low, half), direction)
            text = f"{one['reached']:.3g} of {one['classes']}"
            text += "" if np.isnan(one["after"]) else f": {100 * one['after']:.1f} %"
            row[-1].text(1.06, place, text, transform=row[-1].get_yaxis_transform(), fontsize=7.5, va="center",
                         color="#5c646d" if direction == "random" else BLACK)  # fmt: skip
        for axes in row:
            class_rows(axes, [name.replace(" ", "\n", len(name) > 15) if axes is row[0] else "" for name in lines])
        row[0].set_title(testbed)
        row[-1].text(1.06, 1.03, f"{LEVEL_TEXT} on select:\nleft on test", transform=row[-1].transAxes, fontsize=7.5)
        row[list(PANELS).index("ahead")].axvline(0, color=GREY, linewidth=0.9, zorder=0)
    for at, (measure, (name, unit, linear)) in enumerate(PANELS.items()):
        grid[-1][at].set_xlabel(name)
        _limit(grid[0][at], measure, unit * shown[measure], linear)
    handles = [
        entry(name, BLACK, marker, markerfacecolor="white" if direction == "random" else colour, markersize=5, mew=0.9)
        for direction, (colour, marker, name) in LOOKS.items() if direction in set(edits["direction"])
    ]  # fmt: skip
    handles.append(entry("one class", GREY, ".", markersize=4.5))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, handletextpad=0.3)
    return figure


def by_class(edits: pd.DataFrame) -> pd.DataFrame:
    """Each measure of ``PANELS``, mean over seeds; indexed by ``testbed``, ``method``, ``direction``, ``class``."""
    keys = ["testbed", "method", "direction", "class"]
    means = edits.groupby(keys)[[name for name in PANELS if name != "ahead"]].mean().reset_index()
    gate = means[(means["method"] == GATE) & (means["direction"] == "latent")]
    gate = gate.set_index(["testbed", "class"])["selectivity"]
    of_gate = gate.reindex(pd.MultiIndex.from_frame(means[["testbed", "class"]])).to_numpy()
    compared = (means["method"] != GATE) & (means["direction"] != "random")
    return means.assign(ahead=(of_gate - means["selectivity"]).where(compared)).set_index(keys)


def _limit(axes: Axes, measure: str, values: pd.Series, linear: float | None) -> None:
    """An axis that shows all classes' values."""
    if measure == "selectivity":
        axes.set(xticks=(0, 50, 100), xlim=(min(0.0, values.min()) - 5, 105))
    elif linear is None:
        most = max(1.0, values.abs().max())
        axes.set_xlim(-1.1 * most, 1.1 * most)
        axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    else:
        top = max(values.max(), 3 * linear)
        grid_axis(axes, (linear, top))
        axes.set_xlim(-0.25 * linear, 1.4 * top)


def _draw(
    axes: Axes, place: float, classes: pd.Series, mean: float, interval: tuple[float, float], direction: str
) -> None:
    colour, marker, _ = LOOKS[direction]
    face = "white" if direction == "random" else colour
    beside = place + np.linspace(-_SPREAD, _SPREAD, len(classes))
    axes.plot(classes, beside, color=colour, alpha=0.55, marker=".", markersize=4.5, linestyle="", mew=0)
    axes.errorbar(mean, place, xerr=np.array(interval)[:, None], fmt=marker, color=BLACK, markerfacecolor=face,
                  markersize=5, mew=0.9, elinewidth=1.1, capsize=2.2)  # fmt: skip
