"""The permanent gate against steering and a rank-one edit of the head, at a matched effect.

Every method takes a class to ``LEVEL`` at a strength of its own, and is judged by what the other classes lose there. To
add a method, add an entry to :data:`experiments.salve2025.baselines.methods.RIVALS`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.claims import Measured
from experiments.compare import CONFIDENCE, LEVEL_TEXT, with_half
from experiments.experiment import Experiment, Findings, Picture, said
from experiments.figures import PRINT_WIDTH, class_rows, entry, printed
from experiments.runs import SAERun, Study
from experiments.salve2025.baselines import methods
from salve.report.style import BLACK, BLUE, GREY, ORANGE, grid_axis, new_figure
from salve.report.text import plural, points

#: By direction: colour, marker, and what it is called.
LOOKS = {
    "latent": (BLUE, "o", "along the class's latent"),
    "none": (ORANGE, "D", "in the head, no SAE"),
    "random": (GREY, "s", "along a random direction"),
}
#: By measure: the name of its axis, the factor to the axis's unit, and, for a measure that is never negative, where the
#: axis turns from linear to logarithmic.
PANELS = {
    "selectivity": ("selectivity\n(points)", 100, None),
    "ahead": ("gate ahead by\n(points)", 100, None),
    "drift": ("others' change\n(points)", 100, 0.3),
    "kl": ("others' KL\n(nats)", 1, 0.03),
}
#: How far a method's two directions lie above and below its line, and how far each one's classes are spread.
_ASIDE, _SPREAD = 0.2, 0.13
#: A share in percentage points, without a sign.
_points = partial(points, signed=False)


@printed
def baselines_figure(edits: pd.DataFrame) -> Figure:
    """A row of panels per testbed, a line per method.

    Large markers: mean over classes and SAE seeds, with the interval over seeds; dots: each class, mean over seeds. At
    the right, for how many classes a strength takes the class to ``LEVEL`` on select, and what it leaves on test; drift
    and KL are those of these.

    Args:
        edits: see :func:`methods.compare_methods`, with ``testbed``, its title.
    """
    testbeds = list(dict.fromkeys(edits["testbed"]))
    lines = list(dict.fromkeys(edits["method"]))
    shown = by_class(edits)
    both = set(edits[edits["direction"] == "random"]["method"])
    aside = {"latent": -_ASIDE, "random": _ASIDE, "none": 0.0}
    figure = new_figure(PRINT_WIDTH, 0.85 + 0.4 * len(lines) * len(testbeds))
    grid = figure.subplots(len(testbeds), len(PANELS), squeeze=False, sharex="col")
    for row, testbed in zip(grid, testbeds, strict=True):
        for one in methods.summarise(edits[edits["testbed"] == testbed]).to_dict("records"):
            name, direction = one["method"], one["direction"]
            place = lines.index(name) + (aside[direction] if name in both else 0)
            for axes, (measure, (_, unit, linear)) in zip(row, PANELS.items(), strict=True):
                mean, half = unit * one[measure], unit * np.nan_to_num(one[f"{measure}_half"])
                low = half if linear is None else min(half, mean)
                _draw(axes, place, unit * shown.loc[(testbed, name, direction), measure], mean, (low, half), direction)
            text = f"{one['reached']:.3g} of {one['classes']}"
            text += "" if np.isnan(one["after"]) else f": {100 * one['after']:.1f} %"
            row[-1].text(1.06, place, text, transform=row[-1].get_yaxis_transform(), fontsize=7.5, va="center",
                         color="#5c646d" if direction == "random" else BLACK)  # fmt: skip
        for axes in row:
            class_rows(axes, [name.replace(" ", "\n", len(name) > 15) if axes is row[0] else "" for name in lines])
        row[0].set_title(testbed)
        row[-1].text(1.06, 1.03, f"{LEVEL_TEXT} on select:\nleft on test", transform=row[-1].transAxes, fontsize=7.5)
        row[list(PANELS).index("ahead")].axvline(0, color=GREY, linewidth=0.9, zorder=0)
    for at, (measure, (name, unit, linear)) in enumerate(PANELS.items()):
        grid[-1][at].set_xlabel(name)
        _limit(grid[0][at], measure, unit * shown[measure], linear)
    handles = [
        entry(name, BLACK, marker, markerfacecolor="white" if direction == "random" else colour, markersize=5, mew=0.9)
        for direction, (colour, marker, name) in LOOKS.items() if direction in set(edits["direction"])
    ]  # fmt: skip
    handles.append(entry("one class", GREY, ".", markersize=4.5))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, handletextpad=0.3)
    return figure


def by_class(edits: pd.DataFrame) -> pd.DataFrame:
    """Each measure of ``PANELS``, mean over seeds; indexed by ``testbed``, ``method``, ``direction``, ``class``."""
    keys = ["testbed", "method", "direction", "class"]
    means = edits.groupby(keys)[[name for name in PANELS if name != "ahead"]].mean().reset_index()
    gate = means[(means["method"] == methods.GATE) & (means["direction"] == "latent")]
    gate = gate.set_index(["testbed", "class"])["selectivity"]
    of_gate = gate.reindex(pd.MultiIndex.from_frame(means[["testbed", "class"]])).to_numpy()
    compared = (means["method"] != methods.GATE) & (means["direction"] != "random")
    return means.assign(ahead=(of_gate - means["selectivity"]).where(compared)).set_index(keys)


def _limit(axes: Axes, measure: str, values: pd.Series, linear: float | None) -> None:
    """An axis that shows all classes' values."""
    if measure == "selectivity":
        axes.set(xticks=(0, 50, 100), xlim=(min(0.0, values.min()) - 5, 105))
    elif linear is None:
        most = max(1.0, values.abs().max())
        axes.set_xlim(-1.1 * most, 1.1 * most)
        axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    else:
        top = max(values.max(), 3 * linear)
        grid_axis(axes, (linear, top))
        axes.set_xlim(-0.25 * linear, 1.4 * top)


def _draw(
    axes: Axes, place: float, classes: pd.Series, mean: float, interval: tuple[float, float], direction: str
) -> None:
    colour, marker, _ = LOOKS[direction]
    face = "white" if direction == "random" else colour
    beside = place + np.linspace(-_SPREAD, _SPREAD, len(classes))
    axes.plot(classes, beside, color=colour, alpha=0.55, marker=".", markersize=4.5, linestyle="", mew=0)
    axes.errorbar(mean, place, xerr=np.array(interval)[:, None], fmt=marker, color=BLACK, markerfacecolor=face,
                  markersize=5, mew=0.9, elinewidth=1.1, capsize=2.2)  # fmt: skip


def chosen_by(run: SAERun) -> methods.Chosen:
    """Columns and signs of the latents that an SAE has for the classes; sign 0 for a class without one."""
    latents = torch.tensor(run.selected["latent"].fillna(0).to_numpy(int))
    signs = torch.tensor(run.selected["sign"].where(run.selected["latent"].notna(), 0).to_numpy(int))
    return methods.Chosen(run.sae.decoder.detach()[:, latents].T, signs)


def edits_of(study: Study) -> pd.DataFrame:
    """Every method's edit of every class on a testbed: see :func:`methods.compare_methods`."""
    return methods.compare_methods(study.reader, {run.seed: chosen_by(run) for run in study.runs}, study.classes)


def analyse(studies: Sequence[Study]) -> Findings:
    found = Findings.together([_analyse(study) for study in studies])
    images = " and ".join(f"{len(study.test.labels)} of {study.testbed.title}" for study in studies)
    figure = baselines_figure(found.tables["edits"])
    picture = Picture.of(figure, "baselines.methods", images=images, confidence=100 * CONFIDENCE)
    words = f"{found.paragraph}\n\n{said('baselines.why')}"
    return replace(found, paragraph=words, pictures={"baselines": picture})


def _analyse(study: Study) -> Findings:
    testbed, edits = study.testbed, edits_of(study)
    summary = methods.summarise(edits)
    tables = {"edits": edits.assign(testbed=testbed.title), "methods": summary.assign(testbed=testbed.title)}
    words = f"{testbed.title}: {paragraph(summary, edits)}"
    return Findings(words, {}, tables, measured_of(testbed.name, summary))


def measured_of(testbed: str, summary: pd.DataFrame) -> list[Measured]:
    """The numbers that decide: how far the gate is ahead of rivals, and the latent's direction of random ones."""
    rows = summary[summary["direction"] != "random"].set_index("method")
    found = []
    for claim, rival in (("steering", methods.STEERING), ("rank_one", methods.RANK_ONE)):
        row = rows.loc[rival]
        text = (
            f"{with_half(row, 'ahead', signed=True)} points: "
            f"{_points(rows.loc[methods.GATE, 'selectivity'])} against {_points(row['selectivity'])}"
        )
        found.append(Measured(f"baselines.{claim}", testbed, float(row["ahead"]), text))
    least = rows.loc[rows["over_random"].idxmin()]
    text = f"{least.name}, the least ahead: {with_half(least, 'over_random', signed=True)} points"
    return [*found, Measured("baselines.random", testbed, float(least["over_random"]), text)]


def paragraph(summary: pd.DataFrame, edits: pd.DataFrame) -> str:
    """What the numbers say about one testbed; see :func:`methods.summarise` and :func:`methods.compare_methods`."""
    rows = summary[summary["direction"] != "random"].set_index("method")
    random = summary[summary["direction"] == "random"].set_index("method")
    gate, rivals = rows.loc[methods.GATE], rows.drop(index=methods.GATE)
    verdicts = {name: _verdict(row["ahead"], row["ahead_half"]) for name, row in rivals.iterrows()}
    counts = {"count": plural(gate["classes"], "class"), "saes": plural(gate["seeds"], "SAE")}
    headline, selectivity = _headline(list(verdicts.values())), with_half(gate, "selectivity")
    text = [said("baselines.gate", None, headline=headline, selectivity=selectivity, gate=gate, **counts)]
    for verdict in VERDICTS:
        each = [
            f"{IN_WORDS.get(name, name)} ({with_half(row, 'ahead', signed=True)})"
            for name, row in rivals.iterrows()
            if verdicts[name] == verdict
        ]
        if each:
            text.append(said(f"baselines.{verdict}", each=_listed(each)))
    ablated = edits[
        (edits["method"] == methods.ABLATION) & (edits["direction"] == "latent") & edits["selectivity"].notna()
    ]
    alone, least = float((ablated["reached"] & (ablated["alpha"] <= 1)).mean()), rows["kl"].idxmin()
    others = said(
        "baselines.others", gate=gate, bias=rows.loc[methods.BIAS], low=random.min(numeric_only=True),
        high=random.max(numeric_only=True), least=IN_WORDS.get(least, least), kl=rows["kl"].min(), alone=alone,
    )  # fmt: skip
    return " ".join([*text, others])


#: What the difference in selectivity between the gate and a rival says, with its interval.
VERDICTS = ("more", "less", "same", "single")
#: Names of methods inside a sentence, where they differ.
IN_WORDS = {methods.RANK_ONE: "the rank-one edit", methods.BIAS: "a lower bias of the class"}


def _verdict(ahead: float, half: float) -> str:
    if math.isnan(half):
        return "single"
    return "more" if ahead > half else "less" if ahead < -half else "same"


def _headline(verdicts: Sequence[str]) -> str:
    more, of = verdicts.count("more"), len(verdicts)
    if "single" in verdicts:
        return "At a matched effect, one SAE's gate is compared with its rivals"
    if more == of:
        return "At a matched effect the gate is cleaner than all of its rivals"
    share = f"cleaner than {more} of its {of}" if more else "not cleaner than its"
    return f"At a matched effect the gate is {share} rivals"


def _listed(parts: Sequence[Any]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


EXPERIMENT = Experiment("baselines", "Steering and rank-one baselines", analyse)
