"""Critical strengths: the α at which an image loses its class, approximate, exact, and in the edited network.

``α_logit`` is where the class's logit reaches zero (the paper's), ``α_flip`` where the prediction leaves the class. The
approximation ``y(0) / Σ_j w_ij a_j |c_j|`` lets every channel fall for ever, but a closed channel stays at 0.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, joined, measured, said
from experiments.runs import Study
from experiments.salve2025.critical import measures
from experiments.salve2025.critical.figures import approximation, distributions, logit_and_flip
from salve.report.text import plural

#: Relative difference up to which the numerical and the exact solution agree.
SAME = 1e-6


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
    found = Findings.together([_analyse(study) for study in studies])
    testbeds, first = [study.testbed for study in studies], found.tables["images"]
    seeds = ", ".join(dict.fromkeys(str(study.runs[0].seed) for study in studies))
    pictures = {
        "approximation": Picture.of(approximation(first, testbeds), "critical.approximation", seeds=seeds),
        "logit_flip": Picture.of(logit_and_flip(first, testbeds), "critical.logit_flip", seeds=seeds),
    }
    return replace(found, pictures={**found.pictures, **pictures})


def _analyse(study: Study) -> Findings:
    """The tables of all SAEs, but ``images`` and ``network``, which are of the first."""
    read, run = [measures.rows_of(study, run) for run in study.runs], study.runs[0]
    every = joined(read)
    every = every[every["correct"]]
    tables = {
        "images": measures.solved(study, run, read[0][read[0]["correct"]]),
        "shares": joined([measures.shares_of(study, *one) for one in zip(study.runs, read, strict=True)]),
        "classes": measures.classes_of(every),
        "agreements": agreements_of(every),
        "network": measures.tried(study, run, read[0]).assign(testbed=study.testbed.name, seed=run.seed),
    }
    figure = distributions(tables["shares"], _order(tables["classes"]))
    pictures = {f"distributions-{study.testbed.name}": Picture.of(figure, "critical.distributions", study)}
    parts = [_strengths(study, every, tables["images"]), _errors(every, tables["agreements"])]
    parts += [_checks(study, tables), _fragility(tables["classes"])]
    return Findings(" ".join(parts), pictures, tables, _measured(study, tables))


def _order(classes: pd.DataFrame) -> list[str]:
    """Classes from the most fragile to the most robust: by the mean rank of the median α_flip over SAEs."""
    return list(classes.groupby("class", sort=False)["rank"].mean().sort_values(kind="stable").index)


def _measured(study: Study, tables: dict[str, pd.DataFrame]) -> list[Measured]:
    logit = tables["agreements"][tables["agreements"]["criterion"] == "logit"]
    means, bounds = logit.mean(numeric_only=True), logit["bound"].agg(["min", "max"])
    agrees, tried = tables["network"]["agrees"].sum(), len(tables["network"])
    share, saes = agrees / tried if tried else np.nan, plural(len(logit), "SAE")
    return [
        measured("critical.lower_bound", study, means["bound"], bounds=bounds, saes=saes),
        measured("critical.agrees", study, means["within_5"], rank=means["rank"]),
        measured("critical.empirical", study, share, agrees=agrees, tried=tried),
    ]


def _strengths(study: Study, every: pd.DataFrame, first: pd.DataFrame) -> str:
    methods = list(measures.METHODS)
    medians = every.groupby("seed")[methods].agg(measures.median_of)
    flip, logit = medians["flip_exact"], medians["logit_exact"]
    never = np.isinf(every[methods])
    positive = every["class"].map(dict(zip(study.classes, study.tail.bias.tolist(), strict=True))) > 0
    return said(
        "critical.strengths", study, saes=plural(len(study.runs), "SAE"), images=len(first),
        flip=flip.mean(), flip_span=_span(flip), logit=logit.mean(), logit_span=_span(logit),
        earlier=(every["flip_exact"] < every["logit_exact"]).mean(), never=never.mean(),
        positive=never["logit_exact"][positive].mean(), others=never["logit_exact"][~positive].mean(),
    )  # fmt: skip


def _span(values: pd.Series) -> str:
    return f" ({values.min():.2g} to {values.max():.2g} over SAEs)" if len(values) > 1 else ""


def _errors(every: pd.DataFrame, agreements: pd.DataFrame) -> str:
    means = agreements.groupby("criterion").mean(numeric_only=True)
    images = every[every["logit_exact"] > 0]
    closed = images[images["reach"] > 1][["closed", "lift", "drop", "negative"]].mean()
    reach = images["reach"].median()
    return said("critical.errors", logit=means.loc["logit"], flip=means.loc["flip"], reach=reach, closed=closed)


def _checks(study: Study, tables: dict[str, pd.DataFrame]) -> str:
    images, shares, same = tables["images"], tables["shares"], {}
    for criterion in ("logit", "flip"):
        exact, numerical = (images[f"{criterion}_{one}"].to_numpy(float) for one in ("exact", "numerical"))
        beyond = np.isinf(numerical) & (exact >= float(measures.SCAN[-1]))
        finite = np.isfinite(numerical)
        close = finite & (np.abs(np.where(finite, numerical, 0) - exact) <= SAME * exact)
        same[criterion] = int((beyond | close).sum())
    again, agrees = (shares["flip_exact"] - shares["predicted"]).abs(), tables["network"]["agrees"]
    return said(
        "critical.checks", scan=len(measures.SCAN), same=same, images=len(images), low=1 - measures.STEP,
        high=1 + measures.STEP, agrees=int(agrees.sum()), tried=len(agrees), again=again.max(),
        most=shares.loc[again.idxmax()], last=study.classes[int(study.tail.bias.argmax())],
    )  # fmt: skip


def _fragility(classes: pd.DataFrame) -> str:
    order = _order(classes)
    ranks = classes.pivot_table("rank", "seed", "class").dropna(axis="columns")
    spans = {name: f"rank {ranks[name].min():.0f} to {ranks[name].max():.0f}" for name in ranks}
    ends = [f"{order[k]} ({spans.get(order[k], 'not in all SAEs')})" for k in (0, -1)]
    stable = measures.concordance(ranks.to_numpy(float))
    between = "" if np.isnan(stable) else f"; the order's mean rank correlation between SAEs is {stable:.2f}"
    return said("critical.fragility", ends=ends, count=len(order), between=between)


EXPERIMENT = Experiment("critical", "Critical strengths: approximate, exact and empirical", analyse)
