# SPDX-License-Identifier: MIT
"""``sweep.html``: the finished runs of a sweep as points and rows; each says its settings and leads to its page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from salve.artifacts import write_whole
from salve.report.names import short_names, value_text
from salve.report.page import page_environment
from salve.report.tables import column, records
from salve.report.text import number, percent, plural, points
from salve.results import Sweep
from salve.sweep.figures import FVE, KNOBS, L0, SELECTIVITY, is_seed, knob_of

NAME = "sweep.html"
#: Where a run's page lies, the first that there is.
PAGES = ("index.html", "explorer.html")
#: Shapes of points, which tell kinds of runs apart without colours.
SHAPES = ("●", "■", "▲", "◆", "▼", "✚", "○", "□", "△", "◇")
#: Size of a chart and of the margins left of it and below, in SVG's units.
WIDTH, HEIGHT, LEFT, BELOW = 520, 320, 58, 40
#: Measures in the table, all of select images: column, heading, how it is written.
MEASURES = (
    ("select_accuracy", "accuracy", percent),
    (FVE, "FVE", percent),
    (L0, "L0", number),
    (SELECTIVITY.column, "selectivity (points)", points),
)


@dataclass(frozen=True)
class Point:
    """A run on a chart: where, as what, what it says, and its page ("" if it has none)."""

    x: float
    y: float
    shape: str
    text: str
    href: str


@dataclass(frozen=True)
class Chart:
    """Points with their axes; ticks are (place, label)."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    points: Sequence[Point]


def write_sweep_page(sweep: Sweep, varying: Sequence[str]) -> Path:
    """Write the page into the sweep's folder; returns its path.

    Args:
        sweep: its runs. varying: the settings that tell the finished ones apart.
    """
    table = sweep.table
    names = short_names(varying)
    pages = {run.key: _page_of(run.folder) for run in sweep.finished}
    apart = [name for name in varying if not is_seed(name) and name not in KNOBS]
    kinds = [", ".join(f"{names[name]} {value_text(row[name])}" for name in apart) for row in records(table)]
    shapes = {kind: SHAPES[i % len(SHAPES)] for i, kind in enumerate(dict.fromkeys(kinds))}
    settings = [", ".join(f"{names[name]} {value_text(row[name])}" for name in varying) for row in records(table)]
    marks = [(shapes[kind], text, pages[run]) for kind, text, run in zip(kinds, settings, _runs(table), strict=True)]
    measured = [one for one in MEASURES if column(table, one[0]).notna().any()]
    rows = [
        {
            "run": row["run"],
            "href": pages[row["run"]],
            "shape": mark[0],
            "settings": [value_text(row[name]) for name in varying],
            "measures": [write(row.get(name)) for name, _, write in measured],
        }
        for row, mark in zip(records(table), marks, strict=True)
    ]
    template = page_environment(Path(__file__).parent).get_template("sweep.html.j2")
    page = template.render(
        title=f"Sweep {sweep.name}",
        told=f"{plural(len(table), 'finished run')} of {len(sweep)}",
        charts=_charts(table, marks),
        shapes=[(shape, kind) for kind, shape in shapes.items() if kind],
        settings=[names[name] for name in varying],
        measures=[title for _, title, _ in measured],
        rows=rows,
        size=(WIDTH, HEIGHT, LEFT, BELOW),
    )
    path = sweep.folder / NAME
    write_whole(path, page)
    return path


def _runs(table: pd.DataFrame) -> list[str]:
    return [str(key) for key in table["run"]] if "run" in table else []


def _page_of(folder: Path) -> str:
    return next((f"{folder.name}/{name}" for name in PAGES if (folder / name).is_file()), "")


def _charts(table: pd.DataFrame, marks: Sequence[tuple[str, str, str]]) -> list[Chart]:
    """FVE against L0, and selectivity against what makes the SAEs sparse, where they are known."""
    if not len(table):
        return []
    knobs = knob_of(table)
    found = [
        _chart(
            "Variance explained over active latents",
            "L0",
            "FVE (%)",
            column(table, L0),
            100 * column(table, FVE),
            marks,
        )
    ]
    for knob, label in KNOBS.items():
        value = column(table, knob).where(knobs == knob)
        if len(set(value.dropna())) > 1:
            measured = 100 * column(table, SELECTIVITY.column)
            found.append(_chart("Selectivity of the edits", label, "selectivity (points)", value, measured, marks))
    return [chart for chart in found if chart is not None]


def _chart(
    title: str, x_label: str, y_label: str, x: pd.Series, y: pd.Series, marks: Sequence[tuple[str, str, str]]
) -> Chart | None:
    known = np.isfinite(x.to_numpy(dtype=float)) & np.isfinite(y.to_numpy(dtype=float))
    if known.sum() < 2:
        return None
    horizontal, vertical = _scale(x[known].tolist(), WIDTH), _scale(y[known].tolist(), HEIGHT)
    drawn = []
    for at_x, at_y, (shape, text, href), there in zip(x, y, marks, known, strict=True):
        if there:
            said = f"{text or 'as configured'}: {x_label.split(',')[0]} {number(at_x)}, {y_label} {number(at_y)}"
            drawn.append(Point(LEFT + horizontal(at_x), HEIGHT - vertical(at_y), shape, said, href))
    x_ticks = [(LEFT + horizontal(value), number(value)) for value in _ticks(x[known].tolist())]
    y_ticks = [(HEIGHT - vertical(value), number(value)) for value in _ticks(y[known].tolist())]
    return Chart(title, x_label, y_label, x_ticks, y_ticks, drawn)


def _is_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 10


def _scale(values: Sequence[float], length: float) -> Any:
    """From a value to its place on an axis, with a margin at both ends."""
    write = math.log10 if _is_log(values) else float
    low, high = write(min(values)), write(max(values))
    return lambda value: round(length * (0.06 + 0.88 * (write(value) - low) / ((high - low) or 1)), 1)


def _ticks(values: Sequence[float]) -> list[float]:
    """Up to six values to label: those that there are if they are few, else evenly spread."""
    own = sorted(set(values))
    if len(own) <= 6:
        return own
    if _is_log(values):
        return np.geomspace(own[0], own[-1], 5).tolist()
    return np.linspace(own[0], own[-1], 5).tolist()
