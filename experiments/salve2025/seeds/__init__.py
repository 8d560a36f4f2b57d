"""SAEs that differ in their seed alone, on one classifier: how different their bases are, how similar their edits."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import Measured
from experiments.compare import LEVEL_TEXT, t_interval
from experiments.experiment import Experiment, Findings, Picture, measured, per_testbed, said
from experiments.figures import PRINT_WIDTH, class_panels, class_rows, entry, mean_and_range, printed
from experiments.runs import SENSES, Study, separation
from experiments.salve2025.seeds import measures
from experiments.salve2025.seeds.measures import Likeness, Stability, mean_of_known, over_pairs, variation
from salve.report import style
from salve.report.intervals import Interval
from salve.report.style import BLUE, GREEN, GREY, ORANGE, VERMILLION
from salve.report.text import label, number

#: Quantile of the images' strengths at which the panel of two seeds ends; a few strengths are in the thousands.
SEEN = 0.998


@printed
def stability_figure(study: Study, found: Stability, edits: pd.DataFrame) -> Figure:
    """How unlike the bases are, and how alike each class's latent, its edit and its images' critical strengths."""
    classes, alike = study.classes, found.alike
    figure = style.new_figure(PRINT_WIDTH, 3.35 + 0.23 * len(classes))
    grid = figure.add_gridspec(2, 1, height_ratios=(2.3, 0.55 + 0.23 * len(classes)))
    top: Any = grid[0].subgridspec(1, 2, width_ratios=(1.7, 1)).subplots()
    _cosines(top[0], alike)
    _two_seeds(top[1], study, found.strengths)
    spots: Any = grid[1].subgridspec(1, 4).subplots(sharey=True)
    pairs = np.triu_indices(len(study.runs), 1)
    for shift, colour, values, apart in (
        (-0.17, ORANGE, alike.direction, alike.direction_apart),
        (0.17, GREEN, alike.gate, alike.gate_apart),
    ):
        _dots(spots[0], [table[pairs] for table in values], [over_pairs(table) for table in values], colour, shift)
        _ticks(spots[0], apart, shift)
    by_class = [edits[edits["class"] == name] for name in classes]
    alphas = [rows["alpha"].replace(math.inf, math.nan).to_numpy(float) for rows in by_class]
    _dots(spots[1], alphas, list(map(t_interval, alphas)), ORANGE)
    clean = [rows["selectivity"].to_numpy(float) for rows in by_class]
    _dots(spots[2], clean, list(map(t_interval, clean)), ORANGE)
    _dots(spots[3], [table[pairs] for table in found.ranks], list(map(over_pairs, found.ranks)), BLUE)
    _ticks(spots[3], found.margin_ranks, 0)
    for axes in spots:
        class_rows(axes, list(map(label, classes)))
    spots[0].set(title="Latent of the class", xlabel="|cosine| of two seeds", xlim=(-0.03, 1.03))
    spots[1].set(title="Strength", xlabel=f"α that leaves {LEVEL_TEXT} (select)", xlim=(0, None))
    spots[2].set(title="Selectivity", xlabel="own drop − others' change")
    spots[3].set(title="Order of images", xlabel="rank correlation of α")
    style.percent_axis(spots[2].xaxis)
    return figure


def _cosines(axes: Axes, alike: Likeness) -> None:
    """Over all pairs of seeds, the share of latents with at least a cosine."""
    at = np.linspace(0, 1, 201)
    one, other = np.triu_indices(alike.direction.shape[1], 1)
    shares = np.stack([(row[:, None] >= at).mean(axis=0) for row in alike.cosines])
    mean_and_range(axes, at, shares, BLUE, 0.3, label="latents of two seeds, matched one to one")
    twins = (alike.nearest[:, :, None] >= at).mean(axis=(0, 1))
    axes.plot(at, twins, color=VERMILLION, linewidth=1.2, label="each latent and its nearest in the same SAE")
    for values, colour, name in (
        (alike.direction, ORANGE, "the class's latents of two seeds"),
        (alike.gate, GREEN, "their gates |c|"),
    ):
        found = values[:, one, other].flatten()
        found = found[~np.isnan(found)]
        axes.plot(at, (found[:, None] >= at).mean(axis=0), color=colour, label=name)
    dashed: Any = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 1.2}
    axes.axvline(alike.chance, **dashed, label="random directions, matched: mean")
    axes.set(title="The bases", xlabel="|cosine| of two latents", ylabel="share with at least this")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    style.percent_axis(axes.yaxis)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none", borderpad=0.2)


def _two_seeds(axes: Axes, study: Study, strengths: pd.DataFrame) -> None:
    """Each image's critical strength under the first two SAEs."""
    one, other = (run.seed for run in study.runs[:2])
    both = strengths[[one, other]].to_numpy(float)
    both = both[np.isfinite(both).all(axis=1) & (both > 0).all(axis=1)]
    limits = style.log_range(both[both <= np.quantile(both, SEEN)] if len(both) else both)
    axes.plot(limits, limits, color=GREY, linewidth=0.9, zorder=1)
    axes.plot(*both.T, ".", color=BLUE, markersize=2, alpha=0.25, markeredgewidth=0)
    for which, seed in (("x", one), ("y", other)):
        style.log_axis(axes, which, limits)
        axes.set(**{f"{which}label": f"α that flips an image, seed {seed}"})
    axes.set(title="The images", aspect="equal")


def _dots(
    axes: Axes, values: Sequence[np.ndarray], intervals: Sequence[Interval], colour: str, shift: float = 0
) -> None:
    """A row per class: every value, and the mean with its interval."""
    for row, (each, (mean, half, _)) in enumerate(zip(values, intervals, strict=True)):
        at = row + shift
        axes.plot(each, np.full(len(each), at), ".", color=colour, markersize=3.5, alpha=0.35, markeredgewidth=0)
        axes.errorbar(mean, at, xerr=np.nan_to_num(half), fmt="o", color=colour, markersize=3.2, elinewidth=1.4,
                      markeredgecolor="white", markeredgewidth=0.5, zorder=3)  # fmt: skip


def _ticks(axes: Axes, values: Float[np.ndarray, "C S"], shift: float) -> None:
    """A grey mark per class at the mean over SAEs of what the values are compared with."""
    for row, each in enumerate(values):
        known = each[~np.isnan(each)]
        if len(known):
            axes.plot(known.mean(), row + shift, "|", color=GREY, markersize=6, markeredgewidth=1.4)


@printed
def curves_figure(study: Study, edits: pd.DataFrame) -> Figure:
    """A panel per class: under every SAE the class's accuracy and the mean of the others' while it is suppressed."""
    names = [name for name in study.classes if name in set(edits["class"])]
    figure, panels = class_panels(names, "strength α of suppression", "accuracy")
    for axes, name in zip(panels, names, strict=True):
        own = study.classes.index(name)
        mine = edits[edits["class"] == name]
        for run in study.runs:
            if run.seed in set(mine["seed"]):
                alphas, accuracy = run.curves("test", "suppress", name)
                others = np.nanmean(np.delete(accuracy, own, axis=1), axis=1)
                axes.plot(alphas, others, color=BLUE, linewidth=0.7, alpha=0.5)
                axes.plot(alphas, accuracy[:, own], color=ORANGE, linewidth=0.7, alpha=0.6)
        reached = mine[mine["reached"]]
        mean, half, count = t_interval(reached["alpha"].to_numpy(float))
        if count:
            text = f"{number(mean, 2)} ± {number(half, 1)}" if count > 1 else number(mean, 2)
            text = f"{LEVEL_TEXT} (select) at α\n{text}"
            axes.text(0.05, 0.2, text, transform=axes.transAxes, va="center", fontsize=7)
        style.grid_axis(axes, alphas)
    handles = [entry("the class, a line per SAE", ORANGE), entry("mean of the others, a line per SAE", BLUE)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


@per_testbed
def analyse(study: Study) -> Findings:
    testbed, edits = study.testbed, measures.edits_of(study)
    if len(study.runs) < 2:
        return Findings(f"{testbed.title}: one SAE only, with which nothing can be compared.", {}, {"edits": edits})
    found = measures.stability_of(study, edits)
    pictures = {
        f"stability-{testbed.name}": Picture.of(stability_figure(study, found, edits), "seeds.stability", study),
        f"curves-{testbed.name}": Picture.of(curves_figure(study, edits), "seeds.curves", study),
    }
    tables = {
        **{"edits": edits, "pairs": _pairs_table(study, found), "bases": _bases_table(study, found)},
        **{"within": _within_table(study, found), "images": found.strengths.assign(testbed=testbed.name)},
    }
    return Findings(_paragraph(study, found, edits), pictures, tables, _measured(study, found, edits))


def _pairs_table(study: Study, found: Stability) -> pd.DataFrame:
    """One row per class and two SAEs: every measure of the two."""
    pairs = list(combinations(enumerate(run.seed for run in study.runs), 2))
    rows = [
        {"testbed": study.testbed.name, "class": name, "seed_a": seed_a, "seed_b": seed_b}
        | {measure: table[k, a, b] for measure, table in found.by_class.items()}
        for k, name in enumerate(study.classes)
        for (a, seed_a), (b, seed_b) in pairs
    ]
    return pd.DataFrame(rows)


def _bases_table(study: Study, found: Stability) -> pd.DataFrame:
    """One row per two SAEs and rank of a matched pair of latents: their cosine."""
    pairs = list(combinations([run.seed for run in study.runs], 2))
    count, size = found.alike.cosines.shape
    table = pd.DataFrame(np.repeat(pairs, size, axis=0), columns=["seed_a", "seed_b"])
    rank, cosine = np.tile(np.arange(1, size + 1), count), found.alike.cosines.flatten()
    return table.assign(rank=rank, cosine=cosine, testbed=study.testbed.name)


def _within_table(study: Study, found: Stability) -> pd.DataFrame:
    """One row per SAE and class: what the likeness of two SAEs is to be compared with."""
    alike = found.alike
    columns = {name: getattr(alike, name) for name in ("copies", "direction_apart", "gate_apart")}
    columns["margin_rank"] = found.margin_ranks
    rows = [
        {"testbed": study.testbed.name, "seed": run.seed, "class": name, "nearest": alike.nearest[s].mean()}
        | {column: values[k, s] for column, values in columns.items()}
        for s, run in enumerate(study.runs)
        for k, name in enumerate(study.classes)
    ]
    return pd.DataFrame(rows)


def _measured(study: Study, found: Stability, edits: pd.DataFrame) -> list[Measured]:
    seeds, classes = len(study.runs), len(study.classes)
    counted = separation(study.runs, classes)
    always, published = (int((edits.groupby("class")[sense].sum() == seeds).sum()) for sense in SENSES)
    of_all, count = f"{published} of {classes} classes under all {seeds} SAEs", counted.share * classes
    strengths = edits.groupby("class")["alpha"].apply(variation)
    varies, most = strengths.median(), _most(strengths)
    apart = mean_of_known(found.alike.direction_apart.flatten())
    ranks = {"by_class": _range(found.ranks), "medians": _interval(found.median_ranks)}
    return [
        measured("seeds.separates", study, always / classes, of_all, always=always, count=count, span=counted.span),
        measured("seeds.strength", study, varies, varies=_percent(varies), most=most),
        measured("seeds.direction", study, _mean(found.alike.direction), apart=apart),
        measured("seeds.ranks", study, _mean(found.ranks), "", **ranks),
    ]


def _percent(value: float) -> str:
    if math.isnan(value):
        return "an unknown share"
    return "without bound" if math.isinf(value) else f"{100 * value:.1f} %"


def _most(varies: pd.Series) -> str:
    known = varies.dropna()
    return f" (most for {known.idxmax()}: {_percent(known.max())})" if len(known) else ""


def _mean(tables: np.ndarray) -> float:
    """Over pairs of seeds and classes."""
    return mean_of_known(over_pairs(table).mean for table in tables)


def _range(tables: np.ndarray) -> str:
    means = [over_pairs(table).mean for table in tables]
    if np.isnan(means).all():
        return "unknown"
    return f"{np.nanmin(means):.2f} to {np.nanmax(means):.2f}".replace("-", "−")


def _interval(table: np.ndarray) -> str:
    mean, half, _ = over_pairs(table)
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def _paragraph(study: Study, found: Stability, edits: pd.DataFrame) -> str:
    alike = found.alike
    matched, nearest = alike.cosines.mean(), alike.nearest.mean()
    varies, flips = (edits.groupby("class")[name].apply(variation) for name in ("alpha", "alpha_flip"))
    clean = edits.groupby("class")["selectivity"].agg(["min", "max"])
    spread = (clean["max"] - clean["min"]).dropna()
    one, other = np.triu_indices(len(study.runs), 1)
    return said(
        "seeds.found", study, same_cosine=measures.SAME, copy_cosine=measures.COPY,
        chance=alike.chance, matched=matched, nearest=nearest,
        alike=_percent(float((alike.cosines >= measures.SAME).mean())),
        crowded=", so that a matching can hardly tell which is which" if nearest > matched - 0.1 else "",
        copies=mean_of_known(alike.copies.flatten()), gate_apart=mean_of_known(alike.gate_apart.flatten()),
        direction=_mean(alike.direction), directions=_range(alike.direction), gate=_mean(alike.gate),
        paired=_percent(mean_of_known(alike.partners[:, one, other].flatten())),
        reached=edits["reached"].sum(), edits=len(edits), after=edits["after"].mean(),
        varies=_percent(varies.median()), varies_most=_most(varies),
        flips=_percent(flips.median()), flips_most=_most(flips), spread=spread.median(),
        spread_most=f", most for {spread.idxmax()} ({100 * spread.max():.1f})" if len(spread) else "",
        ranks=_mean(found.ranks), ranks_by_class=_range(found.ranks), medians=_interval(found.median_ranks),
        margins=mean_of_known(found.margin_ranks.flatten()),
    )  # fmt: skip


EXPERIMENT = Experiment(
    "seeds", "Ten SAE seeds: other bases, the same edits?", analyse, quick=("sae.seed=0,1,2", "sae.epochs=20")
)
