"""Figures: how many latents are shared, and what the classes do when one is suppressed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.compare import t_interval
from experiments.figures import PRINT_WIDTH
from experiments.runs import Study
from experiments.salve2025.cross_class.effects import ALPHAS
from experiments.salve2025.cross_class.roles import DRAGGED, FALLS, NONE, REDUNDANT, RISES, STAYS
from experiments.salve2025.cross_class.tables import Case
from experiments.testbeds import TESTBEDS
from salve.report.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    percent_axis,
    plain_number,
    styled,
)
from salve.report.text import label

COLOURS = {FALLS: VERMILLION, REDUNDANT: BLUE, STAYS: SKY, RISES: GREEN, DRAGGED: PURPLE, NONE: GREY}
MARKS = {FALLS: "v", REDUNDANT: "s", STAYS: "D", RISES: "^", DRAGGED: "X", NONE: "o"}
#: Classes in a panel: those that depend on the latent or change most.
MOST_CLASSES = 12
KINDS = {"class-defining": BLUE, "cross-class": ORANGE, "diffuse": GREY}


@styled
def counts_figure(saes: pd.DataFrame, latents: pd.DataFrame) -> Figure:
    """A row per testbed: shared latents in each SAE, and how often a latent of each kind takes several classes down."""
    testbeds = list(dict.fromkeys(saes["testbed"]))
    figure = new_figure(PRINT_WIDTH, 0.45 + 1.95 * len(testbeds))
    grid = figure.subplots(len(testbeds), 2, squeeze=False)
    for (left, right), testbed in zip(grid, testbeds, strict=True):
        mine = saes[saes["testbed"] == testbed]
        settings = sorted(set(zip(mine["dictionary_size"], mine["sparsity"], strict=True)), reverse=True)
        title = TESTBEDS[testbed].title
        _counts(left, mine, settings, title)
        _several(right, latents[latents["testbed"] == testbed], settings, title)
    looks: dict[str, Any] = {"ncols": 3, "fontsize": 7.5, "handletextpad": 0.1, "columnspacing": 1.0}
    figure.legend(handles=_marks("o", list(STEPS.values())), loc="outside upper left", **looks)
    figure.legend(handles=_marks("s", list(KINDS.items())), loc="outside upper right", **looks)
    return figure


STEPS = {
    "by_share": ("shared by share", GREY),
    "shared": ("and count for both", SKY),
    "clean": ("and drag no other", ORANGE),
}


def _marks(mark: str, entries: Sequence[tuple[str, str]]) -> list[Line2D]:
    return [Line2D([], [], color=colour, marker=mark, linestyle="", label=name) for name, colour in entries]


def _counts(axes: Axes, saes: pd.DataFrame, settings: Sequence[tuple[int, float]], title: str) -> None:
    """Dots: SAEs; bars: their mean."""
    for place, (size, sparsity) in enumerate(settings):
        one = saes[(saes["dictionary_size"] == size) & (saes["sparsity"] == sparsity)]
        for offset, (name, (_, colour)) in zip((-0.26, 0, 0.26), STEPS.items(), strict=True):
            x = place + offset
            spread = x + np.linspace(-0.09, 0.09, len(one)) if len(one) > 1 else np.array([x])
            axes.plot(spread, one[name], "o", color=colour, markersize=2.6, alpha=0.75)
            axes.plot([x - 0.12, x + 0.12], [one[name].mean()] * 2, color=BLACK, linewidth=1.4)
    axes.set_title(title, fontsize=8.5)
    axes.set_ylabel("latents per SAE", fontsize=8)
    axes.set_ylim(bottom=-0.4)
    _settings_axis(axes, settings)


def _several(axes: Axes, latents: pd.DataFrame, settings: Sequence[tuple[int, float]], title: str) -> None:
    """By kind, the share of latents under which two or more classes fall; over SAEs with an interval."""
    for place, (size, sparsity) in enumerate(settings):
        one = latents[(latents["dictionary_size"] == size) & (latents["sparsity"] == sparsity)].dropna(subset="fallen")
        for offset, (kind, colour) in zip((-0.22, 0, 0.22), KINDS.items(), strict=True):
            some = one[one["kind"] == kind]
            mean, half, count = t_interval((some["fallen"] >= 2).groupby(some["seed"]).mean().tolist())
            if count:
                half = 0.0 if math.isnan(half) else half
                low, high = max(mean - half, 0.0), min(mean + half, 1.0)
                axes.plot([place + offset] * 2, [low, high], color=colour, linewidth=1.4)
                axes.plot(place + offset, mean, "s", color=colour, markersize=4.5)
    axes.set_title(title, fontsize=8.5)
    axes.set_ylabel("take two classes down", fontsize=8)
    axes.set_ylim(-0.03, 1.05)
    percent_axis(axes.yaxis)
    _settings_axis(axes, settings)


def _settings_axis(axes: Axes, settings: Sequence[tuple[int, float]]) -> None:
    axes.set_xticks(range(len(settings)), [f"d {size}\nλ {sparsity:g}" for size, sparsity in settings], fontsize=7.5)
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.grid(False, axis="x")


@styled
def roles_figure(study: Study, cases: Sequence[Case]) -> Figure:
    """A row per latent: class means, change of accuracy where its first class is lost, accuracy by strength."""
    shown = min(len(study.classes), MOST_CLASSES)
    figure = new_figure(PRINT_WIDTH, 0.4 + (0.75 + 0.155 * shown) * len(cases))
    rows = figure.subfigures(len(cases), 1, squeeze=False)[:, 0]
    for part, case in zip(rows, cases, strict=True):
        classes = _shown(case, shown)
        means, changes, curves = part.subplots(1, 3, width_ratios=(1.0, 1.1, 1.2))
        part.suptitle(
            f"{case.title}, suppressed by α = {case.shared.alpha:.1f}",
            fontsize=8.5, fontweight="bold", x=0.01, ha="left",
        )  # fmt: skip
        if note := _reserve(case):
            part.supxlabel(note, fontsize=7.5, x=0.01, ha="left", color=COLOURS[REDUNDANT])
        _means(means, study, case, classes)
        _changes(changes, case, classes)
        _curves(curves, case)
    used = [role for role in COLOURS if any(role in case.roles.roles for case in cases) and role != NONE]
    handles = [Line2D([], [], color=COLOURS[role], marker=MARKS[role], linestyle="", label=role) for role in used]
    handles += [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="other classes"),
        Line2D([], [], color=BLACK, marker="|", markersize=7, linestyle="", label="usual for this class"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=7.5, handletextpad=0.2)
    return figure


def _shown(case: Case, count: int) -> list[int]:
    """Classes of a panel, from top to bottom in their own order."""
    change = np.abs(np.nan_to_num(case.roles.change.mean))
    order = sorted(range(len(change)), key=lambda k: (k not in case.shared.classes, -change[k]))
    return sorted(order[:count])


def _reserve(case: Case) -> str:
    """What shows that a class is redundant."""
    for k in case.classes(REDUNDANT):
        back, name = case.roles.backing[k], label(case.reading.study.classes[k], 18)
        return (
            f"{name} keeps {100 * back.alone:.0f} % when its own latent {back.own} is suppressed halfway, "
            f"{100 * back.joint:.0f} % when this one is too, {100 * back.control:.0f} % when another class's is."
        )
    return ""


def _means(axes: Axes, study: Study, case: Case, classes: Sequence[int]) -> None:
    latents = case.reading.run.sae.encode(study.train.activations)[:, case.shared.latent]
    for row, k in enumerate(classes):
        values = latents[study.train.labels == k].tolist()
        mean, half, _ = t_interval(values)
        axes.barh(row, mean, color=COLOURS[case.roles.roles[k]], height=0.7,
                  hatch="//////" if k in case.shared.classes else None, edgecolor="white", linewidth=0)  # fmt: skip
        if not math.isnan(half):
            axes.plot([mean - half, mean + half], [row, row], color=BLACK, linewidth=0.9)
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set_xlabel("class mean (train)", fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    names = [label(study.classes[k], 17) for k in classes]
    axes.set_yticks(range(len(classes)), names, fontsize=7.2)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=7.2)


def _changes(axes: Axes, case: Case, classes: Sequence[int]) -> None:
    roles = case.roles
    for row, k in enumerate(classes):
        mean, half, kind = roles.change.mean[k], roles.change.half[k], roles.roles[k]
        if math.isnan(mean):
            continue
        axes.plot(roles.usual[k], row, "|", color=BLACK, markersize=7, markeredgewidth=1.0)
        if not math.isnan(half):
            axes.plot([mean - half, mean + half], [row, row], color=COLOURS[kind], linewidth=1.4)
        axes.plot(mean, row, MARKS[kind], color=COLOURS[kind], markersize=4.2)
        if kind:
            text = f"{100 * mean:+.0f} {kind}".replace("-", "−")
            axes.text(
                1.02, row, text, transform=axes.get_yaxis_transform(), fontsize=7, va="center", color=COLOURS[kind]
            )
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set_xlim(-1.0, 0.3)
    axes.set_xlabel("accuracy change (test), points", fontsize=7.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: plain_number(100 * share)))
    axes.set_yticks(range(len(classes)), [])
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=7.2)


def _curves(axes: Axes, case: Case) -> None:
    curve, end = case.reading.curves["test"][case.shared.latent], min(2.5 * case.shared.alpha, ALPHAS[-1])
    order = sorted(range(curve.shape[1]), key=lambda k: case.roles.roles[k] != NONE)
    for k in order:
        kind = case.roles.roles[k]
        axes.plot(ALPHAS, curve[:, k], color=COLOURS[kind], linewidth=1.5 if kind else 0.7, alpha=1 if kind else 0.7)
    axes.axvline(case.shared.alpha, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.03, 1.03)
    percent_axis(axes.yaxis)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("strength α", fontsize=7.5)
    axes.set_ylabel("accuracy (test)", fontsize=7.5)
    axes.tick_params(labelsize=7.2)
