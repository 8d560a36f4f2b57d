"""Robustness: does an edit make the other classes more fragile, and does α_flip say which images break first?

Images are corrupted in 15 ways and five severities, taken from elsewhere (``evaluate=[FOLDER]``), and attacked. Each is
seen by the network as it is and with the edits of other classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.beyond.composition.measures import edits_of
from experiments.beyond.robustness import measures
from experiments.beyond.robustness.relations import correlations, images_of
from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, joined, measured, said
from experiments.figures import PRINT_WIDTH, entry, printed
from experiments.runs import Study
from salve.data import corruptions
from salve.diagnosis import adversarial
from salve.report.intervals import Interval, t_interval
from salve.report.style import BLACK, BLUE, GREEN, GREY, log_axis, log_range, new_figure, percent_axis
from salve.report.text import plural, points
from salve.stages.targets import balanced

#: Rows of the forest of rank correlations: outcome, measure, what is held fixed.
FOREST = {
    ("margin", "nothing"): ("margin", GREY),
    ("alpha_flip", "nothing"): ("α_flip", BLUE),
    ("alpha_flip", "margin"): ("… given margin", GREEN),
    ("alpha_flip", "margin and class"): ("… and class", BLACK),
}
OUTCOMES = {
    "adversarial": "with the smallest norm that breaks it",
    "corruption": "with the share of corruptions survived",
}


def analyse(studies: Sequence[Study]) -> Findings:
    found = Findings.together([_analyse(study) for study in studies])
    titles = {study.testbed.name: study.testbed.title for study in studies}
    figure = robustness_figure(dict(found.tables), titles)
    picture = Picture.of(figure, "robustness.fragility", largest=measures.LARGEST * 255)
    return replace(found, pictures={"robustness": picture})


def _analyse(study: Study) -> Findings:
    run, per_class = study.runs[0], int(study.runs[0].flat_settings["edit.images"])
    cut, numbers = study.context.cut(run.artifact("classifier")), balanced(study.test.labels, per_class)
    edits = [edits_of(study, one) for one in study.runs]
    shown = measures.conditions(study, cut, numbers)
    moved = measures.moved_by(study, shown, edits)
    tables = {"conditions": measures.table_of(study, shown, moved)}
    attacks = measures.attacked(study, cut, numbers, edits[0])
    tables["images"] = images_of(study, shown, edits, attacks)
    tables["correlations"] = correlations(tables["images"]).assign(testbed=study.testbed.name)
    clean, rest = (measures.Moved(*(part[at] for part in moved)) for at in (slice(1), slice(1, None)))
    corrupted = measures.change(clean, rest)
    shifts = {}
    for one in study.context.evaluation:
        taken = measures.seen(study, cut, one.raw, balanced(one.labels, per_class), one.name)
        there = measures.moved_by(study, [taken], edits)
        shifts[one.name] = measures.change(clean, there, same_images=False)
        tables["conditions"] = joined([tables["conditions"], measures.table_of(study, [taken], there)])
    facts = _facts(study, tables, corrupted, shifts)
    tables["summary"] = summary_of(facts).assign(testbed=study.testbed.name)
    return Findings(_paragraph(study, facts), {}, tables, _measured(study, facts))


def _facts(
    study: Study, tables: dict[str, pd.DataFrame], corrupted: measures.Change, shifts: dict[str, measures.Change]
) -> dict[str, Any]:
    """What the sentences and claims are made of."""
    images, rows = tables["images"], tables["correlations"]
    both = images[np.isfinite(images["norm"]) & (images["norm_edited"] > 0) & np.isfinite(images["norm_edited"])]
    paired = images[images["norm_edited"].notna()]
    ratio = t_interval(np.log2(both["norm_edited"] / both["norm"]).tolist())
    conditions = tables["conditions"].set_index(["condition", "severity"])["original"]
    known = rows.set_index(["outcome", "measure", "given"])
    # By name in the texts: flip["adversarial"] is α_flip's correlation with the margin held fixed.
    given = {outcome: known.loc[outcome, "alpha_flip", "margin"] for outcome in OUTCOMES}
    return {
        "corrupted": corrupted, "shifts": shifts, "ratio": ratio, "factor": 2**ratio.mean,
        "factor_span": (2 ** (ratio.mean - ratio.half), 2 ** (ratio.mean + ratio.half)),
        "clean_accuracy": conditions["clean", 0], "shifted_accuracy": {name: conditions[name, 0] for name in shifts},
        "corrupted_accuracy": conditions[[name for name in conditions.index if name[0] in measures.KINDS]].mean(),
        "attacked": len(images), "unbroken": int(np.isinf(images["norm"]).sum()), "compared": len(both),
        "taken": int((paired["norm_edited"] == 0).sum()),
        "easier": (paired["norm_edited"] < paired["norm"]).mean(),
        "harder": (paired["norm_edited"] > paired["norm"]).mean(), "norm": 255 * images["norm"].median(),
        "flip": given, "alone": {one: known.loc[one, "alpha_flip", "nothing"] for one in OUTCOMES},
        "margin": {one: known.loc[one, "margin", "nothing"] for one in OUTCOMES},
        "own": {one: known.loc[one, "alpha_flip", "margin and class"] for one in OUTCOMES},
        "verdict": {one: verdict_on(row["rho"], row["low"], row["high"]) for one, row in given.items()},
        "fragile": more_fragile(corrupted.beyond),
    }  # fmt: skip


def summary_of(facts: dict[str, Any]) -> pd.DataFrame:
    """What edits of other classes change: one row for each ``condition``, with half of 95 % intervals over images.

    ``accuracy`` of the network as it is; ``change`` by the edits, as a share of it; ``beyond``, that less the change on
    clean images. For ``attack``: the median smallest ``norm`` (in 1/255), and the ``factor`` by which it is larger in
    an edited network, with the ends of its interval.
    """
    corrupted: measures.Change = facts["corrupted"]
    conditions = {"corruptions": (facts["corrupted_accuracy"], corrupted)}
    conditions |= {name: (facts["shifted_accuracy"][name], shift) for name, shift in facts["shifts"].items()}
    rows: list[dict[str, Any]] = [
        {"condition": "clean", "accuracy": facts["clean_accuracy"]}
        | {"change": corrupted.clean.mean, "change_half": corrupted.clean.half}
    ]
    rows += [
        {"condition": name, "accuracy": accuracy, "change": one.changed.mean, "change_half": one.changed.half}
        | {"beyond": one.beyond.mean, "beyond_half": one.beyond.half}
        for name, (accuracy, one) in conditions.items()
    ]
    low, high = facts["factor_span"]
    attack = {"norm": facts["norm"], "factor": facts["factor"], "factor_low": low, "factor_high": high}
    return pd.DataFrame([*rows, {"condition": "attack"} | attack])


def verdict_on(rho: float, low: float, high: float) -> str:
    """What a partial correlation and its interval say, in words."""
    if np.isnan(rho):
        return said("robustness.unknown")
    return said("robustness.more" if low > 0 else "robustness.against" if high < 0 else "robustness.no_more")


def more_fragile(beyond: Interval) -> str:
    """What the change under corruption beyond that on clean images says, in words."""
    if np.isnan(beyond.half):
        return said("robustness.unknown")
    low, high = beyond.mean - beyond.half, beyond.mean + beyond.half
    return said("robustness.fragile" if high < 0 else "robustness.sturdy" if low > 0 else "robustness.same")


def _interval(change: Interval) -> str:
    return f"{points(change.mean)} ± {points(change.half, signed=False)}"


def _paragraph(study: Study, facts: dict[str, Any]) -> str:
    change: measures.Change = facts["corrupted"]
    words = {"clean": _interval(change.clean), "under": _interval(change.changed), "beyond": _interval(change.beyond)}
    text = [said("robustness.corrupted", study, **facts, **words), said("robustness.attacked", study, **facts)]
    for name, shift in facts["shifts"].items():
        words = {"under": _interval(shift.changed), "beyond": _interval(shift.beyond)}
        text.append(said("robustness.shifted", study, where=name, fragile=more_fragile(shift.beyond), **words))
    return " ".join([*text, said("robustness.first", study, **{**facts, "images": plural(facts["attacked"], "image")})])


def _measured(study: Study, facts: dict[str, Any]) -> list[Measured]:
    corrupted, ratio = facts["corrupted"].beyond, facts["ratio"]
    found = [
        measured("robustness.corruptions", study, corrupted.mean, change=_interval(corrupted), **facts),
        measured("robustness.adversarial", study, ratio.mean, **facts),
    ]
    # Of images of which the network knows none, edits can take nothing.
    if known := {name: shift for name, shift in facts["shifts"].items() if not np.isnan(shift.beyond.mean)}:
        name, worst = min(known.items(), key=lambda one: one[1].beyond.mean)
        found.append(measured("robustness.shift", study, worst.beyond.mean, where=name, change=_interval(worst.beyond)))
    for outcome in OUTCOMES:
        row, words = facts["flip"][outcome], facts["verdict"][outcome]
        found.append(measured(f"robustness.flip_{outcome}", study, row["low"], row=row, words=words))
    return found


@printed
def robustness_figure(tables: dict[str, pd.DataFrame], titles: dict[str, str]) -> Figure:
    """A row per testbed: accuracy against severity; the smallest norm edited against unedited; rank correlations."""
    figure = new_figure(PRINT_WIDTH, 0.4 + 2.5 * len(titles))
    grid = figure.subplots(len(titles), 3, squeeze=False, width_ratios=[1, 1, 1.15])
    for row, (name, title) in zip(grid, titles.items(), strict=True):
        mine = {key: table[table["testbed"] == name] for key, table in tables.items()}
        _severities(row[0], mine["conditions"])
        _norms(row[1], mine["images"])
        _forest(row[2], mine["correlations"])
        row[0].set_title(title)
    handles = [entry("network as it is", GREY, "o"), entry("edited for another class", BLUE, "o")]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _severities(axes: Axes, conditions: pd.DataFrame) -> None:
    """Mean over kinds, and as thin lines each kind of the network as it is."""
    of = conditions[conditions["condition"].isin([*measures.KINDS, "clean"])]
    for _, kind in of[of["condition"] != "clean"].groupby("condition"):
        axes.plot(kind["severity"], kind["original"], color=GREY, alpha=0.25, linewidth=0.7)
    means = of.assign(edited=of["original"] + of["change"]).groupby("severity")[["original", "edited"]].mean()
    for column, colour in (("original", GREY), ("edited", BLUE)):
        axes.plot(means.index, means[column], "o-", color=colour, linewidth=1.4, markersize=3.5)
    axes.set(xlabel="severity of corruption", ylabel="accuracy", ylim=(-0.03, 1.03))
    percent_axis(axes.yaxis)


def _norms(axes: Axes, images: pd.DataFrame) -> None:
    known = images[(images[["norm", "norm_edited"]] > 0).all(axis=1)].replace(np.inf, np.nan)
    limits = log_range(255 * known[["norm", "norm_edited"]].to_numpy(float).ravel())
    axes.plot(limits, limits, color=GREY, linewidth=0.8)
    axes.plot(255 * known["norm"], 255 * known["norm_edited"], ".", color=BLUE, alpha=0.5, markersize=4.5, mew=0)
    for which in ("x", "y"):
        log_axis(axes, which, limits)
    axes.set(xlabel="norm that breaks it (1/255)", ylabel="… edited for another class")


def _forest(axes: Axes, correlations: pd.DataFrame) -> None:
    place, ticks = 0.0, dict[float, str]()
    for outcome, title in OUTCOMES.items():
        axes.text(1.02, place - 0.05, title, fontsize=7.5, va="center", ha="right")
        for (measure, given), (name, colour) in FOREST.items():
            place += 1
            rows = correlations[(correlations["outcome"] == outcome) & (correlations["measure"] == measure)]
            one = rows[rows["given"] == given].iloc[0]
            reach = np.abs([[one["rho"] - one["low"]], [one["high"] - one["rho"]]])
            axes.errorbar(one["rho"], place, xerr=reach, fmt="o", color=colour, markersize=4, elinewidth=1.1)
            ticks[place] = name
        place += 1.3
    axes.axvline(0, color=GREY, linewidth=0.9, zorder=0)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="rank correlation (95 %)", xlim=(-1.02, 1.02), ylim=(place - 0.6, -0.7))
    axes.grid(visible=False, axis="y")


def check() -> None:
    """Raises UserError where a package is missing."""
    corruptions.check_installed()
    adversarial.check_installed()


EXPERIMENT = Experiment(
    "robustness",
    "Robustness: corruptions, shifts and attacks, and what α_flip says of them",
    analyse,
    quick=("sae.seed=0,1", "sae.epochs=20", "edit.images=2"),
    group="beyond",
    check=check,
)
