"""Localisation: do the maps of classes' latents lie on the objects that people have boxed?

Each class's latent is compared, at the same site, with Grad-CAM of the class, a random latent and a Gaussian in the
middle of the image, which has seen nothing. Boxes of train and select images choose thresholds; test images report.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.beyond.localisation.measures import (
    FAITHFUL,
    FEW,
    LATENT,
    MEASURES,
    METHODS,
    looks_of,
    randomisation,
    scores_of,
    summary_of,
)
from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, measured, said
from experiments.figures import PRINT_WIDTH, class_rows, entry, printed
from experiments.runs import Study
from salve.report.style import BLUE, GREEN, GREY, ORANGE, new_figure, percent_axis
from salve.report.text import points

COLOURS = {LATENT: BLUE, "grad_cam": ORANGE, "random": GREY, "gaussian": GREEN}
NAMES = {LATENT: "class's latent", "grad_cam": "Grad-CAM", "random": "random latent", "gaussian": "centred Gaussian"}
TITLES = {
    "box": "MaxBoxAccV2", "pointing": "pointing game", "mass": "relevance mass", "rank": "relevance rank",
    "insertion": "insertion", "deletion": "deletion (less is better)",
}  # fmt: skip


def analyse(studies: Sequence[Study]) -> Findings:
    found = Findings.together([_analyse(study) for study in studies])
    titles = {study.testbed.name: study.testbed.title for study in studies}
    figure = localisation_figure(found.tables["summary"], found.tables["randomisation"], titles)
    return replace(found, pictures={"localisation": Picture.of(figure, "localisation.scores", few=FEW)})


def _analyse(study: Study) -> Findings:
    run = study.runs[0]
    looks = looks_of(study, run, study.context.cut(run.artifact("classifier")))
    images, random = scores_of(study, looks), randomisation(study, looks)
    tables = {"images": images, "summary": summary_of(images), "randomisation": random}
    facts = facts_of(tables["summary"], random)
    return Findings(said("localisation.found", study, **facts), {}, tables, _measured(study, facts))


def facts_of(summary: pd.DataFrame, random: pd.DataFrame) -> dict[str, Any]:
    """What the sentences and claims are made of."""
    rows = summary.set_index(["measure", "method"])
    losing = [name for name in (*MEASURES, *FAITHFUL) if rows.loc[(name, "gaussian"), "ahead"] < 0]
    beaten = "" if not losing else said("localisation.beaten", where=", ".join(TITLES[name] for name in losing))
    means = {measure: rows.loc[measure]["mean"].to_dict() for measure in (*MEASURES, *FAITHFUL)}
    ahead = {method: _interval(rows.loc[("box", method)]) for method in METHODS if method != LATENT}
    steps = random[random["method"] == LATENT].set_index(["share", "sae"])
    cams = random[random["method"] == "grad_cam"].set_index("share")
    faithful = min(rows.loc[(name, "gaussian"), "ahead_low"] for name in FAITHFUL)
    return {
        "first": beaten or said("localisation.unbeaten"), "mean": means, "ahead": ahead,
        "count": int(rows.loc[("box", LATENT), "n"]), "few": int(rows.loc[("insertion", LATENT), "n"]),
        "random": steps.loc[(1.0, True)], "network": steps.loc[(1.0, False)], "cam": cams.loc[1.0],
        "reader": steps.loc[(0.0, True)], "faithful": float(faithful), "rows": rows,
    }  # fmt: skip


def _interval(row: pd.Series) -> str:
    return f"{points(row['ahead'])} ({points(row['ahead_low'])} to {points(row['ahead_high'])})"


def _measured(study: Study, facts: dict[str, Any]) -> list[Measured]:
    rows, mean = facts["rows"], facts["mean"]["box"]
    found = []
    for claim, method in (("gaussian", "gaussian"), ("grad_cam", "grad_cam"), ("random", "random")):
        row, text = rows.loc[("box", method)], facts["ahead"][method]
        found.append(
            measured(f"localisation.{claim}", study, row["ahead_low"], ahead=text, own=mean[LATENT], other=mean[method])
        )
    ends = {name: _interval(rows.loc[(name, "gaussian")]) for name in FAITHFUL}
    found.append(measured("localisation.faithful", study, facts["faithful"], **ends))
    largest = max(abs(facts["random"]["correlation"]), abs(facts["network"]["correlation"]))
    words = {"random": facts["random"], "network": facts["network"]}
    found.append(measured("localisation.randomised", study, largest, **words))
    return found


@printed
def localisation_figure(summary: pd.DataFrame, random: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """A row per testbed: scores by method, and correlations of maps with those of networks that forget."""
    figure = new_figure(PRINT_WIDTH, 0.4 + 2.5 * len(titles))
    grid = figure.subplots(len(titles), 2, squeeze=False, width_ratios=[1.6, 1])
    for (left, right), (name, title) in zip(grid, titles.items(), strict=True):
        _scores(left, summary[summary["testbed"] == name])
        left.set_title(title)
        for method, own in random[(random["testbed"] == name) & random["sae"]].groupby("method"):
            reach = np.abs(own[["low", "high"]].to_numpy().T - own["correlation"].to_numpy())
            look: dict[str, Any] = {"color": COLOURS[method], "markersize": 4, "elinewidth": 1.1}
            right.errorbar(own["share"], own["correlation"], yerr=reach, fmt="o-", **look)
        right.axhline(0, color=GREY, linewidth=0.9, zorder=0)
        right.set(xlabel="further modules shuffled", ylabel="rank correlation of maps", ylim=(-0.55, 1.03))
        percent_axis(right.xaxis)
    figure.legend(
        handles=[entry(NAMES[method], COLOURS[method], "o") for method in METHODS], loc="outside upper center", ncols=4
    )
    return figure


def _scores(axes: Axes, summary: pd.DataFrame) -> None:
    for row, measure in enumerate(TITLES):
        for place, method in enumerate(METHODS):
            one = summary[(summary["measure"] == measure) & (summary["method"] == method)].iloc[0]
            reach = np.abs([[one["mean"] - one["low"]], [one["high"] - one["mean"]]])
            look: dict[str, Any] = {"color": COLOURS[method], "markersize": 4, "elinewidth": 1.1}
            axes.errorbar(one["mean"], row + 0.18 * (place - 1.5), xerr=reach, fmt="o", **look)
    class_rows(axes, list(TITLES.values()))
    axes.set(xlabel="score (95 %)", xlim=(-0.03, 1.03))
    percent_axis(axes.xaxis)


EXPERIMENT = Experiment(
    "localisation",
    "Localisation: do the maps of classes' latents lie on the objects?",
    analyse,
    quick=("sae.seed=0", "sae.epochs=20"),
    group="beyond",
    needs="data.boxes",
)
