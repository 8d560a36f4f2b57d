# SPDX-License-Identifier: MIT
"""What a sweep of stage ``compare`` found: one tidy table of edits, and one row per site and method."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from salve.report.intervals import t_interval
from salve.report.names import short_names, value_text
from salve.report.style import BLACK, BLUE, GREY, WIDTH, new_figure, styled
from salve.results import Run, Sweep
from salve.results.artifacts import table_in
from salve.types import UserError

#: Measures of a method, means over the classes. Those of the second line are of the classes that it takes away.
MEASURES = ("selectivity", "reached")
OF_REACHED = ("after", "drift", "worst_loss", "kl_others")
#: How far an edited network is from one trained without the class, where such networks were trained.
GAP = ("gap", "gap_own", "gap_others", "gap_kl", "agreement")
SECONDS = ("fit_seconds", "apply_seconds")


#: Settings in which runs of one comparison may differ: what rows and tables are of, and which methods there are.
OF_ONE_TABLE = ("layer", "backbone.name", "sae.seed", "seed", "data.seed")
OF_METHODS = ("compare.methods", "compare.variants")


def edits_of(sweep: Sweep, varying: Sequence[str] = ()) -> pd.DataFrame:
    """One row per backbone, site, seed of the SAE, method and class, from a sweep's finished runs.

    Columns: ``backbone``, ``site``, ``seed``, those of the stage's ``edits.csv``, and ``fit_seconds`` and
    ``apply_seconds``, as measured where the edit was made. Where runs differ in more, such as in their images,
    ``backbone`` also says in what, so that no mean is over networks that were not meant as one.

    Args:
        sweep: its runs. varying: the settings that tell them apart.

    Raises:
        UserError: no run has finished stage ``compare``.
    """
    apart = [name for name in varying if name not in OF_ONE_TABLE and not name.startswith(OF_METHODS)]
    short, tables = short_names(apart), []
    for run in sweep.finished:
        for table in edits_of_run(run):
            own = [f"{short[name]}={value_text(run.flat_settings.get(name))}" for name in apart]
            of = str([run.flat_settings.get(name) for name in OF_ONE_TABLE])
            tables.append(table.assign(backbone=", ".join([str(table["backbone"].iloc[0]), *own]), of=of))
    if not tables:
        raise UserError(f"No run of {sweep.folder} has finished stage compare.")
    # The same edit may be in several runs, of which one compares more methods.
    edits = pd.concat(tables).drop_duplicates(["backbone", "of", "method", "class"], ignore_index=True)
    return edits.drop(columns="of")


def edits_of_run(run: Run) -> Iterator[pd.DataFrame]:
    """The rows of one run, in a table of its own; none if it has not finished the stage."""
    table = run.table("compare", "edits.csv")
    if not len(table):
        return
    settings = run.flat_settings
    facts = {
        "backbone": settings["backbone.name"],
        "site": settings["layer"],
        "seed": int(settings["sae.seed"]),
    }
    seconds, store = [], run.artifact("compare").path.parent.parent
    for method, key in run.record("compare", "methods.json").items():
        path = store / "method" / Path(str(key)).name / "seconds.csv"
        if path.is_file():
            seconds.append(table_in(path).assign(method=method))
    if seconds:
        table = table.merge(pd.concat(seconds), on=["method", "class"], how="left")
    yield pd.concat([pd.DataFrame(facts, index=table.index), table], axis=1)


def table_of(edits: pd.DataFrame) -> pd.DataFrame:
    """One row per backbone, site and method.

    Means over classes, then over seeds, each with half of Student's interval over seeds (``<measure>_half``).
    ``ahead``: by how much the first method is ahead of this one in selectivity, paired by seed. Further ``seeds``,
    ``classes``, ``permanent`` (None where no class was taken away), and medians of ``parameters``, ``fit_seconds``,
    ``apply_seconds``, and of the train ``images`` and ``labels`` that a fit uses.
    """
    rows = []
    for (backbone, site), here in edits.groupby(["backbone", "site"], sort=False):
        by_method = dict(list(here.groupby("method", sort=False)))
        first = next(iter(by_method))
        reference = _by_seed(by_method[first], "selectivity")
        for method, mine in by_method.items():
            row: dict[str, Any] = {"backbone": backbone, "site": site, "method": method}
            row |= {"classes": mine["class"].nunique(), "seeds": mine["seed"].nunique()}
            ahead = reference - _by_seed(mine, "selectivity") if method != first else []
            measured = [name for name in mine if name in GAP or name.startswith("relearned_")]
            for measure in (*MEASURES, *OF_REACHED, *measured):
                row[measure], row[f"{measure}_half"], _ = t_interval(_by_seed(mine, measure))
            row["ahead"], row["ahead_half"], _ = t_interval(ahead)
            reached = mine[mine["reached"].eq(True)]
            row["permanent"] = bool(reached["permanent"].eq(True).all()) if len(reached) else None
            for name in ("parameters", *SECONDS):
                row[name] = reached[name].median() if name in reached and len(reached) else np.nan
            for name in ("images", "labels"):
                row[name] = mine[name].median()
            reasons = mine.loc[mine["reason"].notna(), "reason"].astype(str)
            row["reason"] = reasons.mode().iloc[0] if len(reasons) else ""
            rows.append(row)
    return pd.DataFrame(rows)


def _by_seed(edits: pd.DataFrame, measure: str) -> pd.Series:
    """The mean over classes of a measure, by seed; classes in which there is nothing to take away do not count."""
    judged = edits[edits["selectivity"].notna()] if measure in MEASURES else edits
    return judged.groupby("seed")[measure].apply(lambda values: values.astype(float).mean())


@styled
def forest_figure(table: pd.DataFrame) -> Figure:
    """A row of panels per site: selectivity, what the others lose, and their KL; a line per method."""
    sites = list(table.groupby(["backbone", "site"], sort=False))
    lines = max(len(here) for _, here in sites)
    figure = new_figure(WIDTH, 0.9 + (0.5 + 0.24 * lines) * len(sites))
    grid = figure.subplots(len(sites), 3, squeeze=False, sharex="col", width_ratios=[2, 1, 1])
    panels = (("selectivity", 100, "selectivity (points)"), ("drift", 100, "others' change (points)"),
              ("kl_others", 1, "others' KL (nats)"))  # fmt: skip
    for row, ((backbone, site), here) in zip(grid, sites, strict=True):
        places = np.arange(len(here))
        for axes, (measure, unit, _) in zip(row, panels, strict=True):
            half = unit * np.nan_to_num(here[f"{measure}_half"].to_numpy(float))
            colours = [{True: BLUE, False: GREY}.get(permanent, "white") for permanent in here["permanent"]]
            for place, value, error, colour in zip(places, unit * here[measure], half, colours, strict=True):
                axes.errorbar(value, place, xerr=error, fmt="o", color=BLACK, markerfacecolor=colour, markersize=5,
                              mew=0.8, elinewidth=1.0, capsize=2)  # fmt: skip
            axes.set_yticks(places, here["method"] if axes is row[0] else [""] * len(here))
            axes.set_ylim(len(here) - 0.5, -0.5)
        row[0].set_title(f"{backbone}, {site}")
    for axes, (_, _, label) in zip(grid[-1], panels, strict=True):
        axes.set_xlabel(label)
    return figure
