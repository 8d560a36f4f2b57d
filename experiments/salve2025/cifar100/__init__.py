"""A hundred classes: how much they share latents, and who falls when one class's latent is suppressed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from experiments.claims import Measured
from experiments.compare import t_interval
from experiments.experiment import Experiment, Findings, Picture, joined, said
from experiments.figures import PRINT_WIDTH, class_rows, entry, mean_and_range, printed
from experiments.runs import Study, separation
from experiments.salve2025.cifar100.survey import KINDS, Survey, over_saes, survey_of
from salve.editing.verdict import LIMITS, wilson
from salve.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, percent_axis, plain_number
from salve.report.text import label, percent, plural

COLOURS = (ORANGE, BLUE, GREEN, BLACK)
#: More classes than this are shown in two columns.
ONE_COLUMN = 30
DIVERGING = LinearSegmentedColormap.from_list("loss and gain", [VERMILLION, "#edaa85", "#ffffff", "#86b9de", BLUE])
#: Of the figure's last panel, which is there where classes have superclasses.
KINSHIP = " d: how often the class that loses most is of the edited one's superclass; 95 % over edits."
#: The testbed that the claims are about.
MANY = "cifar100"


@printed
def classes_figure(found: Survey) -> Figure:
    """A row per class, the most harmful edits first: what its edit costs the others, and how many share its latent."""
    table = found.classes
    harm = table.groupby("class")[["worst_loss", "drift"]].mean()
    order = list(harm.sort_values(["worst_loss", "drift"], ascending=False, na_position="last").index)
    columns = 1 if len(order) <= ONE_COLUMN else 2
    rows = -(-len(order) // columns)
    figure = new_figure(PRINT_WIDTH if columns == 2 else 4.6, 1.0 + 0.148 * rows)
    grid = figure.subplots(1, 2 * columns, sharex=False, squeeze=False, width_ratios=[3, 1.7] * columns)[0]
    worst, most = max(5.0, 100 * np.nanmax([0, *table["worst_loss"]])), max(1, int(table["companions"].max()))
    for column in range(columns):
        names = order[column * rows : (column + 1) * rows]
        lost, shared = grid[2 * column : 2 * column + 2]
        _harm(lost, table, names, found)
        lost.set_xlim(-0.03 * worst, 1.05 * worst)
        _dots(shared, table, names, "companions", 1, GREEN)
        shared.set(xlim=(-0.06 * most, 1.06 * most), xlabel="companions on\nits latent")
        shared.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        class_rows(lost, [label(name, 16) for name in names])
        class_rows(shared, [""] * len(names))
        for axes in (lost, shared):
            axes.set_ylim(rows - 0.4, -0.6)  # columns of different length
            axes.tick_params(length=0, labelsize=7)
            axes.grid(visible=True, axis="y", linewidth=0.4)
    looks = (("the class that loses most (named)", VERMILLION), ("mean |change| of the others", BLUE),
             ("companions", GREEN))  # fmt: skip
    handles = [entry(name, colour, "o", linestyle="-") for name, colour in looks]
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if columns == 2 else 1)
    return figure


def _harm(axes: Axes, table: pd.DataFrame, names: list[str], found: Survey) -> None:
    """Losses in points where the class is at 5 %, with the name of who loses most at the right."""
    _dots(axes, table, names, "drift", 100, BLUE)
    _dots(axes, table, names, "worst_loss", 100, VERMILLION)
    for row, name in enumerate(names):
        text, sure, kin = _loser(table[table["class"] == name], name, found)
        axes.text(
            1.03, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7,
            color=BLACK if sure else GREY, fontweight="bold" if kin else "normal",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("loss or |change|\n(percentage points)")


def _loser(own: pd.DataFrame, name: str, found: Survey) -> tuple[str, bool, bool]:
    """Who loses most by a class's edit, in most of the SAEs; whether that is one class, and whether it is a sibling."""
    if not own["reached"].any():
        return "no strength", False, False
    losers = own["loses_most"][own["reached"]].where(own["lose_as_much"] <= 1, "several").mode()[0]
    if losers in ("", "several"):
        return losers or "none", False, False
    return label(losers, 16), True, bool(found.kin[found.study.classes.index(name), found.study.classes.index(losers)])


def _dots(axes: Axes, table: pd.DataFrame, names: list[str], column: str, scale: float, colour: str) -> None:
    """Mean over SAEs, and their range."""
    by_class = scale * table.groupby("class")[column].agg(["mean", "min", "max"]).reindex(names)
    rows = np.arange(len(names))
    axes.hlines(rows, by_class["min"], by_class["max"], color=colour, linewidth=1.6, alpha=0.45)
    axes.plot(by_class["mean"], rows, "o", color=colour, markersize=3)


@printed
def drift_figure(found: Survey) -> Figure:
    """Every edited class (rows) against every class (columns), by superclass where there is one."""
    groups = found.groups
    names = np.array(groups or found.study.classes)
    by_group = np.lexsort((np.array(found.study.classes), names))
    order = by_group if groups else np.arange(len(names))
    mean = 100 * over_saes(np.nanmean, found.change)[np.ix_(order, order)]
    np.fill_diagonal(mean, np.nan)
    few = len(order) <= ONE_COLUMN
    figure = new_figure(4.6 if few else 6.6, 3.1 if few else 4.75)
    axes = figure.subplots()
    axes.set_facecolor("#d9dde1")
    norm = SymLogNorm(100 * LIMITS.others_mean_change, linscale=0.6, vmin=-100, vmax=100)  # the same in all figures
    image = axes.imshow(mean, cmap=DIVERGING, norm=norm, interpolation="nearest", aspect="equal")
    if groups:
        blocks, size = np.unique(names[order], return_counts=True)
        ends = np.cumsum(size)
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="#9aa2ab", linewidth=0.4)
            axes.axvline(end - 0.5, color="#9aa2ab", linewidth=0.4)
        ticks, text = ends - size / 2 - 0.5, [label(name, 32) for name in blocks]
    else:
        ticks, text = np.arange(float(len(order))), [label(found.study.classes[k], 18) for k in order]
    axes.set_yticks(ticks, text, fontsize=7)
    axes.set_xticks(ticks, [])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set(xlabel="other class, in the same order", ylabel="edited class" + (", by superclass" if groups else ""))
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, ticks=[-100, -30, -10, -3, 0, 3, 10, 30, 100])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("change of accuracy (percentage points)")
    return figure


@printed
def sharing_figure(surveys: Sequence[Survey]) -> Figure:
    """The testbeds beside each other: companions, kinds of latents, and what siblings share."""
    related = any(one.groups for one in surveys)
    figure = new_figure(PRINT_WIDTH, 2.75)
    ratios = [1.35, 1.15, 1.15, 0.85][: 4 if related else 3]
    grid = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    _companions(grid[0], surveys)
    _kinds(grid[1], surveys)
    _overlap(grid[2], surveys)
    if related:
        _kinship(grid[3], surveys)
    handles = [
        entry(f"{one.study.testbed.title}: {len(one.study.classes)} classes", colour, linewidth=4)
        for one, colour in zip(surveys, COLOURS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _companions(axes: Axes, surveys: Sequence[Survey]) -> None:
    """Share of the classes with at least so many companions; mean and range over SAEs."""
    most = max(1, *(int(one.classes["companions"].max()) for one in surveys))
    steps = np.arange(1, most + 1)
    for one, colour in zip(surveys, COLOURS, strict=False):
        shares = np.stack(
            [(own.to_numpy()[:, None] >= steps).mean(axis=0) for _, own in one.classes.groupby("seed")["companions"]]
        )
        mean_and_range(axes, steps, shares, colour, 0.25, marker="o", markersize=2.5, linewidth=1.2)
    axes.set(title="a  companions", xlabel="companions on its latent, at least", ylabel="classes")
    axes.set(xlim=(0.6, max(most, 4) + 0.4), ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    percent_axis(axes.yaxis)


def _kinds(axes: Axes, surveys: Sequence[Survey]) -> None:
    """Of which kind the classes' latents are."""
    left = np.zeros(len(surveys))
    for kind, colour in zip(KINDS, (BLUE, VERMILLION, GREY), strict=True):
        share = np.array([one.summary[kind].mean() for one in surveys])
        axes.barh(range(len(surveys)), share, left=left, color=colour, height=0.5, label=kind)
        left += share
    axes.set_yticks(range(len(surveys)), [str(len(one.study.classes)) for one in surveys])
    axes.set(title="b  kind of its latent", xlabel="classes", ylabel="number of classes")
    axes.set(xlim=(0, 1), ylim=(len(surveys) - 0.4, -1.25))
    percent_axis(axes.xaxis)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", fontsize=7, handlelength=0.9, borderpad=0.1, labelspacing=0.25)


def _overlap(axes: Axes, surveys: Sequence[Survey]) -> None:
    """Dominant latents that two classes have in common, as bars with Student's interval over SAEs."""
    bars = []
    for one, colour in zip(surveys, COLOURS, strict=False):
        if one.groups:
            bars.append(("siblings", colour, one.summary["overlap_siblings"]))
        bars.append(("others" if one.groups else "all", colour, one.summary["overlap_others"]))
    for place, (_, colour, values) in enumerate(bars):
        mean, half, _ = t_interval(values)
        axes.bar(place, mean, color=colour, width=0.6, yerr=None if np.isnan(half) else half, ecolor=BLACK, capsize=2)
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set(title="c  common latents", xlabel="pairs of classes", ylabel="Jaccard index")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, max(0.1, axes.get_ylim()[1]))


def _kinship(axes: Axes, surveys: Sequence[Survey]) -> None:
    """How often the class that loses most is a sibling, with Wilson's interval over edits, against chance."""
    dashed: dict[str, Any] = {"color": BLACK, "linewidth": 1.4, "linestyle": (0, (3, 1.5))}
    for place, (one, colour) in enumerate(zip(surveys, COLOURS, strict=False)):
        share, edits = one.summary["sibling_share"].mean(), one.summary["sibling_edits"].mean()
        if not np.isnan(share):
            count = np.array([max(1.0, edits)])
            low, high = wilson(share * count, count)
            error = [np.maximum(share - low, 0), np.maximum(high - share, 0)]
            axes.bar(place, share, width=0.6, color=colour, yerr=error, ecolor=BLACK, capsize=2)
            axes.hlines(one.summary["sibling_chance"].mean(), place - 0.45, place + 0.45, **dashed)
    known = [place for place, one in enumerate(surveys) if one.groups]
    axes.set_xticks(known, [str(len(surveys[place].study.classes)) for place in known])
    axes.set(title="d  sibling falls", xlabel="number of classes", ylabel="edits")
    axes.set(xlim=(known[0] - 0.7, known[-1] + 0.7), ylim=(0, 1))
    axes.legend(handles=[Line2D([], [], **dashed, label="chance")], loc="upper right")
    percent_axis(axes.yaxis)
    axes.grid(axis="x", visible=False)


def analyse(studies: Sequence[Study]) -> Findings:
    surveys = [survey_of(study) for study in studies]
    related, titles = any(one.groups for one in surveys), " and ".join(one.study.testbed.title for one in surveys)
    sharing = Picture.of(sharing_figure(surveys), "cifar100.sharing", titles=titles, kinship=KINSHIP if related else "")
    pictures = {"sharing": sharing}
    for one in surveys:
        saes = plural(len(one.summary), "SAE")
        kin, order = (" Bold: of the same superclass.", ", by superclass") if one.groups else ("", "")
        name = one.study.testbed.name
        pictures[f"classes-{name}"] = Picture.of(classes_figure(one), "cifar100.classes", one.study, kin=kin, saes=saes)
        pictures[f"drift-{name}"] = Picture.of(drift_figure(one), "cifar100.drift", one.study, order=order, saes=saes)
    many = max(surveys, key=lambda one: len(one.study.classes))
    fewer = next((one for one in surveys if len(one.study.classes) < len(many.study.classes)), None)
    paragraphs = [*map(_paragraph, surveys), *([_comparison(many, fewer)] if fewer else [])]
    tables = {name: joined([getattr(one, name) for one in surveys]) for name in ("summary", "classes", "pairs")}
    return Findings("\n\n".join(paragraphs), pictures, tables, _measured(surveys, fewer))


def _measured(surveys: Sequence[Survey], fewer: Survey | None) -> list[Measured]:
    """For the claims, which are about CIFAR-100 alone."""
    one = next((one for one in surveys if one.study.testbed.name == MANY), None)
    if one is None:
        return []
    counted, share = separation(one.study.runs, len(one.study.classes)), one.summary["with_companion"].mean()
    beside, compared = math.nan, "no testbed with fewer classes beside it"
    if fewer:
        beside = fewer.summary["with_companion"].mean()
        compared = f"{percent(beside, 0)} with {len(fewer.study.classes)} ({fewer.study.testbed.title})"
    text = f"{percent(share, 0)} of {len(one.study.classes)} classes share their latent; {compared}"
    return [
        Measured(f"{MANY}.separates", MANY, counted.share, counted.text, counted.published),
        Measured(f"{MANY}.sharing", MANY, float(share - beside), text),
    ]


def _paragraph(one: Survey) -> str:
    means, counted = one.summary.mean(numeric_only=True), separation(one.study.runs, len(one.study.classes))
    text = said("cifar100.found", one.study, counted=counted, means=means)
    return text if math.isnan(means["sibling_share"]) else f"{text} {said('cifar100.siblings', means=means)}"


def _comparison(many: Survey, fewer: Survey) -> str:
    shares = [one.summary["with_companion"].mean() for one in (many, fewer)]
    counts = [len(one.study.classes) for one in (many, fewer)]
    more, less = shares[0] > shares[1], shares[0] < shares[1]
    verb = "share more than" if more else "share less than" if less else "share as much as"
    one_of = [1 / (count - 1) for count in counts]
    limit = LIMITS.others_worst_loss
    return said("cifar100.compared", verb=verb, counts=counts, shares=shares, one_of=one_of, limit=limit)


EXPERIMENT = Experiment(
    "cifar100",
    "A hundred classes: what they share",
    analyse,
    quick=("sae.seed=0,1", "sae.epochs=20", "edit.alpha=[0,1,2,3,4,6,8,11,15,20,30,50]"),
    testbeds=("cifar100",),
    beside=("resnet18",),
)
