"""Suppression and enhancement: accuracy of every class while one class's latent is turned down or up."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, joined, main, measured, per_testbed, said
from experiments.figures import class_panels, entry, mean_and_range, printed
from experiments.runs import SENSES, Study, separation, suppressed
from salve.editing.verdict import wilson
from salve.report.style import BLUE, GREY, ORANGE, SKY, grid_axis

CHURCH, GOLF_BALL = "church", "golf ball"
MODES = {"suppress": "suppressed", "enhance": "enhanced"}

Curves = NDArray[np.float64]


def curves_of(study: Study, mode: str) -> tuple[Curves, dict[str, Curves]]:
    """Strengths ``[K]``, and by edited class the test accuracy of all classes under each SAE ``[S, K, C]``."""
    found: dict[str, Curves] = {}
    alphas = np.zeros(0)
    for name in study.classes:
        each = [run.curves("test", mode, name) for run in study.runs if run.selected["latent"].notna()[name]]
        if each:
            alphas, found[name] = each[0][0], np.stack([accuracy for _, accuracy in each])
    return alphas, found


def edits_of(study: Study) -> pd.DataFrame:
    """One row per SAE and class: the edit at the strength where select has the class at ``LEVEL``, what enhancing as
    strongly does, and whether the edit that stage ``control`` keeps separates the class. All accuracies are of test.

    Columns: ``testbed``, ``seed``, ``class``, ``latent``, ``sign``, ``kind``; the fields of
    :class:`experiments.compare.MatchedEdit`; ``lowest_alpha``: the first strength of the grid at which select has the
    class lowest, ``lowest``: its accuracy there; ``kept_alpha``, ``kept_after``, ``separates``,
    ``separates_published``: of the edit that is kept; ``enhance_alpha``: the first strength of the grid from ``alpha``
    on, ``enhance_own``: the class's change when enhanced by it, ``enhance_worst``: the largest loss of any class.
    """
    rows = []
    for run, one in [(sae, edited) for sae in study.runs for edited in suppressed(sae, study.classes)]:
        chosen, kept = run.selected.loc[one.name], run.verdicts.loc[one.name]
        # A class without select images has no strength of its own: the first of the grid, which is no edit.
        lowest = int(np.nan_to_num(one.select[:, one.own]).argmin())
        strengths, up = run.curves("test", "enhance", one.name)
        at = int(np.searchsorted(strengths, one.edit.alpha)) if one.edit.reached else len(strengths) - 1
        row = {
            **{"testbed": study.testbed.name, "seed": run.seed, "class": one.name},
            **{"latent": int(chosen["latent"]), "sign": int(chosen["sign"]), "kind": chosen["kind"]},
            **one.edit._asdict(),
            **{"lowest_alpha": float(one.alphas[lowest]), "lowest": float(one.test[lowest, one.own])},
            **{"kept_alpha": float(kept["alpha_used"]), "kept_after": float(kept["accuracy_after"])},
            **{sense: bool(kept[sense]) for sense in SENSES},
            **{"enhance_alpha": float(strengths[at]), "enhance_own": float(up[at, one.own] - up[0, one.own])},
        }
        rows.append(row | {"enhance_worst": float(np.nanmax(up[0] - up[at]))})
    return pd.DataFrame(rows)


@printed
def curves_figure(study: Study, mode: str) -> Figure:
    """A panel per edited class: its own accuracy, the mean of the others with bands over images and SAEs, and each."""
    alphas, curves = curves_of(study, mode)
    images = np.bincount(study.test.labels.numpy(), minlength=len(study.classes))
    strength = f"strength α of {'suppression' if mode == 'suppress' else 'enhancement'}"
    figure, panels = class_panels(list(curves), strength, "accuracy")
    for axes, (name, accuracy) in zip(panels, curves.items(), strict=True):
        own = study.classes.index(name)
        others = np.delete(accuracy, own, axis=2)  # [S, K, C − 1]
        axes.plot(alphas, others.mean(axis=0), color=SKY, linewidth=0.5, alpha=0.8)
        _line(axes, alphas, accuracy[:, :, own], ORANGE, int(images[own]))
        _line(axes, alphas, np.nanmean(others, axis=2), BLUE, int(images.sum() - images[own]))
        grid_axis(axes, alphas)
    handles = [
        *(entry("the class", ORANGE), entry("mean of the others", BLUE), entry("each of them", SKY, linewidth=0.8)),
        Patch(color=GREY, alpha=0.45, linewidth=0, label=f"range over {len(study.runs)} SAEs"),
        Patch(color=GREY, alpha=0.18, linewidth=0, label="95 % over images"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure


def _line(axes: Axes, alphas: Curves, accuracy: Curves, colour: str, images: int) -> None:
    """Mean over SAEs ``[S, K]``, their range, and the interval over images around the mean."""
    low, high = wilson(accuracy.mean(axis=0) * images, images)
    axes.fill_between(alphas, low, high, color=colour, alpha=0.18, linewidth=0)
    mean_and_range(axes, alphas, accuracy, colour, 0.35, linewidth=1.4)


@per_testbed
def analyse(study: Study) -> Findings:
    edits, testbed = edits_of(study), study.testbed
    pictures = {
        f"{mode}-{testbed.name}": Picture.of(curves_figure(study, mode), "suppression.curves", study, changed=how)
        for mode, how in MODES.items()
    }
    tables = {"edits": edits, "curves": joined([_table(study, mode) for mode in MODES])}
    return Findings(_paragraph(study, edits), pictures, tables, _measured(study, edits))


def _table(study: Study, mode: str) -> pd.DataFrame:
    """What the figures show: by edited class, seed and strength the test accuracy of each class."""
    alphas, curves = curves_of(study, mode)
    parts = []
    for name, accuracy in curves.items():
        for place, one in enumerate(accuracy):
            part = pd.DataFrame(one, columns=study.classes).assign(alpha=alphas, seed=study.runs[place].seed)
            parts.append(part.melt(["alpha", "seed"], var_name="class", value_name="accuracy").assign(target=name))
    return pd.concat(parts).assign(testbed=study.testbed.name, mode=mode)


def _measured(study: Study, edits: pd.DataFrame) -> list[Measured]:
    counted = separation(study.runs, len(study.classes))
    found = [Measured("suppression.separates", study.testbed.name, counted.share, counted.text, counted.published)]
    church, ball = (edits[edits["class"].str.lower() == name] for name in (CHURCH, GOLF_BALL))
    if len(church):
        means = church.mean(numeric_only=True)
        found.append(measured("suppression.church", study, church["lowest"].max(), means=means))
    if len(ball):
        means, loss = ball.mean(numeric_only=True), ball["enhance_worst"].mean()
        found.append(measured("suppression.golf_ball", study, loss, means=means, change=-loss))
    return found


def _paragraph(study: Study, edits: pd.DataFrame) -> str:
    reached = edits[edits["reached"]]
    by_class = edits.groupby("class")[["selectivity", "enhance_own", "enhance_worst"]].mean()
    worst = by_class["enhance_worst"]
    return said(
        "suppression.found", study, edits=len(edits), reached=reached.describe(),
        hardest=by_class["selectivity"].idxmin(), own=100 * by_class["enhance_own"].mean(),
        worst=worst.describe(), worst_for=worst.idxmax(),
    )  # fmt: skip


EXPERIMENT = Experiment("suppression", "Suppression and enhancement curves", analyse)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
