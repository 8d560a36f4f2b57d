"""Which sparse autoencoder gives the cleanest edits? All variants, where they have the same L0 or FVE."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.beyond.sae_variants import measures
from experiments.beyond.sae_variants.measures import ORACLE, RANDOM, Target
from experiments.compare import t_interval, with_half
from experiments.experiment import Experiment, Findings, Picture, said
from experiments.figures import class_rows, entry, printed
from experiments.runs import Study
from experiments.testbeds import TESTBEDS
from salve.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, WIDTH, log_axis, new_figure

#: By variant, its colour and marker.
LOOKS = {
    "linear_l1": (BLACK, "o"),
    "relu_l1": (BLUE, "s"),
    "gated": (SKY, "^"),
    "jumprelu": (GREEN, "D"),
    "topk": (VERMILLION, "v"),
    "batch_topk": (ORANGE, "P"),
    "matryoshka": (PURPLE, "X"),
}
#: How the references' lines are drawn.
DASHES = {ORACLE: (0, (5, 2)), RANDOM: (0, (1, 1.5))}
#: The targets of the right-hand panels, with their markers; the table has more.
SHOWN = {"own best": "o", "FVE = 0.85": "s", "L0 = 8": "^"}
#: Settings that explain less are in the table only.
LEAST_FVE = 0.2


@printed
def comparison_figure(runs: pd.DataFrame, table: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """A row per testbed: selectivity against L0, FVE and alignment, and at matched points (``table``)."""
    names = list(dict.fromkeys(runs["testbed"]))
    figure = new_figure(1.2 * WIDTH, 0.9 + 2.8 * len(names))
    grid = figure.subplots(len(names), 4, squeeze=False, gridspec_kw={"width_ratios": (1, 1, 0.8, 1)})
    for row, testbed in zip(grid, names, strict=True):
        mine = runs[runs["testbed"] == testbed]
        lines = references[references["testbed"] == testbed]
        useful = mine[mine["fve"] > LEAST_FVE]
        for axes, x in zip(row[:3], ("l0", "fve", "alignment"), strict=True):
            _curves(axes, useful, x) if x != "alignment" else _scatter(axes, useful)
            _references(axes.axhline, lines)
            axes.set_ylim(-5, 102)
        row[0].set(title=TESTBEDS[testbed].title, xlabel="L0 (latents per image)", ylabel="selectivity (points)")
        positive = useful.loc[useful["l0"] > 0, "l0"]
        log_axis(row[0], "x", (positive.min() / 1.2, positive.max() * 1.2))
        row[1].set(xlabel="FVE", xlim=(LEAST_FVE, 1))
        row[1].xaxis.set_major_formatter(PercentFormatter(1.0))
        row[2].set_xlabel("alignment (cosine)")
        _matched(row[3], table[table["testbed"] == testbed])
        _references(row[3].axvline, lines)
        row[3].set(xlabel="selectivity (points)", xlim=(-5, 102))
    handles = [entry(name, colour, marker, linestyle="-") for name, (colour, marker) in LOOKS.items()]
    handles += [entry(name, GREY, linestyle=dash) for name, dash in DASHES.items()]
    handles += [entry(name, GREY, marker, markersize=5) for name, marker in SHOWN.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6)
    return figure


def _curves(axes: Axes, runs: pd.DataFrame, x: str) -> None:
    """Each variant's settings in order: mean over seeds, with the interval of the mean as a band."""
    for variant, mine in runs.groupby("variant", sort=False):
        colour, marker = LOOKS[str(variant)]
        points = []
        for _, one in mine.groupby("knob"):
            mean, half, _ = t_interval(one["selectivity"])
            points.append((one[x].mean(), 100 * mean, 100 * half))
        found = np.array(points)
        at, mean, half = found[np.argsort(found[:, 0])].T
        axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        axes.plot(at, mean, color=colour, marker=marker, linewidth=1.2)


def _scatter(axes: Axes, runs: pd.DataFrame) -> None:
    """Every run as a point."""
    for variant, mine in runs.groupby("variant", sort=False):
        axes.plot(mine["alignment"], 100 * mine["selectivity"], LOOKS[str(variant)][1], color=LOOKS[str(variant)][0],
                  markersize=3, alpha=0.6, markeredgewidth=0)  # fmt: skip


def _matched(axes: Axes, table: pd.DataFrame) -> None:
    """A row per variant: its selectivity at each target that is shown, with its interval."""
    variants = list(dict.fromkeys(table["variant"]))
    for place, variant in enumerate(variants):
        colour, _ = LOOKS[variant]
        for step, (target, marker) in enumerate(SHOWN.items()):
            [row] = table[(table["variant"] == variant) & (table["target"] == target)].to_dict("records")
            mean, half = 100 * row["selectivity"], 100 * np.nan_to_num(row["selectivity_half"])
            axes.errorbar(mean, place + 0.24 * (step - 1), xerr=half, fmt=marker, color=colour, markersize=5,
                          elinewidth=1.1, capsize=2)  # fmt: skip
    class_rows(axes, variants)


def _references(draw: Callable[..., object], references: pd.DataFrame) -> None:
    for row in references.to_dict("records"):
        draw(100 * row["selectivity"], color=GREY, linestyle=DASHES[row["reference"]], linewidth=1.2, zorder=1)


def targets_of(testbed: str) -> list[Target]:
    """Where variants are compared. L0 means something else for linear latents, which are never zero; FVE does not."""
    fves = (0.85, 0.92) if testbed == "scenes" else (0.75, 0.85)
    return [Target("best"), *(Target("fve", fve) for fve in fves), *(Target("l0", latents) for latents in (4, 8, 16))]


def analyse(studies: Sequence[Study]) -> Findings:
    found = Findings.together([_analyse(study) for study in studies])
    tables = found.tables
    figure = comparison_figure(tables["runs"], tables["summary"], measures.reference_summary(tables["references"]))
    return replace(found, pictures={"sae-variants": Picture.of(figure, "sae_variants.comparison")})


def _analyse(study: Study) -> Findings:
    edits, references = measures.edits_of(study), measures.references_of(study)
    runs = measures.runs_of(study, edits)
    table = measures.summary(runs, targets_of(study.testbed.name))
    own = table[(table["target"] == "own best") & (table["reason"] == "")].to_dict("records")
    listed = [(row["variant"], row) for row in own]
    listed += [(row["reference"], row) for row in measures.reference_summary(references).to_dict("records")]
    each = "; ".join(f"{name} {with_half(row, 'selectivity')}" for name, row in listed)
    words = said("sae_variants.found", study, each=each)
    return Findings(words, {}, {"runs": runs, "edits": edits, "references": references, "summary": table})


_PRICED, _BUDGETED = (f"sae={','.join(variants)}" for variants in (measures.PRICED, measures.BUDGETED))

EXPERIMENT = Experiment(
    "sae_variants",
    "SAE variants: which gives the cleanest edits?",
    analyse,
    quick=(
        *("sae.seed=0,1", "sae.dictionary_size=32", "sae.epochs=3", "sae.learning_rate=0.01"),
        "edit.alpha=[0,1,2,5,10,20,50]",
    ),
    testbeds=("scenes", "resnet18"),
    group="beyond",
    # Their papers train the budgeted ones with AuxK. Without it most of their latents die here.
    sweeps=((_PRICED, "sae.sparsity=0.5,1,2,3,5,10,20"), (_BUDGETED, "sae.k=1,2,3,4,8,20", "sae.auxk=32")),
    quick_sweeps=((_PRICED, "sae.sparsity=0.1,1"), (_BUDGETED, "sae.k=2,4", "sae.auxk=8")),
)
