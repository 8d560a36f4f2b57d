"""SAEs that differ in their seed alone, on one classifier: how different their bases are, how similar their edits."""

import math
from itertools import combinations

import numpy as np
import pandas as pd

from experiments.claims import Measured
from experiments.compare import LEVEL_TEXT
from experiments.experiment import Experiment, Findings, Picture, per_testbed
from experiments.runs import Study
from experiments.salve2025.seeds.figures import curves_figure, stability_figure
from experiments.salve2025.seeds.measures import (
    COPY,
    SAME,
    Likeness,
    Stability,
    edits_of,
    mean_of_known,
    over_pairs,
    stability_of,
    variation,
)
from experiments.separation import separation


@per_testbed
def analyse(study: Study) -> Findings:
    """See the module."""
    testbed, edits = study.testbed, edits_of(study)
    if len(study.runs) < 2:
        return Findings(f"{testbed.title}: one SAE only, with which nothing can be compared.", {}, {"edits": edits})
    found = stability_of(study, edits)
    where = f"{testbed.title}, {len(study.runs)} SAEs that differ in their seed alone"
    curves = (
        f"{where}: accuracy while one class's latent is suppressed in the weights, a panel per class and a line per "
        f"SAE, on {len(study.test.labels)} test images. The strength that leaves {LEVEL_TEXT} of the select images: "
        "mean over SAEs and its 95 % interval."
    )
    return Findings(
        _paragraph(study, found, edits),
        {
            f"stability-{testbed.name}": Picture(stability_figure(study, found, edits), _caption(where)),
            f"curves-{testbed.name}": Picture(curves_figure(study, edits), curves),
        },
        {
            "edits": edits,
            "pairs": _pairs_table(study, found),
            "bases": _bases_table(study, found),
            "within": _within_table(study, found),
            "images": found.strengths.assign(testbed=testbed.name),
        },
        _measured(study, found, edits),
    )


def _caption(where: str) -> str:
    return (
        f"{where}. Bases: the share that has at least a cosine, of the latents that a one-to-one matching of two "
        "dictionaries pairs (band: range over pairs of SAEs), of the latents chosen for the same class, and of what "
        "these gate by, |c|; and of each latent and the one nearest to it in the same SAE. Images: the strength that "
        "flips each correctly classified test image under two of the SAEs (the highest 0.2 % lie outside). Below, by "
        "class: pale dots are pairs of SAEs (first, last) or SAEs, beside them the mean and its 95 % interval "
        f"(jackknife over SAEs, or Student's). The strength is the one that leaves {LEVEL_TEXT} of the class's select "
        "images, the selectivity what it does on test images. Grey marks say what to compare with: the cosine of a "
        "class's latent with those of other classes in the same SAE (upper mark) and of their gates (lower mark); the "
        "rank correlation of α with the unedited margin."
    )


def _pairs_table(study: Study, found: Stability) -> pd.DataFrame:
    """One row per class and two SAEs: every measure of the two."""
    seeds = [run.seed for run in study.runs]
    rows = [
        {
            **{"testbed": study.testbed.name, "class": name, "seed_a": seeds[a], "seed_b": seeds[b]},
            **{measure: table[k, a, b] for measure, table in found.by_class.items()},
        }
        for k, name in enumerate(study.classes)
        for a, b in combinations(range(len(seeds)), 2)
    ]
    return pd.DataFrame(rows)


def _bases_table(study: Study, found: Stability) -> pd.DataFrame:
    """One row per two SAEs and rank of a matched pair of latents: their cosine."""
    seeds = [run.seed for run in study.runs]
    pairs = list(combinations(seeds, 2))
    count, size = found.alike.cosines.shape
    table = pd.DataFrame(np.repeat(pairs, size, axis=0), columns=["seed_a", "seed_b"])
    table["rank"], table["cosine"] = np.tile(np.arange(1, size + 1), count), found.alike.cosines.flatten()
    return table.assign(testbed=study.testbed.name)


def _within_table(study: Study, found: Stability) -> pd.DataFrame:
    """One row per SAE and class: what the likeness of two SAEs is to be compared with."""
    alike = found.alike
    columns = {
        "copies": alike.copies,
        "direction_apart": alike.direction_apart,
        "gate_apart": alike.gate_apart,
        "margin_rank": found.margin_ranks,
    }
    rows = [
        {"testbed": study.testbed.name, "seed": run.seed, "class": name, "nearest": alike.nearest[s].mean()}
        | {column: values[k, s] for column, values in columns.items()}
        for s, run in enumerate(study.runs)
        for k, name in enumerate(study.classes)
    ]
    return pd.DataFrame(rows)


def _measured(study: Study, found: Stability, edits: pd.DataFrame) -> list[Measured]:
    testbed, seeds, classes = study.testbed.name, len(study.runs), len(study.classes)
    counted = separation(study.runs, classes)
    always, published = (
        int((edits.groupby("class")[sense].sum() == seeds).sum()) for sense in ("separates", "separates_published")
    )
    strengths = edits.groupby("class")["alpha"].apply(variation)
    mean = counted.share * classes
    several = f"{always} of {classes} classes under all {seeds} SAEs; {mean:.1f} in the mean ({counted.span})"
    varies = f"it varies by {_percent(strengths.median())} in the median of the classes{_most(strengths)}"
    apart = mean_of_known(found.alike.direction_apart.flatten())
    alike = f"|cosine| {_mean(found.alike.direction)}; with another class's latent {apart:.2f}"
    order = f"{_mean(found.ranks)} (classes {_range(found.ranks)}); of the classes' medians"
    as_published = f"{published} of {classes} classes under all {seeds} SAEs"
    return [
        Measured("seeds.separates", testbed, always / classes, several, as_published),
        Measured("seeds.strength", testbed, float(strengths.median()), varies),
        Measured("seeds.direction", testbed, _mean_over_pairs(found.alike.direction), alike),
        Measured("seeds.ranks", testbed, _mean_over_pairs(found.ranks), f"{order} {_interval(found.median_ranks)}"),
    ]


def _percent(value: float) -> str:
    if math.isnan(value):
        return "an unknown share"
    return "without bound" if math.isinf(value) else f"{100 * value:.1f} %"


def _most(varies: pd.Series) -> str:
    known = varies.dropna()
    return f" (most for {known.idxmax()}: {_percent(known.max())})" if len(known) else ""


def _mean_over_pairs(tables: np.ndarray) -> float:
    return mean_of_known(over_pairs(table).mean for table in tables)


def _mean(tables: np.ndarray) -> str:
    return f"{_mean_over_pairs(tables):.2f}"


def _range(tables: np.ndarray) -> str:
    means = [over_pairs(table).mean for table in tables]
    if np.isnan(means).all():
        return "unknown"
    return f"{np.nanmin(means):.2f} to {np.nanmax(means):.2f}".replace("-", "−")


def _interval(table: np.ndarray) -> str:
    mean, half, _ = over_pairs(table)
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def _paragraph(study: Study, found: Stability, edits: pd.DataFrame) -> str:
    alike = found.alike
    varies, middle = (edits.groupby("class")[name].apply(variation) for name in ("alpha", "alpha_flip"))
    clean = edits.groupby("class")["selectivity"].agg(["min", "max"])
    spread = (clean["max"] - clean["min"]).dropna()
    one, other = np.triu_indices(len(study.runs), 1)
    paired = mean_of_known(alike.partners[:, one, other].flatten())
    return (
        f"{_bases(study, alike)} The two latents chosen for a class have {_mean(alike.direction)} "
        f"({_range(alike.direction)} by class), what they gate by, |c|, {_mean(alike.gate)} (gates of two classes: "
        f"{mean_of_known(alike.gate_apart.flatten()):.2f}), and the matching pairs them in {_percent(paired)} of the "
        f"cases. For {edits['reached'].sum()} of {len(edits)} edits there is a strength that takes the class to "
        f"{LEVEL_TEXT} of its select images; it leaves {100 * edits['after'].mean():.1f} % of the test images in the "
        f"mean, and varies over the seeds by {_percent(varies.median())} in the median of the classes{_most(varies)}; "
        f"the strength that flips the median image of a class by {_percent(middle.median())}{_most(middle)}. The "
        f"selectivity of a class spans {100 * spread.median():.1f} points over the seeds in the median"
        + (f", most for {spread.idxmax()} ({100 * spread.max():.1f})" if len(spread) else "")
        + f". The order in which a class's images flip agrees between seeds with a rank correlation of "
        f"{_mean(found.ranks)} ({_range(found.ranks)} by class), that of the classes' medians with "
        f"{_interval(found.median_ranks)}. The unedited margin alone has "
        f"{mean_of_known(found.margin_ranks.flatten()):.2f} with α."
    )


def _bases(study: Study, alike: Likeness) -> str:
    matched, nearest = alike.cosines.mean(), alike.nearest.mean()
    crowded = ", so that a matching can hardly tell which is which" if nearest > matched - 0.1 else ""
    return (
        f"{study.testbed.title}: of the latents of two SAEs that a one-to-one matching pairs, "
        f"{_percent(float((alike.cosines >= SAME).mean()))} have a |cosine| of {SAME} or more (mean {matched:.2f}; of "
        f"random directions {alike.chance:.2f}). A latent's nearest one in its own SAE has {nearest:.2f}, and the "
        f"latent of a class has {mean_of_known(alike.copies.flatten()):.0f} near-copies there (|cosine| of {COPY} or "
        f"more){crowded}."
    )


EXPERIMENT = Experiment(
    "seeds",
    "Ten SAE seeds: other bases, the same edits?",
    ("resnet18", "vit"),
    analyse,
    quick=("sae.seed=0,1,2", "sae.epochs=20"),
)
