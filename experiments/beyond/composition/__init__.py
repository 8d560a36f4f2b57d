"""Composition: classes edited one after the other. What do the others keep, and how many edits are there room for?

Each class is edited at the strength at which select has it at ``LEVEL`` by itself. The gates of a sequence multiply. A
joint edit closes the same latents together, at one strength.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.beyond.composition.measures import KEPT, ORDERS, UNDONE, bits_of, edits_of, sequences, summary_of
from experiments.claims import Measured
from experiments.compare import LEVEL_TEXT, rank_correlation, with_half
from experiments.experiment import Experiment, Findings, Picture, joined, measured, said
from experiments.figures import PRINT_WIDTH, entry, printed
from experiments.runs import Study
from salve.report.style import BLUE, GREEN, GREY, ORANGE, new_figure, percent_axis
from salve.report.text import plural
from salve.types import UserError

#: Columns of the figure's curves.
LINES: dict[str, Any] = {"kept": (BLUE, "-"), "edited": (GREY, "-"), "predicted": (GREEN, (0, (4, 2)))}


@printed
def composition_figure(steps: pd.DataFrame, classes: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """A row per testbed: accuracy against the number of edits, of a sequence and of a joint edit; and what a class has
    left when half are edited against what the gates say is closed of it."""
    figure = new_figure(PRINT_WIDTH, 0.5 + 2.5 * len(titles))
    grid = figure.subplots(len(titles), 2, squeeze=False, width_ratios=[1.5, 1])
    for (left, right), (name, title) in zip(grid, titles.items(), strict=True):
        mine, shown = steps[steps["testbed"] == name], classes[classes["testbed"] == name]
        sequence, joint = (mine[mine["how"] == how] for how in ("sequence", "joint"))
        for _, one in sequence.groupby(["seed", "order"]):
            left.plot(one["edits"], one["kept"], color=BLUE, alpha=0.15, linewidth=0.7)
        means, together = (rows.groupby("edits")[["kept", "edited", "predicted"]].mean() for rows in (sequence, joint))
        for column, (colour, line) in LINES.items():
            left.plot(means.index, means[column], color=colour, linestyle=line, linewidth=1.5)
        left.plot(together.index, together["kept"], "D", color=ORANGE, markersize=4.5)
        left.set(title=title, xlabel="classes edited", ylabel="accuracy, or share of classes", ylim=(-0.03, 1.03))
        right.plot(shown["closed"], shown["left"], ".", color=BLUE, alpha=0.4, markersize=4.5, mew=0)
        right.axvline(1, color=GREEN, linewidth=1.2, linestyle=(0, (4, 2)))
        right.axhline(KEPT, color=GREY, linewidth=0.9)
        right.set(xlabel="closed by others (own edit: 1)", ylabel="accuracy left", xlim=(0, None))
        for axes in (left, right):
            percent_axis(axes.yaxis)
    handles = [
        entry("others, in sequence", BLUE), entry("others, one joint edit", ORANGE, "D", markersize=4.5),
        entry("others kept, by the gates", GREEN, linestyle=(0, (4, 2))), entry("classes edited", GREY),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def analyse(studies: Sequence[Study]) -> Findings:
    found = Findings.together([_analyse(study) for study in studies])
    titles = {study.testbed.name: study.testbed.title for study in studies}
    figure = composition_figure(found.tables["steps"], found.tables["classes"], titles)
    seeds = plural(len(studies[0].runs), "SAE")
    picture = Picture.of(figure, "composition.edits", orders=ORDERS, kept=KEPT, seeds=seeds)
    return replace(found, pictures={"composition": picture})


def _analyse(study: Study) -> Findings:
    edits = [edits_of(study, run) for run in study.runs]
    pairs = [(run, one) for run, one in zip(study.runs, edits, strict=True) if one.labels]
    if not pairs:
        raise UserError(f"{study.testbed.title}: no strength takes any class to {LEVEL_TEXT} on select.")
    steps, classes, capacities = map(joined, zip(*(sequences(study, *pair) for pair in pairs), strict=True))
    bits = capacities.assign(same_bits=[bool(one) for pair in pairs for one in bits_of(study, *pair)])
    tables = {"steps": steps, "classes": classes, "capacities": bits, "summary": summary_of(steps)}
    numbers = _numbers(tables)
    return Findings(said("composition.found", study, **numbers), {}, tables, _measured(study, numbers))


def _numbers(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """What the sentences and claims are made of."""
    classes, capacities, summary = tables["classes"], tables["capacities"], tables["summary"]
    half = int(classes["edits"].median())
    at = {how: rows.set_index("edits") for how, rows in summary.groupby("how")}
    sequence, joint = at["sequence"].loc[half], at["joint"].loc[half]
    steps = tables["steps"][tables["steps"]["edits"] == half]
    by_how = steps.pivot_table("kept", ["seed", "order"], "how")
    ahead = (by_how["sequence"] - by_how["joint"]) if "joint" in by_how else pd.Series([float("nan")])
    known = classes[classes["left"].notna() & classes["closed"].notna()]
    right = ((known["closed"] < 1) == (known["left"] > KEPT)).mean()
    return {
        "half": half, "sequence": sequence, "joint": joint, "ahead": float(ahead.mean()),
        "share": float(sequence["kept"] / sequence["before"]), "kept_text": with_half(sequence, "kept"),
        "one": at["sequence"].loc[1], "rank": -rank_correlation(known["closed"], known["left"]), "right": right,
        "capacity": capacities[["predicted", "measured", "edits"]].mean(), "cases": len(known),
        "same": int(capacities["same_bits"].sum()), "tried": len(capacities), "undone": UNDONE, "orders": ORDERS,
        "limit": KEPT,
    }  # fmt: skip


def _measured(study: Study, numbers: dict[str, Any]) -> list[Measured]:
    return [
        measured("composition.bits", study, numbers["same"] / numbers["tried"], **numbers),
        measured("composition.kept", study, numbers["share"], **numbers),
        measured("composition.joint", study, numbers["ahead"], **numbers),
        measured("composition.capacity", study, numbers["rank"], **numbers),
    ]


EXPERIMENT = Experiment(
    "composition",
    "Composition: edits one after the other, and how many there is room for",
    analyse,
    beside=("cifar100",),
    group="beyond",
)
