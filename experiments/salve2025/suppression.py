"""Suppression and enhancement: accuracy of every class while one class's latent is turned down or up."""

import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from experiments.claims import Measured
from experiments.compare import CONFIDENCE, LEVEL, matched_edit
from experiments.experiment import Experiment, Findings, Picture, main
from experiments.figures import PRINT_WIDTH
from experiments.runs import Study
from salve.report.style import BLUE, GREY, ORANGE, SKY, grid_axis, new_figure, percent_axis, styled
from salve.report.text import label

#: An edit is clean while the others' accuracy changes by less than this in the mean of absolute values.
OTHERS = 0.03
CHURCH, GOLF_BALL = "church", "golf ball"

Curves = NDArray[np.float64]


def curves_of(study: Study, mode: str) -> tuple[Curves, dict[str, Curves]]:
    """Strengths ``[K]``, and by edited class the accuracy of all classes under each SAE ``[S, K, C]``."""
    found: dict[str, Curves] = {}
    alphas = np.zeros(0)
    for name in study.classes:
        each = [run.curves(mode, name) for run in study.runs if run.selected["latent"].notna()[name]]
        if each:
            alphas, found[name] = each[0][0], np.stack([accuracy for _, accuracy in each])
    return alphas, found


def edits_of(study: Study) -> pd.DataFrame:
    """One row per SAE and class: the edit where the class is at ``LEVEL``, and what enhancing as strongly does.

    Columns: ``ground``, ``seed``, ``class``, ``latent``, ``sign``, ``kind``; the fields of
    :class:`experiments.compare.MatchedEdit`; ``lowest`` accuracy of the class at any strength; ``separates``: at some
    strength of the grid the class is at ``LEVEL`` or less and the others' mean absolute change is below ``OTHERS``;
    ``enhance_alpha``: the first strength of the grid from ``alpha`` on, ``enhance_own``: the class's change when
    enhanced by it, ``enhance_worst``: the largest loss of any class.
    """
    rows = []
    for run in study.runs:
        for own, name in enumerate(study.classes):
            chosen = run.selected.loc[name]
            if pd.isna(chosen["latent"]):
                continue
            alphas, accuracy = run.curves("suppress", name)
            edit = matched_edit(alphas, accuracy, own)
            row = {
                **{"ground": study.ground.name, "seed": run.seed, "class": name},
                **{"latent": int(chosen["latent"]), "sign": int(chosen["sign"]), "kind": chosen["kind"]},
                **edit._asdict(),
                "lowest": float(accuracy[:, own].min()),
                "separates": separates(accuracy, own),
            }
            strengths, up = run.curves("enhance", name)
            at = int(np.searchsorted(strengths, edit.alpha)) if edit.reached else len(strengths) - 1
            row |= {
                "enhance_alpha": float(strengths[at]),
                "enhance_own": float(up[at, own] - up[0, own]),
                "enhance_worst": float(np.nanmax(up[0] - up[at])),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def separates(accuracy: Curves, own: int) -> bool:
    """Whether at some strength class ``own`` is at ``LEVEL`` or less, from above it, and the others' mean absolute
    change is below ``OTHERS``; ``accuracy`` is ``[K, C]``, NaN for a class without images."""
    drift = np.nanmean(np.abs(np.delete(accuracy - accuracy[0], own, axis=1)), axis=1)
    return bool(((accuracy[:, own] <= LEVEL) & (drift < OTHERS) & (accuracy[0, own] > LEVEL)).any())


def wilson(accuracy: Curves, images: int) -> tuple[Curves, Curves]:
    """Wilson's interval of a share of ``images`` images, at ``CONFIDENCE``; the same shape as ``accuracy``."""
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    centre = (accuracy + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * np.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    return centre - half, centre + half


@styled
def curves_figure(study: Study, mode: str) -> Figure:
    """A panel per edited class: its own accuracy, the mean of the others with bands over images and SAEs, and each."""
    alphas, curves = curves_of(study, mode)
    images = np.bincount(study.val.labels.numpy(), minlength=len(study.classes))
    columns = min(5, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(PRINT_WIDTH, 0.75 + 1.5 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, accuracy) in zip(grid, curves.items(), strict=False):
        own = study.classes.index(name)
        others = np.delete(accuracy, own, axis=2)  # [S, K, C − 1]
        axes.plot(alphas, others.mean(axis=0), color=SKY, linewidth=0.5, alpha=0.8)
        _line(axes, alphas, accuracy[:, :, own], ORANGE, int(images[own]))
        _line(axes, alphas, np.nanmean(others, axis=2), BLUE, int(images.sum() - images[own]))
        axes.set_title(label(name), fontsize=8.5)
        axes.set_ylim(-0.03, 1.03)
        percent_axis(axes.yaxis)
        grid_axis(axes, alphas)
    for axes in grid[len(curves) :]:
        axes.axis("off")
    figure.supxlabel(f"strength α of {'suppression' if mode == 'suppress' else 'enhancement'}", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    handles = [
        Line2D([], [], color=ORANGE, label="the class"),
        Line2D([], [], color=BLUE, label="mean of the others"),
        Line2D([], [], color=SKY, linewidth=0.8, label="each of them"),
        Patch(color=GREY, alpha=0.45, linewidth=0, label=f"range over {len(study.runs)} SAEs"),
        Patch(color=GREY, alpha=0.18, linewidth=0, label="95 % over images"),
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=5, fontsize=7.5, handlelength=1.4, columnspacing=1.2
    )
    return figure


def _line(axes: Axes, alphas: Curves, accuracy: Curves, colour: str, images: int) -> None:
    """Mean over SAEs ``[S, K]``, their range, and the interval over images around the mean."""
    mean = accuracy.mean(axis=0)
    axes.fill_between(alphas, *wilson(mean, images), color=colour, alpha=0.18, linewidth=0)
    axes.fill_between(alphas, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.35, linewidth=0)
    axes.plot(alphas, mean, color=colour, linewidth=1.4)


def analyse(studies: Sequence[Study]) -> Findings:
    """See the module."""
    pictures, paragraphs, measured, tables, curves = {}, [], [], [], []
    for study in studies:
        ground = study.ground
        edits = edits_of(study)
        tables.append(edits)
        for mode, verb in (("suppress", "suppressed"), ("enhance", "enhanced")):
            caption = (
                f"{ground.title}: accuracy while one class's latent is {verb} in the weights, a panel per class; mean "
                f"of {len(study.runs)} SAEs, evaluated on {len(study.val.labels)} val images."
            )
            pictures[f"{mode}-{ground.name}"] = Picture(curves_figure(study, mode), caption)
            curves.append(_table(study, mode))
        paragraphs.append(_paragraph(study, edits))
        measured += _measured(study, edits)
    return Findings(
        "\n\n".join(paragraphs),
        pictures,
        {"edits": pd.concat(tables, ignore_index=True), "curves": pd.concat(curves, ignore_index=True)},
        measured,
    )


def _table(study: Study, mode: str) -> pd.DataFrame:
    """What the figures show: by edited class, seed and strength the accuracy of each class."""
    alphas, curves = curves_of(study, mode)
    parts = []
    for name, accuracy in curves.items():
        for place, one in enumerate(accuracy):
            part = pd.DataFrame(one, columns=study.classes).assign(alpha=alphas, seed=study.runs[place].seed)
            parts.append(part.melt(["alpha", "seed"], var_name="class", value_name="accuracy").assign(target=name))
    return pd.concat(parts).assign(ground=study.ground.name, mode=mode)


def _measured(study: Study, edits: pd.DataFrame) -> list[Measured]:
    ground, classes = study.ground.name, len(study.classes)
    by_seed = edits.groupby("seed")["separates"].sum()
    text = f"{by_seed.mean():.1f} of {classes} classes ({by_seed.min()} to {by_seed.max()} over {len(by_seed)} SAEs)"
    found = [Measured("suppression.separates", ground, float(by_seed.mean()) / classes, text)]
    church = edits[edits["class"].str.lower() == CHURCH]
    if len(church):
        worst = float(church["lowest"].max())
        drift = 100 * church["drift"].mean()
        text = f"{100 * worst:.1f} % at the lowest in the worst SAE; others change by {drift:.1f} points at 5 %"
        found.append(Measured("suppression.church", ground, worst, text))
    ball = edits[edits["class"].str.lower() == GOLF_BALL]
    if len(ball):
        loss, own = ball["enhance_worst"].mean(), ball["enhance_own"].mean()
        text = f"golf ball {100 * own:+.1f} points; the class that loses most {-100 * loss:+.1f}".replace("-", "−")
        found.append(Measured("suppression.golf_ball", ground, float(loss), text))
    return found


def _paragraph(study: Study, edits: pd.DataFrame) -> str:
    reached = edits[edits["reached"]]
    up = edits.groupby("class")[["enhance_own", "enhance_worst"]].mean()
    hardest = edits.groupby("class")["selectivity"].mean().idxmin()
    own, worst = 100 * up["enhance_own"], 100 * up["enhance_worst"]
    return (
        f"{study.ground.title}: one latent takes its class to 5 % in {len(reached)} of {len(edits)} edits "
        f"({len(study.classes)} classes, {len(study.runs)} SAEs), at a median strength of "
        f"{reached['alpha'].median():.1f}; the others then change by {100 * reached['drift'].mean():.1f} points in the "
        f"mean of absolute values, and the one that changes most by {100 * reached['worst'].mean():.1f}. Least clean: "
        f"{hardest}. Enhanced by the same strength, a class changes by {own.mean():+.1f} points in the mean, and the "
        f"class that loses most loses {worst.mean():.1f} (worst for {worst.idxmax()}: {worst.max():.1f})."
    )


EXPERIMENT = Experiment(
    "suppression",
    "Suppression and enhancement curves",
    ("resnet18", "vit"),
    analyse,
    quick=("sae.seed=0,1", "sae.epochs=20"),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
