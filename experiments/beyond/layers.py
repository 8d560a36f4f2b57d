"""Layers: SAEs and edits from the network's first site to its last. Where does the published edit work?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.claims import Measured
from experiments.compare import intervals, rank_correlation, with_half
from experiments.experiment import Experiment, Findings, Picture, main, measured, said
from experiments.figures import PRINT_WIDTH, entry, printed
from experiments.runs import Study
from salve.backbones import Site, sites
from salve.report.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, new_figure
from salve.report.text import percent, plural, points

#: Measures of the SAE and of what it is trained on, which are metrics of its run.
MEASURES = ("fve", "downstream_accuracy", "test_accuracy", "alpha_flip_infinite")
#: Measures of a method's edits, each at the strength that takes its class to the level on select images.
OF_EDITS = ("reached", "selectivity", "select_selectivity", "drift", "after")
#: How a class's latent is chosen, and how its line is drawn.
SELECTIONS = {"margin": (0, (4, 2)), "effect": "-"}
#: The edits that are studied, and the best known one that needs no SAE, for comparison.
EDIT, RIVAL = "gate", "rank_one"
#: A site's edits are as selective as the last site's if they are at most this much less so.
CLOSE = 0.05
unsigned = partial(points, signed=False)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, BLACK)


def runs_of(study: Study, known: dict[str, Site]) -> pd.DataFrame:
    """One row per run and method.

    Columns: ``testbed``, ``site``, ``depth`` (its place among all sites of the network, ``known``, from 0 to 1),
    ``channels``, ``positions``, ``bypassed``, ``select`` (how latents are chosen), ``seed``; ``MEASURES``;
    ``defining``, the share of class-defining latents among those that are not dead; median ``alpha_flip`` of the test
    images, inf where most never flip; ``method``; and ``OF_EDITS`` with the median ``alpha``.
    """
    rows = []
    for run in study.runs:
        place, site = next((k, one) for k, one in enumerate(known.values()) if run.layer in (one.name, *one.aliases))
        kinds = run.table("features", "latents.csv")["kind"]
        flip = run.metrics.get("alpha_flip_median", np.nan)  # None is infinite
        row = {
            **{"testbed": study.testbed.name, "site": site.name, "depth": place / max(1, len(known) - 1)},
            **{"channels": site.width, "positions": site.count, "bypassed": site.bypassed},
            **{"select": run.flat_settings["discover.select"], "seed": run.seed},
            **{name: run.metrics.get(name) for name in MEASURES},
            "defining": float((kinds == "class-defining").sum() / max(1, (kinds != "dead").sum())),
            "alpha_flip": np.inf if flip is None else flip,
        }
        edits = run.table("compare", "edits.csv")
        rows += [row | {"method": name, **edits_of(mine, study)} for name, mine in edits.groupby("method", sort=False)]
    return pd.DataFrame(rows).astype(dict.fromkeys(MEASURES, float))


def edits_of(edits: pd.DataFrame, study: Study) -> dict[str, float]:
    """Measures of one method's edits, over the classes; one that no latent was chosen for is not reached."""
    by_class = edits.set_index("class").reindex(study.classes)
    at_level = by_class["reached"].notna() & by_class["selectivity"].isna()  # without an edit
    judged = by_class[~at_level]
    reached = judged[judged["reached"].eq(True)]
    return {
        "reached": len(reached) / len(judged) if len(judged) else np.nan,
        **{name: judged[name].fillna(0).mean() for name in ("selectivity", "select_selectivity")},
        **{name: reached[name].mean() for name in ("drift", "after")},
        "alpha": reached["alpha"].median(),
    }


def table_of(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per testbed, site, ``select`` and method, by depth: mean over seeds of every measure, and half its
    interval's width (``<measure>_half``); of ``alpha_flip`` the median."""
    keys = ["testbed", "depth", "site", "channels", "positions", "bypassed", "select", "method"]
    measures = [*MEASURES, "defining", *OF_EDITS, "alpha"]
    rows = [
        dict(zip(keys, at, strict=True))
        | {"seeds": len(same), "alpha_flip": same["alpha_flip"].median(), **intervals(dict(same[measures].items()))}
        for at, same in runs.groupby(keys, sort=False)
    ]
    return pd.DataFrame(rows).sort_values(["testbed", "depth"], kind="stable", ignore_index=True)


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """By depth, of each site of a testbed the row of the selection whose edits are the more selective on select."""
    mine = table[table["method"] == EDIT]
    return mine.loc[mine.groupby("site", sort=False)["select_selectivity"].idxmax()]


@printed
def depth_figure(table: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """Selectivity against depth: a colour per testbed, a line per way to choose latents and one for the rival, a marker
    per site, empty where the site is by-passed."""
    figure = new_figure(PRINT_WIDTH, 3.0)
    axes = figure.subplots()
    shown = [(EDIT, select, line) for select, line in SELECTIONS.items()] + [(RIVAL, next(iter(SELECTIONS)), ":")]
    for colour, (_, mine) in zip(COLOURS, table.groupby("testbed", sort=False), strict=False):
        for method, select, line in shown:
            one = mine[(mine["select"] == select) & (mine["method"] == method)]
            half = 100 * np.nan_to_num(one["selectivity_half"].to_numpy(float))
            looks: Any = {"color": colour, "linestyle": line, "linewidth": 1.2, "elinewidth": 0.9}
            axes.errorbar(one["depth"], 100 * one["selectivity"], yerr=half, **looks)
            fills = ["none" if bypassed else colour for bypassed in one["bypassed"]]
            axes.scatter(one["depth"], 100 * one["selectivity"], s=14, facecolors=fills, edgecolors=colour, zorder=3)
    axes.set(xlabel="depth (place among all sites of the network)", ylabel="selectivity (points)", ylim=(-5, 102))
    handles = [
        *(entry(title, colour) for colour, title in zip(COLOURS, titles.values(), strict=False)),
        *(entry(f"latents by {select}", BLACK, linestyle=line) for select, line in SELECTIONS.items()),
        entry("rank-one edit", BLACK, linestyle=":"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def analyse(studies: Sequence[Study]) -> Findings:
    found = Findings.together([_analyse(study) for study in studies])
    figure = depth_figure(found.tables["sites"], {study.testbed.name: study.testbed.title for study in studies})
    picture = Picture.of(figure, "layers.depth", images=studies[0].runs[0].flat_settings["compare.images"])
    return replace(found, pictures={"depth": picture})


def _analyse(study: Study) -> Findings:
    known = sites(study.context.cut(study.runs[0].artifact("classifier")).model, study.context.size)
    runs = runs_of(study, known)
    table = table_of(runs)
    words = _paragraph(study, table, len(known))
    return Findings(words, {}, {"runs": runs, "sites": table}, _measured(study, table))


def _measured(study: Study, table: pd.DataFrame) -> list[Measured]:
    best = chosen(table)
    inner, last = best.iloc[:-1], best.iloc[-1]
    found = []
    for claim, measure in (("deeper", "selectivity"), ("class_bound", "defining")):
        rank, ends = rank_correlation(best["depth"], best[measure]), best[measure].iloc
        found.append(measured(f"layers.{claim}", study, rank, first=ends[0], last=ends[-1], count=len(best)))
    if len(inner):
        one = inner.loc[inner["select_selectivity"].idxmax()]
        gap = one["selectivity"] - last["selectivity"]
        found.append(measured("layers.inner", study, gap, gap=points(gap), best=one))
    by = table[(table["site"] != last["site"]) & (table["method"] == EDIT)].pivot_table("selectivity", "site", "select")
    if set(SELECTIONS) <= set(by):
        gain = by["effect"] - by["margin"]
        inside, ahead = plural(len(gain), "inner site"), (gain > 0).sum()
        mean = gain.mean()
        found.append(measured("layers.effect", study, mean, gain=points(mean), ahead=ahead, sites=inside))
    return found


def _paragraph(study: Study, table: pd.DataFrame, total: int) -> str:
    best = chosen(table)
    first, last = best.iloc[0], best.iloc[-1]
    low, high = (best.loc[at] for at in best["selectivity"].agg(["idxmin", "idxmax"]))
    close = best[best["selectivity"] >= last["selectivity"] - CLOSE]["site"]
    ends = {"first": first, "last": last, "saes": plural(int(table["seeds"].max()), "SAE")}
    fves, usable = _ends(best, "fve"), _ends(best, "downstream_accuracy")
    works: dict[str, Any] = {
        name: with_half(row, "selectivity") for name, row in (("at_last", last), ("at_low", low), ("at_high", high))
    }
    text = [
        said("layers.measured", study, count=len(best), total=total, settings=study.runs[0].flat_settings,
             by_effect=(best["select"] == "effect").sum(), **ends),
        said("layers.read", fves=fves, usable=usable, without=table["test_accuracy"].mean(), **ends),
        said("layers.works", within=CLOSE, close=", ".join(close), count=len(close), sites=plural(len(best), "site"),
             low=low, high=high, cost=said("layers.cost", low=low) if low["reached"] else "", **works, **ends),
    ]  # fmt: skip
    never, all_by_passed = best[best["reached"] < 0.5], best[best["bypassed"]]
    if len(never):
        by_passed = f"{never['bypassed'].sum()} of these {len(never)}"
        text.append(said("layers.never", sites=", ".join(never["site"]), by_passed=by_passed, total=len(all_by_passed)))
    rival = table[(table["method"] == RIVAL) & (table["select"] == next(iter(SELECTIONS)))]
    if len(rival):
        ahead = (rival.set_index("site")["selectivity"] > best.set_index("site")["selectivity"]).sum()
        text.append(said("layers.rival", ahead=ahead, count=len(best), rivals=_ends(rival, "selectivity", unsigned)))
    rank = rank_correlation(best["depth"], best["selectivity"])
    return " ".join([*text, said("layers.depth_found", rank=rank, **ends)])


def _ends(table: pd.DataFrame, measure: str, words: Callable[[float], str] = percent) -> str:
    """The lowest and the highest value, each with its site."""
    low, high = table.loc[table[measure].idxmin()], table.loc[table[measure].idxmax()]
    return f"{words(low[measure])} ({low['site']}) and {words(high[measure])} ({high['site']})"


EXPERIMENT = Experiment(
    "layers",
    "Layers: where in the network the edit works",
    analyse,
    quick=(
        *("sweep.sites=3", "sae.steps=300", "capture.positions=8"),
        *("compare.images=5", "edit.images=5", "edit.resolution=3", "edit.alpha=[0,2,4,8,15,30]"),
    ),
    group="beyond",
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
