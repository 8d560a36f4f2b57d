"""What the figures of experiments share beyond :mod:`salve.report.style`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from salve.report.style import RC, new_figure, percent_axis, save_figure
from salve.report.text import label

#: The text width of a printed page, in inches.
PRINT_WIDTH = 7.2

#: As :func:`salve.report.style.styled`, with the smaller text of a printed page.
printed = mpl.rc_context(
    RC
    | {"axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
    | {"legend.fontsize": 7.5, "legend.columnspacing": 1.3}
)


def class_panels(
    names: Sequence[str], x: str, y: str, above: float = 0.75, row: float = 1.5
) -> tuple[Figure, list[Axes]]:
    """A figure with a small panel for each name, whose y axis is a share; ``above`` and ``row`` are the inches for the
    legend and for a row of panels."""
    columns = max(1, min(5, len(names)))
    rows = -(-len(names) // columns)
    figure = new_figure(PRINT_WIDTH, above + row * rows)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten())
    for axes, name in zip(grid, names, strict=False):
        axes.set(title=label(name), ylim=(-0.03, 1.03))
        percent_axis(axes.yaxis)
    for axes in grid[len(names) :]:
        axes.axis("off")
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure, grid[: len(names)]


def class_rows(axes: Axes, names: Sequence[str]) -> None:
    """A y axis with a row per name, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def mean_and_range(
    axes: Axes, x: Float[np.ndarray, " K"], values: Float[np.ndarray, "S K"], colour: str, alpha: float, **look: object
) -> None:
    """A curve: the mean over SAEs, and their range as a band of the opacity ``alpha``."""
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=alpha, linewidth=0)
    axes.plot(x, values.mean(axis=0), color=colour, **look)  # type: ignore[arg-type]


def tile(figure: Figure, box: tuple[float, float, float, float], picture: np.ndarray) -> Axes:
    """An image without axes; ``box`` is its left, bottom, width and height in inches."""
    size = np.tile(figure.get_size_inches(), 2)
    axes = figure.add_axes(tuple(np.array(box) / size))
    axes.imshow(picture, interpolation="antialiased", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def entry(name: str, colour: str, marker: str = "", **look: object) -> Line2D:
    """An entry of a legend: the marker, or a line where there is none."""
    every = {"color": colour, "label": name, "marker": marker, "linestyle": "" if marker else "-"}
    return Line2D([], [], **every | look)  # type: ignore[arg-type]


@printed
def save(figure: Figure, folder: Path, name: str) -> tuple[int, int]:
    """Write a figure as ``name.pdf``, ``.svg`` and ``.png``; the same figure gives the same bytes.

    Returns:
        Width and height in CSS pixels (96 per inch).
    """
    size = save_figure(figure, folder, name)
    FigureCanvasPdf(figure).print_pdf(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return size
