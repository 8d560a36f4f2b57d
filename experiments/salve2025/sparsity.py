"""Sparsity λ and dictionary size d: variance explained, latents that fire, and how clean the edits are."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import Measured
from experiments.compare import intervals
from experiments.experiment import Experiment, Findings, Picture, main, measured, per_testbed, said
from experiments.figures import PRINT_WIDTH, entry, printed
from experiments.runs import OF_EDITS, Study, measures_of_edits
from salve.report.style import BLACK, BLUE, GREEN, GREY, PURPLE, SKY, VERMILLION, log_axis, new_figure, percent_axis

#: The default λ and d (conf/sae/linear_l1.yaml).
DEFAULT = (5.0, 256)
#: A setting's edits are called clean if this share of the classes separates.
CLEAN = 0.9
#: A setting is close to the best if its selectivity is at most this much lower.
CLOSE = 0.05
#: Measures of the SAE, which are metrics of its run.
MEASURES = ("fve", "l0", "dead_fraction", "downstream_accuracy", "test_accuracy", "select_fve")
#: What the figure shows: measure, title, axis label, and whether it is a share.
PANELS = (
    ("fve", "Explained", "FVE", True),
    ("l0", "Sparse", "L0 (latents per image)", False),
    ("downstream_accuracy", "Usable", "accuracy from reconstructions", True),
    ("share", "Exclusive", "share of a class's latent", True),
    ("selectivity", "Selective", "own drop − others' change", True),
    ("separating", "Clean", "classes that separate", True),
)
LOOKS = ((SKY, "v"), (GREEN, "s"), (BLUE, "o"), (PURPLE, "D"), (VERMILLION, "^"), (BLACK, "X"), (GREY, "P"))


def runs_of(study: Study) -> pd.DataFrame:
    """One row per SAE: ``testbed``, ``seed``, ``sparsity`` (λ), ``size`` (d), ``MEASURES``, and those of
    :func:`experiments.runs.measures_of_edits`."""
    rows = [
        {
            **{"testbed": study.testbed.name, "seed": run.seed, "sparsity": float(run.flat_settings["sae.sparsity"])},
            "size": int(run.flat_settings["sae.dictionary_size"]),
            **{name: run.metrics.get(name) for name in MEASURES},
            **measures_of_edits(run, study.classes),
        }
        for run in study.runs
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(MEASURES, float))


def settings_of(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per ``sparsity`` and ``size``: mean over seeds of every measure, and half its interval's width
    (``<measure>_half``); ``seeds``."""
    measures = [*MEASURES, *OF_EDITS]
    rows = [
        {"sparsity": sparsity, "size": size, "seeds": len(same), **intervals(dict(same[measures].items()))}
        for (sparsity, size), same in runs.groupby(["sparsity", "size"])
    ]
    return pd.DataFrame(rows)


def falling(runs: pd.DataFrame) -> float:
    """Share of the steps from one λ to the next, at the same d and seed, in which both L0 and FVE fall."""
    steps: list[bool] = []
    for _, same in runs.sort_values("sparsity").groupby(["size", "seed"]):
        step = same[["l0", "fve"]].diff().iloc[1:]
        steps += (step < 0).all(axis=1).tolist()
    return float(np.mean(steps)) if steps else np.nan


@printed
def grid_figure(study: Study, settings: pd.DataFrame) -> Figure:
    """Every measure against λ, a line per d: mean over seeds with the interval of the mean."""
    figure = new_figure(PRINT_WIDTH, 4.6)
    grid = figure.subplots(2, 3, sharex=True)
    sizes = sorted(settings["size"].unique())
    for axes, (measure, title, unit, is_share) in zip(grid.flatten(), PANELS, strict=True):
        for place, size in enumerate(sizes):
            shift, look = place - (len(sizes) - 1) / 2, LOOKS[place % len(LOOKS)]
            _line(axes, settings[settings["size"] == size], measure, shift, look)
        axes.set(title=title, ylabel=unit)
        if is_share:
            percent_axis(axes.yaxis)
    for axes in grid.flatten():
        spread = settings["sparsity"]
        log_axis(axes, "x", (spread.min() / 1.4, spread.max() * 1.4))
        axes.set_xticks(sorted(spread.unique()))
    before = float(settings["test_accuracy"].mean())
    if not np.isnan(before):
        grid[0, 2].axhline(before, color=GREY, linestyle=(0, (4, 2)), linewidth=1.1, zorder=1)
    grid[1, 2].axhline(CLEAN, color=GREY, linestyle=(0, (1, 1.5)), linewidth=1.1, zorder=1)
    for axes in grid[1]:
        axes.set_ylim(-0.04, 1.04)
    figure.supxlabel("sparsity λ", fontsize=9)
    handles = [
        *(entry(f"d = {size}", *look, linestyle="-") for size, look in zip(sizes, LOOKS * len(sizes), strict=False)),
        entry("default", BLACK, "o", markersize=8, markerfacecolor="none"),
        entry("untouched network", GREY, linestyle=(0, (4, 2))),
        entry("nine of ten", GREY, linestyle=(0, (1, 1.5))),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=7, columnspacing=1)
    return figure


def _line(axes: Axes, mine: pd.DataFrame, measure: str, shift: float, look: tuple[str, str]) -> None:
    """The line of one dictionary size, moved a little sideways so that intervals do not hide each other."""
    colour, marker = look
    at = mine["sparsity"].to_numpy(float) * 1.05**shift
    half = np.nan_to_num(mine[f"{measure}_half"].to_numpy(float))
    looks: Any = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.2, "elinewidth": 0.9}
    axes.errorbar(at, mine[measure], yerr=half, **looks)
    default = _is_default(mine).to_numpy()
    values = mine[measure].to_numpy(float)[default]
    axes.plot(at[default], values, "o", color=BLACK, markersize=8, markerfacecolor="none")


@per_testbed
def analyse(study: Study) -> Findings:
    runs = runs_of(study)
    settings = settings_of(runs)
    more = {"length": length_of(study), "seeds": settings["seeds"].max(), "strictly": said("separating.strictly")}
    picture = Picture.of(grid_figure(study, settings), "sparsity.grid", study, **more)
    pictures = {f"grid-{study.testbed.name}": picture}
    tables = {"runs": runs, "settings": settings.assign(testbed=study.testbed.name)}
    return Findings(_paragraph(study, settings), pictures, tables, _measured(study, runs, settings))


def _is_default(settings: pd.DataFrame) -> pd.Series:
    return (settings["sparsity"] == DEFAULT[0]) & (settings["size"] == DEFAULT[1])


def length_of(study: Study) -> str:
    """How long the SAEs were trained."""
    settings = study.runs[0].flat_settings
    epochs = settings.get("sae.epochs")
    return f"{settings['sae.steps']} steps" if epochs is None else f"{epochs} epochs"


def best_of(settings: pd.DataFrame) -> pd.Series:
    """The setting with the most selective edits on select, which chooses."""
    return settings.loc[settings["select_selectivity"].idxmax()]


def _close(settings: pd.DataFrame) -> pd.Series:
    """The settings that come close on test to the one that select chose."""
    return settings["selectivity"] >= best_of(settings)["selectivity"] - CLOSE


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():g}", f"{values.max():g}"
    return low if low == high else f"{low} to {high}"


def _measured(study: Study, runs: pd.DataFrame, settings: pd.DataFrame) -> list[Measured]:
    of, fall, best = len(settings), falling(runs), best_of(settings)
    found = [] if np.isnan(fall) else [measured("sparsity.trade", study, fall)]
    clean = settings["separating"] >= CLEAN
    rows, close = settings[clean], _close(settings).sum()
    where = f" (λ {_span(rows['sparsity'])}, d {_span(rows['size'])})" if len(rows) else ""
    published = f"{(settings['separating_published'] >= CLEAN).sum()} of {of} settings"
    found.append(measured("sparsity.plateau", study, clean.mean(), published, count=len(rows), of=of, where=where,
                          close=close, within=CLOSE))  # fmt: skip
    if len(default := settings[_is_default(settings)]):
        gap = best["selectivity"] - default["selectivity"].iloc[0]
        side = "below" if gap >= 0 else "above"
        found.append(measured("sparsity.default", study, gap, gap=abs(gap), side=side, of=of, best=best))
    return found


def _paragraph(study: Study, settings: pd.DataFrame) -> str:
    rows = {
        **{"low": settings.min(), "high": settings.max(), "best": best_of(settings)},
        "worst": settings.loc[settings["select_selectivity"].idxmin()],
        "fit": settings.loc[settings["select_fve"].idxmax()],
    }
    close = _close(settings).sum()
    text = said("sparsity.found", study, count=len(settings), within=CLOSE, close=close, **rows)
    if len(default := settings[_is_default(settings)]):
        text += " " + said("sparsity.default", length=length_of(study), default=default.iloc[0])
    return text


EXPERIMENT = Experiment(
    "sparsity",
    "Sparsity and dictionary size",
    analyse,
    quick=("sae.sparsity=1,5,20", "sae.dictionary_size=64,256", "sae.seed=0,1", "sae.epochs=10"),
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
