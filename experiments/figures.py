"""What the figures of experiments share beyond :mod:`salve.report.style`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from salve.report.style import new_figure, percent_axis, save_figure, styled
from salve.report.text import label

#: The text width of a printed page, in inches.
PRINT_WIDTH = 7.2


def class_panels(
    names: Sequence[str], x: str, y: str, above: float = 0.75, row: float = 1.5
) -> tuple[Figure, list[Axes]]:
    """A figure with a small panel per class, whose y axis is a share.

    Args:
        names: of the classes. x, y: what all axes show. above: inches for the legend. row: inches for a row.

    Returns:
        The figure, and a panel for each name.
    """
    columns = max(1, min(5, len(names)))
    rows = -(-len(names) // columns)
    figure = new_figure(PRINT_WIDTH, above + row * rows)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten())
    for axes, name in zip(grid, names, strict=False):
        axes.set_title(label(name), fontsize=8.5)
        axes.set_ylim(-0.03, 1.03)
        percent_axis(axes.yaxis)
    for axes in grid[len(names) :]:
        axes.axis("off")
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure, grid[: len(names)]


@styled
def save(figure: Figure, folder: Path, name: str) -> tuple[int, int]:
    """Write a figure as ``name.pdf``, ``.svg`` and ``.png``; the same figure gives the same bytes.

    Returns:
        Width and height in CSS pixels (96 per inch).
    """
    size = save_figure(figure, folder, name)
    FigureCanvasPdf(figure).print_pdf(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return size
