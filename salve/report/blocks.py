# SPDX-License-Identifier: MIT
"""The parts of a page. The template turns them into HTML and escapes every text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from salve.report.style import save_figure
from salve.report.text import count_of, plural

#: Rows of one table on the page.
MOST_ROWS = 100


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, a style class ("num", "good", "bad", "dim") and an optional second line."""

    text: str
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class TableBlock:
    """A table with a caption; ``csv`` is the file with its numbers; ``folded`` hides it until it is opened.

    The page shows the first ``MOST_ROWS`` rows, so that it stays small with many classes.
    """

    title: str
    header: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    csv: str = ""
    folded: bool = False
    template: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"Table {self.title!r} has a row that is not as long as its header.")

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """The rows on the page."""
        return self.rows[:MOST_ROWS]

    @property
    def left_out(self) -> str:
        """A note that there are more rows; "" if there are none."""
        more = len(self.rows) - len(self.shown)
        return f"{count_of(len(self.shown))} of {plural(len(self.rows), 'row')} are shown." if more else ""


@dataclass(frozen=True)
class FigureBlock:
    """A figure that lies in ``figures/<name>.png`` and ``.svg``, with its size in CSS pixels."""

    name: str
    alt: str
    size: tuple[int, int]
    caption: str = ""
    csv: str = ""
    template: str = field(default="figure", init=False)


@dataclass(frozen=True)
class StripBlock:
    """One class's images with its numbers beside them."""

    title: str
    subtitle: str
    figure: FigureBlock | None
    numbers: Sequence[tuple[str, str, str]]  # name, value, control
    template: str = field(default="strip", init=False)


@dataclass(frozen=True)
class Prose:
    """A sub-heading (may be empty) and a paragraph."""

    text: str
    heading: str = ""
    template: str = field(default="prose", init=False)


Block = TableBlock | FigureBlock | StripBlock | Prose


@dataclass(frozen=True)
class Section:
    """A part of the page with its blocks; without any, it names the stage to run."""

    id: str
    title: str
    blocks: Sequence[Block]
    stage: str


@dataclass(frozen=True)
class FigureFolder:
    """Writes figures into a folder and returns their blocks."""

    folder: Path

    def figure(self, figure: Figure | None, name: str, alt: str, caption: str = "", csv: str = "") -> list[FigureBlock]:
        """Save a figure under ``name`` (a slug); an empty list for None."""
        if figure is None:
            return []
        return [FigureBlock(name, alt, save_figure(figure, self.folder, name), caption, csv)]


def numbers(*texts: str, style: str = "num") -> list[Cell]:
    """Right-aligned cells."""
    return [Cell(text, style) for text in texts]
