# SPDX-License-Identifier: MIT
"""Summarise a sweep: its table on disk and on the terminal, its pictures, and what is missing."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from salve.artifacts import write_table, written_whole
from salve.report.metrics import SELECT
from salve.report.names import short_names, value_text, with_values
from salve.report.style import save_figure
from salve.report.tables import column
from salve.report.text import MISSING, NEVER, is_missing, number, percent, plural, points, span
from salve.results import Sweep, open_sweep
from salve.results.sweep import CORE, varies
from salve.sweep.figures import ALPHA_FLIP, FVE, KNOBS, L0, SELECTIVITY, against_knob, fve_against_l0, knob_of
from salve.sweep.page import write_sweep_page
from salve.system import refused_by_system

TABLE = "sweep.csv"
FIGURES = "figures"
#: Characters of a run's key that the terminal shows, if they tell the runs apart.
SHORT_KEY = 6


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep has found so far.

    Attributes:
        sweep: its runs. varying: the settings that tell the finished ones apart. csv: where the table is.
        figures: PNG files, each with an SVG beside it. left_out: by
            name, why a standard picture was not drawn. page: where the page is.
    """

    sweep: Sweep
    varying: tuple[str, ...]
    csv: Path
    figures: tuple[Path, ...]
    left_out: dict[str, str]
    page: Path

    @property
    def table(self) -> pd.DataFrame:
        """One row per finished run."""
        return self.sweep.table


def summarise_sweep(folder: Path, artifacts: Path | None = None) -> SweepSummary:
    """Gather a sweep's finished runs; write ``sweep.csv``, ``sweep.html`` and ``figures/`` into its folder.

    Args:
        folder: of the sweep; nothing outside of it is read, so it may have been moved.
        artifacts: where the summary's runs find their artifacts, if it was; see :func:`salve.open_sweep`.

    Raises:
        UserError: the folder holds no sweep. OSError: it cannot be written into.
    """
    sweep = open_sweep(folder, artifacts)
    names = varying(sweep)
    try:
        with written_whole(folder / TABLE) as unfinished:
            write_table(unfinished, sweep.table)
        figures, left_out = _draw(folder / FIGURES, sweep.table, names)
        page = write_sweep_page(sweep, names)
    except OSError as error:
        raise refused_by_system(error, folder) or error from None
    return SweepSummary(sweep, tuple(names), folder / TABLE, tuple(figures), left_out, page)


def varying(sweep: Sweep) -> list[str]:
    """The settings that tell finished runs apart: those that were swept, and others that do not follow from them."""
    table = sweep.table
    settings = [name for name in table if name not in {"run", *(m for run in sweep.finished for m in run.metrics)}]
    values: dict[str, set[str]] = {}
    for run in sweep:
        for name, value in run.swept.items():
            values.setdefault(name, set()).add(value_text(value))
    axes = [name for name, found in values.items() if len(found) > 1]
    kept: list[str] = []
    for axis in axes:  # of a group, such as backbone=…, the main settings in it
        of_group = [name for name in settings if name in CORE and name.startswith(f"{axis}.") and varies(table[name])]
        kept += [axis] if axis in settings else [name for name in of_group if name not in kept]
    for name in settings:
        if name not in kept and varies(table[name]) and not _follows(table, name, kept):
            kept.append(name)
    return [name for name in settings if name in kept]


def _follows(table: pd.DataFrame, name: str, known: list[str]) -> bool:
    """Whether the runs' values of one setting are fixed by those of others."""
    return bool(known) and len(table[known].drop_duplicates()) == len(table[[*known, name]].drop_duplicates())


def _draw(folder: Path, table: pd.DataFrame, names: list[str]) -> tuple[list[Path], dict[str, str]]:
    """Draw the pictures that can be drawn, and remove those of an earlier state of the sweep."""
    used = set(knob_of(table))
    drawn, left_out = [], {}
    for title, (knob, draw) in _pictures(table, names).items():
        for suffix in ("png", "svg"):
            (folder / f"{title}.{suffix}").unlink(missing_ok=True)
        if knob and knob not in (used or {"sae.sparsity"}):
            continue
        figure = draw()
        if isinstance(figure, str):
            left_out[title] = figure
        else:
            folder.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".") as unfinished:
                save_figure(figure, Path(unfinished), title)
                for path in Path(unfinished).iterdir():
                    os.replace(path, folder / path.name)
            drawn.append(folder / f"{title}.png")
    return drawn, left_out


def _pictures(table: pd.DataFrame, names: list[str]) -> dict[str, tuple[str, Callable[[], Figure | str]]]:
    """By file name, the setting on the horizontal axis ("" if none), and the function that draws the picture."""
    pictures: dict[str, tuple[str, Callable[[], Figure | str]]] = {
        "fve-l0": ("", partial(fve_against_l0, table, names))
    }
    for measure, title in ((SELECTIVITY, "selectivity"), (ALPHA_FLIP, "alpha-flip")):
        for knob in KNOBS:
            pictures[f"{title}-{knob.rpartition('.')[2]}"] = knob, partial(against_knob, table, names, knob, measure)
    return pictures


def print_summary(summary: SweepSummary, console: Console) -> None:
    """Print the table, what is missing and why, and where the files are."""
    if len(summary.table):
        console.print(_terminal_table(summary))
        console.print(Text(_chosen(summary)))
    sweep = summary.sweep
    counts = Counter(run.state for run in sweep)
    others = [
        f"{counts[state]} {state}" for state in ("failed", "running", "interrupted", "not begun") if counts[state]
    ]
    line = f"{counts['finished']} of {plural(len(sweep), 'planned run')} finished"
    console.print("; ".join([line, *others]) + ".", highlight=False, markup=False)
    for run in sweep.unfinished:
        what = with_values(run.swept) or "as configured"
        reason = f": {run.reason}" if run.reason else ""
        console.print(Text(f"  {run.state}  {run.key}  {what}{reason}"), soft_wrap=True)
    if sweep.unfinished:
        console.print("The command that started the sweep finishes what is missing.")
    lines = [f"Page: {summary.page}", f"Table: {summary.csv}", *(f"Figure: {path}" for path in summary.figures)]
    if any(not name.endswith("seed") for name in summary.varying):  # nobody awaits a figure of a sweep over seeds alone
        lines += [f"No figure {name}: {reason}." for name, reason in summary.left_out.items()]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _terminal_table(summary: SweepSummary) -> Table:
    """One row per finished run: the settings that tell it apart, and the main measures."""
    table = summary.table
    keys = _keys(table)
    names = short_names(summary.varying)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.title, shown.title_justify = Text(f"Sweep {summary.sweep.name}", style="table.title"), "left"
    columns: list[tuple[str, list[str]]] = [("run", list(keys))]
    columns += [(_heading(names[name]), [value_text(value) for value in table[name]]) for name in summary.varying]
    columns += [(title, texts) for title, texts in _measures(table) if any(text != MISSING for text in texts)]
    for title, texts in columns:
        shown.add_column(Text(title), justify="right" if _are_numbers(texts) else "left", overflow="fold", min_width=3)
    for row in zip(*(texts for _, texts in columns), strict=True):
        shown.add_row(*map(Text, row))
    said = ["All of select images, by which a run may be chosen."]
    if SELECTIVITY.column in table:
        said.append("Selectivity: accuracy that the edited class loses, less the others' mean |Δ| (points).")
    shown.caption, shown.caption_justify = Text(" ".join(said)), "left"
    return shown


def _keys(table: pd.DataFrame) -> pd.Series:
    """The runs' keys, shortened if that still tells the runs apart."""
    shortened = table["run"].str[:SHORT_KEY]
    return shortened if shortened.is_unique else table["run"]


def _chosen(summary: SweepSummary) -> str:
    """What test images say of the run that select images prefer; of that run alone, since test must not choose."""
    table = summary.table
    value = column(table, SELECTIVITY.column)
    if not value.notna().any():
        return f"Measured on test images: the columns of {summary.csv.name} without {SELECT}."
    best = value.idxmax()
    row = table.loc[best]
    separating = MISSING
    if not is_missing(row.get("separating")) and not is_missing(row.get("classes")):
        separating = f"{row['separating']:.0f}/{row['classes']:.0f}"
        between = span(row.get("separating_low"), row.get("separating_high"), "{:.0f}".format)
        separating += f" ({between})" if between else ""
    flips = NEVER if (row.get("alpha_flip_infinite") or 0) > 0.5 else number(row.get("alpha_flip_median"))
    facts = (
        ("accuracy", percent(row.get("test_accuracy"))),
        ("FVE", percent(row.get("fve"))),
        ("L0", number(row.get("l0"))),
        ("separates", separating),
        ("selectivity", points(row.get("selectivity"))),
        ("median α_flip", flips),
    )
    known = ", ".join(f"{name} {text}" for name, text in facts if text != MISSING)
    return f"Run {_keys(table)[best]} has the highest selectivity there. On test images, which chose nothing: {known}."


def _heading(name: str) -> str:
    """A long name in two lines, for a narrow column."""
    head, underscore, tail = name.rpartition("_") if len(name) > 8 else ("", "", name)
    return f"{head}{underscore}\n{tail}" if head else tail


def _are_numbers(texts: list[str]) -> bool:
    return all(text[:1].isdigit() or text[:1] in "−-–∞." for text in texts)


def _measures(table: pd.DataFrame) -> list[tuple[str, list[str]]]:
    def texts(name: str, write: Callable[[object], str]) -> list[str]:
        return [write(value) for value in table[name]] if name in table else [MISSING]

    separating = [MISSING]
    if {f"{SELECT}separating", "classes"} <= set(table):
        pairs = zip(table[f"{SELECT}separating"], table["classes"], strict=True)
        separating = [MISSING if is_missing(done) else f"{done:.0f}/{of:.0f}" for done, of in pairs]
    return [
        ("acc.\n%", texts(f"{SELECT}accuracy", partial(points, signed=False))),
        ("FVE\n%", texts(FVE, partial(points, signed=False))),
        ("L0", texts(L0, number)),
        ("sepa-\nrates", separating),
        ("selec-\ntivity", texts(SELECTIVITY.column, points)),
    ]
