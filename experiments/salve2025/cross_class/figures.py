"""Figures: how many latents are shared, what the classes do when one is suppressed, and where it looks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from experiments.compare import t_interval
from experiments.figures import PRINT_WIDTH, class_rows, entry, printed, tile
from experiments.runs import Study
from experiments.salve2025.cross_class.roles import ALPHAS, DRAGGED, FALLS, NONE, REDUNDANT, RISES, STAYS
from experiments.salve2025.cross_class.tables import Case
from experiments.testbeds import TESTBEDS
from salve.report import style
from salve.report.figures.validate import overlay
from salve.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION
from salve.report.text import label
from salve.saliency import grad_fam

COLOURS = {FALLS: VERMILLION, REDUNDANT: BLUE, STAYS: SKY, RISES: GREEN, DRAGGED: PURPLE, NONE: GREY}
MARKS = {FALLS: "v", REDUNDANT: "s", STAYS: "D", RISES: "^", DRAGGED: "X", NONE: "o"}
#: Classes in a panel: those that depend on the latent or change most.
MOST_CLASSES = 12
#: Images of each class in the figure of images.
IMAGES = 3
KINDS = {"class-defining": BLUE, "cross-class": ORANGE, "diffuse": GREY}
STEPS = {
    "by_share": ("shared by share", GREY),
    "shared": ("and count for both", SKY),
    "clean": ("and drag no other", ORANGE),
}
SETTING = ["dictionary_size", "sparsity"]


@printed
def counts_figure(saes: pd.DataFrame, latents: pd.DataFrame) -> Figure:
    """A row per testbed: shared latents in each SAE, and how often a latent of each kind takes several classes down."""
    by_testbed = saes.groupby("testbed", sort=False)
    figure = style.new_figure(PRINT_WIDTH, 0.45 + 1.95 * len(by_testbed))
    grid = figure.subplots(len(by_testbed), 2, squeeze=False)
    for row, (testbed, mine) in zip(grid, by_testbed, strict=True):
        settings = list(mine.groupby(SETTING))[::-1]
        for place, (setting, one) in enumerate(settings):
            _counts(row[0], one, place)
            same = (latents["testbed"] == testbed) & (latents[SETTING] == list(setting)).all(axis=1)
            _several(row[1], latents[same].dropna(subset="fallen"), place)
        for axes, text in zip(row, ("latents per SAE", "take two classes down"), strict=True):
            axes.set(title=TESTBEDS[str(testbed)].title, ylabel=text, xlim=(-0.6, len(settings) - 0.4))
            axes.set_xticks(range(len(settings)), [f"d {size}\nλ {sparsity:g}" for (size, sparsity), _ in settings])
            axes.grid(False, axis="x")
        row[0].set_ylim(bottom=-0.4)
        row[1].set_ylim(-0.03, 1.05)
        style.percent_axis(row[1].yaxis)
    looks: Any = {"ncols": 3, "handletextpad": 0.1, "columnspacing": 1.0}
    steps = [entry(name, colour, "o") for name, colour in STEPS.values()]
    kinds = [entry(kind, colour, "s") for kind, colour in KINDS.items()]
    figure.legend(handles=steps, loc="outside upper left", **looks)
    figure.legend(handles=kinds, loc="outside upper right", **looks)
    return figure


def _counts(axes: Axes, one: pd.DataFrame, place: int) -> None:
    """Of one setting. Dots: SAEs; bars: their mean."""
    for x, (name, (_, colour)) in zip(place + np.array([-0.26, 0, 0.26]), STEPS.items(), strict=True):
        spread = x + np.linspace(-0.09, 0.09, len(one)) if len(one) > 1 else [x]
        axes.plot(spread, one[name], "o", color=colour, markersize=2.6, alpha=0.75)
        axes.hlines(one[name].mean(), x - 0.12, x + 0.12, color=BLACK, linewidth=1.4)


def _several(axes: Axes, one: pd.DataFrame, place: int) -> None:
    """Of one setting: by kind, the share of latents under which two classes or more fall; interval over SAEs."""
    for x, (kind, colour) in zip(place + np.array([-0.22, 0, 0.22]), KINDS.items(), strict=True):
        some = one[one["kind"] == kind]
        mean, half, count = t_interval((some["fallen"] >= 2).groupby(some["seed"]).mean().tolist())
        if count:
            half = np.nan_to_num(half)
            axes.vlines(x, max(mean - half, 0.0), min(mean + half, 1.0), color=colour, linewidth=1.4)
            axes.plot(x, mean, "s", color=colour, markersize=4.5)


@printed
def roles_figure(study: Study, cases: Sequence[Case]) -> Figure:
    """A row per latent: class means, change of accuracy where its first class is lost, accuracy by strength."""
    shown = min(len(study.classes), MOST_CLASSES)
    figure = style.new_figure(PRINT_WIDTH, 0.4 + (0.75 + 0.155 * shown) * len(cases))
    rows = figure.subfigures(len(cases), 1, squeeze=False)[:, 0]
    for part, case in zip(rows, cases, strict=True):
        classes = _shown(case, shown)
        means, changes, curves = part.subplots(1, 3, width_ratios=(1.0, 1.1, 1.2))
        title = f"{case.title}, suppressed by α = {case.shared.alpha:.1f}"
        part.suptitle(title, fontsize=8.5, fontweight="bold", x=0.01, ha="left")
        if note := _reserve(case):
            part.supxlabel(note, fontsize=7.5, x=0.01, ha="left", color=COLOURS[REDUNDANT])
        _means(means, study, case, classes)
        _changes(changes, case, classes)
        _curves(curves, case)
    used = [role for role in COLOURS if any(role in case.roles.roles for case in cases) and role != NONE]
    handles = [entry(role, COLOURS[role], MARKS[role]) for role in used]
    handles += [entry("other classes", GREY, "o"), entry("usual for this class", BLACK, "|", markersize=7)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handletextpad=0.2)
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
        mean, half, _ = t_interval(latents[study.train.labels == k].tolist())
        axes.barh(row, mean, color=COLOURS[case.roles.roles[k]], height=0.7, xerr=np.nan_to_num(half),
                  hatch="//////" if k in case.shared.classes else None, edgecolor="white", linewidth=0,
                  error_kw={"ecolor": BLACK, "elinewidth": 0.9})  # fmt: skip
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set_xlabel("class mean (train)")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    class_rows(axes, [label(study.classes[k], 17) for k in classes])


def _changes(axes: Axes, case: Case, classes: Sequence[int]) -> None:
    roles = case.roles
    for row, k in enumerate(classes):
        mean, half, kind = roles.change.mean[k], roles.change.half[k], roles.roles[k]
        if math.isnan(mean):
            continue
        axes.plot(roles.usual[k], row, "|", color=BLACK, markersize=7, markeredgewidth=1.0)
        axes.errorbar(mean, row, xerr=np.nan_to_num(half), fmt=MARKS[kind], color=COLOURS[kind], markersize=4.2,
                      elinewidth=1.4)  # fmt: skip
        if kind:
            text = f"{100 * mean:+.0f} {kind}".replace("-", "−")
            at = axes.get_yaxis_transform()
            axes.text(1.02, row, text, transform=at, fontsize=7, va="center", color=COLOURS[kind])
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set(xlim=(-1.0, 0.3), xlabel="accuracy change (test), points")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: style.plain_number(100 * share)))
    class_rows(axes, [""] * len(classes))


def _curves(axes: Axes, case: Case) -> None:
    curve, end = case.reading.curves["test"][case.shared.latent], min(2.5 * case.shared.alpha, ALPHAS[-1])
    order = sorted(range(curve.shape[1]), key=lambda k: case.roles.roles[k] != NONE)
    for k in order:
        kind = case.roles.roles[k]
        axes.plot(ALPHAS, curve[:, k], color=COLOURS[kind], linewidth=1.5 if kind else 0.7, alpha=1 if kind else 0.7)
    axes.axvline(case.shared.alpha, color=BLACK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="strength α", ylabel="accuracy (test)", xlim=(0, end), ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    style.percent_axis(axes.yaxis)


class Strip(NamedTuple):
    """Images of one class: the strongest, or those that it ``gained``.

    Attributes:
        images: their indices in test. sign: of the latent, for the maps.
    """

    title: str
    colour: str
    images: list[int]
    sign: int
    gained: bool


def strips_of(case: Case) -> list[Strip]:
    """Of the classes that depend most on the latent, the images in which it is strongest; of the class that rises most,
    the images that it gains, by how much."""
    study, shared, roles = case.reading.study, case.shared, case.roles
    values = case.reading.run.sae.encode(study.test.activations)[:, shared.latent]
    found = []
    seen = set(study.test.labels.tolist())
    dependent = sorted((k for k in shared.classes if k in seen), key=lambda k: roles.roles[k] != FALLS)
    shown = [*dependent[:1], *sorted(dependent[1:], key=lambda k: roles.roles[k] not in (REDUNDANT, STAYS))[:1]]
    for k in shown:
        sign = -1 if float(case.reading.means[k, shared.latent]) < 0 else 1
        mine = (study.test.labels == k).nonzero()[:, 0]
        top = mine[(sign * values[mine]).argsort(descending=True)[:IMAGES]].tolist()
        text = f"{label(study.classes[k], 18)} {roles.roles[k]} ({100 * roles.change.mean[k]:+.0f})"
        found.append(Strip(text.replace("-", "−"), COLOURS[roles.roles[k]], top, sign, False))
    for k in [k for k in case.classes(RISES) if k not in shown][:1]:
        gained = (study.test.labels == k) & (roles.before != k) & (roles.after == k)
        taken = torch.isin(roles.before, torch.tensor(shared.classes))
        from_them = (gained & taken).nonzero()[:, 0]
        top = from_them[roles.gain[from_them].argsort(descending=True)[:IMAGES]].tolist()
        text = f"{label(study.classes[k], 18)} rises ({100 * roles.change.mean[k]:+.0f}), once taken for"
        if top:
            found.append(Strip(text, COLOURS[RISES], top, -1 if float(values[top].mean()) < 0 else 1, True))
    return found


def maps_of(case: Case, strip: Strip) -> tuple[NDArray[np.uint8], NDArray[np.floating], list[float]]:
    """Images ``[n, 3, S, S]``, their Grad-FAM maps ``[n, S, S]`` of the latent, and its values."""
    study, run = case.reading.study, case.reading.run
    context, dataset = study.context, study.context.data.dataset("test")
    cut = context.cut(run.artifact("classifier"))
    model, site = cut.model, cut.site
    pictures = torch.stack([dataset[i][0] for i in strip.images])
    sae = run.sae.to(context.device)
    maps = grad_fam(model, site.name, sae, pictures.to(context.device), [case.shared.latent],
                    signs=torch.tensor([strip.sign], device=context.device))  # fmt: skip
    sae.cpu()
    assert context.data.preprocess is not None
    shown: Tensor = context.data.preprocess.denormalise(pictures)
    values = sae.encode(study.test.activations[strip.images])[:, case.shared.latent].tolist()
    return (255 * shown).round().to(torch.uint8).numpy(), maps[:, 0].cpu().numpy(), values


@printed
def images_figure(study: Study, cases: Sequence[Case]) -> tuple[Figure, pd.DataFrame]:
    """Two rows per latent: images of up to three classes, and under each its overlay; and a table of what is shown."""
    cell = PRINT_WIDTH / (3 * IMAGES + 1.2)
    figure = style.new_figure(PRINT_WIDTH, (2 * cell + 0.70) * len(cases) + 0.05, layout=None)
    height, rows = figure.get_size_inches()[1], []
    for place, case in enumerate(cases):
        top = height - 0.05 - place * (2 * cell + 0.70)
        figure.text(0.005, (top - 0.02) / height, case.title, fontsize=8.5, va="top",
                    fontweight="bold")  # fmt: skip
        for group, strip in enumerate(strips_of(case)):
            images, maps, values = maps_of(case, strip)
            left = group * (IMAGES * cell + 0.5 * cell) + 0.05 * cell
            figure.text(left / PRINT_WIDTH, (top - 0.30) / height, strip.title, fontsize=7.8, color=strip.colour,
                        fontweight="bold", va="center")  # fmt: skip
            for column, index in enumerate(strip.images):
                tiles = (images[column].transpose(1, 2, 0), overlay(images[column], maps[column]))
                for line, picture in enumerate(tiles, start=1):
                    corner = (left + column * cell, top - 0.38 - line * cell)
                    tile(figure, (*corner, 0.97 * cell, 0.97 * cell), picture)
                before = study.classes[int(case.roles.before[index])]
                note = f"{values[column]:+.2f}".replace("-", "−")
                if strip.gained:
                    note += f"\n{label(before, 11)}"
                figure.text((left + (column + 0.5) * cell) / PRINT_WIDTH, (top - 0.40 - 2 * cell) / height, note,
                            fontsize=7, ha="center", va="top")  # fmt: skip
                own, after = int(study.test.labels[index]), int(case.roles.after[index])
                row = {"testbed": study.testbed.name, "latent": case.title, "image": index, "value": values[column]}
                row |= {"class": study.classes[own], "before": before, "after": study.classes[after]}
                rows.append(row | {"sign": strip.sign, "map_maximum": float(maps[column].max())})
    return figure, pd.DataFrame(rows)
