"""Critical strengths: the α at which an image loses its class, approximate, exact, and in the edited network.

``α_logit`` is where the class's logit reaches zero (the paper's), ``α_flip`` where the prediction leaves the class. The
approximation ``y(0) / Σ_j w_ij a_j |c_j|`` lets every channel fall for ever, but a closed channel stays at 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, joined
from experiments.runs import Study
from experiments.salve2025.critical import measures
from experiments.salve2025.critical.figures import approximation, distributions, logit_and_flip
from salve.report.text import percent, plural

#: Relative difference up to which the numerical and the exact solution agree.
SAME = 1e-6


class Testbed(NamedTuple):
    """What was found on a testbed: tables by image (of all SAEs), by class and α, by class, by SAE, and by image tried.

    ``first`` are the images of the first SAE, with the numerical solution.
    """

    study: Study
    images: pd.DataFrame
    first: pd.DataFrame
    shares: pd.DataFrame
    classes: pd.DataFrame
    agreements: pd.DataFrame
    network: pd.DataFrame


def testbed_of(study: Study) -> Testbed:
    """Read the runs, and try some images in the network."""
    tables = [measures.rows_of(study, run) for run in study.runs]
    images = joined(tables)
    images = images[images["correct"]]
    first = measures.solved(study, study.runs[0], tables[0][tables[0]["correct"]])
    shares = [measures.shares_of(study, run, table) for run, table in zip(study.runs, tables, strict=True)]
    network = measures.tried(study, study.runs[0], tables[0]).assign(
        testbed=study.testbed.name, seed=study.runs[0].seed
    )
    return Testbed(study, images, first, joined(shares), measures.classes_of(images), agreements_of(images), network)


def agreements_of(images: pd.DataFrame) -> pd.DataFrame:
    """One row per SAE and criterion, :class:`experiments.salve2025.critical.measures.Agreement`; and ``open``,
    the share of the images of which no channel has closed at α_logit."""
    found = []
    for (testbed, seed), rows in images.groupby(["testbed", "seed"], sort=False):
        for criterion in ("logit", "flip"):
            known = rows[rows[f"{criterion}_exact"] > 0]
            one = measures.agreement(known[f"{criterion}_linear"], known[f"{criterion}_exact"])._asdict()
            share = float((known["reach"] <= 1).mean()) if criterion == "logit" else np.nan
            found.append({"testbed": testbed, "seed": seed, "criterion": criterion, **one, "open": share})
    return pd.DataFrame(found)


def analyse(studies: Sequence[Study]) -> Findings:
    """See the module."""
    found = Findings.together([_analyse(study) for study in studies])
    testbeds, first = [study.testbed for study in studies], found.tables["images"]
    seeds = ", ".join(dict.fromkeys(str(study.runs[0].seed) for study in studies))
    pictures = {
        "approximation": Picture.of(approximation(first, testbeds), "critical.approximation", seeds=seeds),
        "logit_flip": Picture.of(logit_and_flip(first, testbeds), "critical.logit_flip", seeds=seeds),
    }
    return replace(found, pictures={**found.pictures, **pictures})


def _analyse(study: Study) -> Findings:
    found = testbed_of(study)
    figure = distributions(found.shares, _order(found.classes))
    picture = Picture.of(figure, "critical.distributions", title=study.testbed.title, saes=len(study.runs))
    tables = {name: getattr(found, name) for name in ("shares", "classes", "agreements", "network")}
    return Findings(
        _paragraph(found),
        {f"distributions-{study.testbed.name}": picture},
        {"images": found.first, **tables},
        _measured(found),
    )


def _order(classes: pd.DataFrame) -> list[str]:
    """Classes from the most fragile to the most robust: by the mean rank of the median α_flip over SAEs."""
    return list(classes.groupby("class", sort=False)["rank"].mean().sort_values(kind="stable").index)


def _measured(found: Testbed) -> list[Measured]:
    testbed = found.study.testbed.name
    logit = found.agreements[found.agreements["criterion"] == "logit"]
    bound, within, rank = logit["bound"].mean(), logit["within_5"].mean(), logit["rank"].mean()
    agrees, count = int(found.network["agrees"].sum()), len(found.network)
    span = f"{percent(logit['bound'].min())} to {percent(logit['bound'].max())} over {plural(len(logit), 'SAE')}"
    return [
        Measured("critical.lower_bound", testbed, float(bound), f"for {percent(bound)} of the images ({span})"),
        Measured("critical.agrees", testbed, float(within),
                 f"{percent(within)} of the images within 5 %; rank correlation {rank:.2f}"),
        Measured("critical.empirical", testbed, agrees / count if count else np.nan,
                 f"{agrees} of {count} crossings tried in the edited network"),
    ]  # fmt: skip


def _paragraph(found: Testbed) -> str:
    return " ".join([_strengths(found), _errors(found), _checks(found), _fragility(found)])


def _strengths(found: Testbed) -> str:
    images, study = found.images, found.study
    medians = images.groupby("seed")[list(measures.METHODS)].agg(measures.median_of)
    flip, logit = medians["flip_exact"], medians["logit_exact"]
    never = {one: float(np.isinf(images[f"{one}_exact"]).mean()) for one in ("flip", "logit")}
    earlier = float((images["flip_exact"] < images["logit_exact"]).mean())
    positive, others = (percent(_never(found, sign)) for sign in (True, False))
    return (
        f"{study.testbed.title} ({plural(len(study.runs), 'SAE')}; {len(found.first)} rightly classified test images): "
        f"half of the images lose their prediction up to α_flip = {flip.mean():.2g}{_span(flip)} and have their logit "
        f"at zero up to α_logit = {logit.mean():.2g}{_span(logit)}. {percent(earlier)} lose the prediction first; "
        f"{percent(never['flip'])} never lose it. The logit of {percent(never['logit'])} never reaches zero: with all "
        f"channels closed it is the class's bias ({positive} for classes with a positive bias, {others} for others)."
    )


def _never(found: Testbed, positive: bool) -> float:
    """Share of images with an infinite α_logit, of the classes with a positive bias or the others."""
    biases = dict(zip(found.study.classes, found.study.tail.bias.tolist(), strict=True))
    images = found.images[[(biases[name] > 0) == positive for name in found.images["class"]]]
    return float(np.isinf(images["logit_exact"]).mean()) if len(images) else float("nan")


def _span(values: pd.Series) -> str:
    return f" ({values.min():.2g} to {values.max():.2g} over SAEs)" if len(values) > 1 else ""


def _errors(found: Testbed) -> str:
    table = found.agreements.groupby("criterion").mean(numeric_only=True)
    logit, flip = table.loc["logit"], table.loc["flip"]
    images = found.images[found.images["logit_exact"] > 0]
    closed = images[images["reach"] > 1]
    hold, up, down, turned = (percent(closed[name].mean(), 0) for name in ("closed", "lift", "drop", "negative"))
    return (
        f"The approximation of α_logit is a lower bound for {percent(logit['bound'])} of the images, and within 5 % of "
        f"the exact value for {percent(logit['within_5'])} (1 %: {percent(logit['within_1'])}); its error is "
        f"{_signed(logit['median'])} in the median and {_signed(logit['low'])} to {_signed(logit['high'])} for nine in "
        f"ten, its rank correlation {logit['rank']:.2f}. For α_flip these are {percent(flip['bound'])}, "
        f"{percent(flip['within_5'])} ({percent(flip['within_1'])}), {_signed(flip['median'])}, "
        f"{_signed(flip['low'])} to {_signed(flip['high'])} and {flip['rank']:.2f}. It is exact up to "
        f"α_logit · max|c| = 1, where the first channel closes: for {percent(logit['open'])}; the median is "
        f"{images['reach'].median():.2g}. Of the others, closed channels hold {hold} of the logit's terms in the mean; "
        f"those with terms for the class make the approximation {up} too small ({turned} by negative activations with "
        f"negative weights), those with terms against it {down} too large."
    )


def _signed(part: float) -> str:
    return f"{100 * part:+.1f} %".replace("-", "−")


def _checks(found: Testbed) -> str:
    parts = []
    for criterion in ("logit", "flip"):
        exact, numerical = (found.first[f"{criterion}_{one}"].to_numpy(float) for one in ("exact", "numerical"))
        beyond = np.isinf(numerical) & (exact >= float(measures.SCAN[-1]))
        finite = np.isfinite(numerical)
        same = beyond | (finite & (np.abs(np.where(finite, numerical, 0) - exact) <= SAME * exact))
        parts.append(f"{int(same.sum())} of {len(same)} images for α_{criterion}")
    again = found.shares["flip_exact"] - found.shares["predicted"]
    most = found.shares.loc[again.abs().idxmax()]
    last = found.study.classes[int(found.study.tail.bias.argmax())]
    agrees = found.network["agrees"]
    return (
        f"A scan of {len(measures.SCAN)} strengths with bisection finds the exact value, to 1 part in a million, for "
        f"{' and '.join(parts)}; it misses a class that gives way and recovers between two strengths. The edited "
        f"network gives way between {1 - measures.STEP:g} and {1 + measures.STEP:g} of it in {int(agrees.sum())} of "
        f"{len(agrees)} crossings tried. The accuracy lost on the grid and the distribution of α_flip differ by at "
        f"most {100 * again.abs().max():.1f} points of a class's images ({most['class']} at α = {most['alpha']:g}), "
        f"which have their class again at a larger strength; with every channel closed all images are {last}, the "
        "class with the largest bias."
    )


def _fragility(found: Testbed) -> str:
    order = _order(found.classes)
    ranks = found.classes.pivot_table("rank", "seed", "class").dropna(axis="columns")
    spans = {name: f"rank {ranks[name].min():.0f} to {ranks[name].max():.0f}" for name in ranks}
    ends = [f"{order[k]} ({spans.get(order[k], 'not in all SAEs')})" for k in (0, -1)]
    stable = measures.concordance(ranks.to_numpy(float))
    between = "" if np.isnan(stable) else f"; the order's mean rank correlation between SAEs is {stable:.2f}"
    return f"Most fragile by the median of α_flip: {ends[0]}, most robust: {ends[1]} of {len(order)}{between}."


EXPERIMENT = Experiment("critical", "Critical strengths: approximate, exact and empirical", analyse)
