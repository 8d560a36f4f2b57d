"""What the figures of experiments share, besides :mod:`salve.report.style`."""

from pathlib import Path

from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from salve.report.style import save_figure, styled

#: Inches: the text width of a page in print. Text of 8 points and more stays readable there.
PRINT_WIDTH = 7.2


@styled
def save(figure: Figure, folder: Path, name: str) -> tuple[int, int]:
    """Write a figure as ``name.pdf``, ``.svg`` and ``.png``; the same figure gives the same bytes.

    Returns:
        Width and height in CSS pixels (96 per inch).
    """
    size = save_figure(figure, folder, name)
    FigureCanvasPdf(figure).print_pdf(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return size
