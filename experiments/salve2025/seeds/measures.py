"""How similar SAEs of different seeds are, and their edits: pure functions, and the tables of a study."""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats

from experiments.compare import CONFIDENCE, margins
from experiments.runs import SENSES, SAERun, Study, suppressed
from salve.metrics import match_columns, random_stability
from salve.report.intervals import Interval

#: Two latents with this cosine or more count as the same (:func:`salve.metrics.stability`).
SAME = 0.7
#: A latent with this cosine or more counts as a copy of another one in the same SAE.
COPY = 0.9


def rank_correlations(values: Float[np.ndarray, "S n"]) -> Float[np.ndarray, "S S"]:
    """Spearman's rank correlation of every two rows; equal values, such as infinite ones, share their mean rank.

    Returns:
        ``[S, S]``; NaN for a row whose values are all the same, or that holds a NaN.
    """
    ranks = stats.rankdata(values, axis=1, nan_policy="propagate")
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=1))
    length[length == 0] = np.nan
    found: Float[np.ndarray, "S S"] = (ranks @ ranks.T) / np.outer(length, length)
    return found


def over_pairs(values: Float[np.ndarray, "S S"]) -> Interval:
    """Mean over the pairs of seeds, of a symmetric table; a seed with NaN on the diagonal is left out.

    Pairs that share a seed are not independent. So the interval is the jackknife's: Student's for ``S − 1`` degrees of
    freedom, with the standard error ``√((S−1)/S Σ_s (m_s − m)²)`` of the means ``m_s`` without seed s, ``m`` their
    mean. NaN for fewer than three seeds.
    """
    known = ~np.isnan(np.diag(values))
    values = values[np.ix_(known, known)]
    seeds = len(values)
    if seeds < 2:
        return Interval(math.nan, math.nan, 0)
    sums = values.sum(axis=1) - np.diag(values)
    mean = float(sums.sum() / (seeds * (seeds - 1)))
    if seeds == 2:
        return Interval(mean, math.nan, 1)
    without = (sums.sum() - 2 * sums) / ((seeds - 1) * (seeds - 2))
    error = math.sqrt((seeds - 1) / seeds * float(((without - without.mean()) ** 2).sum()))
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1))
    return Interval(mean, quantile * error, seeds * (seeds - 1) // 2)


def variation(values: Sequence[float]) -> float:
    """Standard deviation over seeds as a share of the mean; infinite where a value is, NaN for fewer than two."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return math.nan
    return float(known.std(ddof=1) / known.mean()) if np.isfinite(known).all() else math.inf


class Likeness(NamedTuple):
    """How alike what SAEs have found is, for every two of them; NaN where one has no latent for the class.

    Attributes:
        direction: ``[C, S, S]``, ``|cos|`` of the class's latents ``c``. gate: cosine of what gates by them, ``|c|``.
        partners: whether the best one-to-one matching of the two dictionaries pairs them.
        direction_apart, gate_apart: ``[C, S]``, the same cosines with the latents of the other classes in the same SAE.
        cosines: ``[P, k]``, ``|cos|`` of the latents that a matching pairs, for every two SAEs, falling.
        chance: mean of these for random directions.
        nearest: ``[S, k]``, each latent's largest ``|cos|`` with another one of its own SAE, falling. Where it is as
            large as ``cosines``, a matching cannot tell one latent from another.
        copies: ``[C, S]``, how many others of the same SAE have ``|cos|`` of ``COPY`` or more with the class's latent.
    """

    direction: Float[np.ndarray, "C S S"]
    gate: Float[np.ndarray, "C S S"]
    partners: Float[np.ndarray, "C S S"]
    direction_apart: Float[np.ndarray, "C S"]
    gate_apart: Float[np.ndarray, "C S"]
    cosines: Float[np.ndarray, "P k"]
    chance: float
    nearest: Float[np.ndarray, "S k"]
    copies: Float[np.ndarray, "C S"]


def likeness(decoders: Float[np.ndarray, "S M d"], chosen: Int[np.ndarray, "S C"], signed: bool) -> Likeness:
    """Compare SAEs by their decoders.

    Args:
        decoders: of ``S`` SAEs, with unit columns; a column of NaN is a latent that never fires.
        chosen: latent of each class, −1 for none. signed: latents take both signs (linear SAEs).
    """
    seeds = len(chosen)
    vectors = np.take_along_axis(decoders, np.maximum(chosen, 0)[:, None, :], axis=2)  # [S, M, C]
    vectors = np.where(chosen[:, None, :] < 0, np.nan, vectors)
    direction = np.abs(np.einsum("amc,bmc->cab", vectors, vectors))
    gate = np.einsum("amc,bmc->cab", np.abs(vectors), np.abs(vectors))
    partners = np.where(np.isnan(direction), np.nan, 1.0)
    live = [np.flatnonzero(~np.isnan(decoder[0])) for decoder in decoders]
    size = min(map(len, live))
    cosines = []
    for a, b in combinations(range(seeds), 2):
        one, other = (torch.from_numpy(decoders[s][:, live[s]]) for s in (a, b))
        found = match_columns(one, other, signed)
        partner = dict(zip(live[a][found.first.numpy()], live[b][found.second.numpy()], strict=True))
        same = np.array([partner.get(latent, -2) == chosen[b, k] for k, latent in enumerate(chosen[a])], float)
        partners[:, a, b] = partners[:, b, a] = np.where(np.isnan(direction[:, a, b]), np.nan, same)
        cosines.append(np.sort(found.cosines.numpy())[::-1][:size])
    random = random_stability(decoders.shape[1], size, size, signed)
    return Likeness(
        direction,
        gate,
        partners,
        _apart(np.abs(np.einsum("smc,sme->sce", vectors, vectors))),
        _apart(np.einsum("smc,sme->sce", np.abs(vectors), np.abs(vectors))),
        np.array(cosines).reshape(-1, size),
        float(random["matched_cosine"]),
        *_within(decoders, vectors, size),
    )


def _within(
    decoders: Float[np.ndarray, "S M d"], vectors: Float[np.ndarray, "S M C"], size: int
) -> tuple[Float[np.ndarray, "S k"], Float[np.ndarray, "C S"]]:
    """``nearest`` and ``copies`` of :class:`Likeness`."""
    nearest, copies = [], []
    for decoder, own in zip(decoders, vectors, strict=True):
        live = decoder[:, ~np.isnan(decoder[0])]
        cosines = np.abs(live.T @ live)
        np.fill_diagonal(cosines, 0)
        nearest.append(np.sort(cosines.max(axis=1))[::-1][:size])
        # The class's latent is its own copy, too.
        copies.append(np.where(np.isnan(own[0]), np.nan, (np.abs(own.T @ live) >= COPY).sum(axis=1) - 1.0))
    return np.stack(nearest), np.stack(copies, axis=1)


def _apart(cosines: Float[np.ndarray, "S C C"]) -> Float[np.ndarray, "C S"]:
    """Mean over the other classes that have a latent."""
    others = np.where(np.eye(cosines.shape[1], dtype=bool), np.nan, cosines)
    count = (~np.isnan(others)).sum(axis=2)
    return np.where(count > 0, np.nansum(others, axis=2) / np.maximum(count, 1), np.nan).T


def decoders_of(study: Study) -> tuple[Float[np.ndarray, "S M d"], Int[np.ndarray, "S C"]]:
    """What :func:`likeness` takes."""
    chosen = [run.selected["latent"].fillna(-1).to_numpy(int) for run in study.runs]
    decoders = []
    for run in study.runs:
        fires = run.table("features", "latents.csv")["frequency"].to_numpy(float) > 0
        decoders.append(np.where(fires, run.sae.decoder.numpy().astype(np.float64), np.nan))
    return np.stack(decoders), np.stack(chosen)


def edits_of(study: Study) -> pd.DataFrame:
    """One row per SAE and class that has a latent: its edit on test, where select has the class at ``LEVEL``.

    Columns: ``testbed``, ``seed``, ``class``, ``latent``, ``sign``; the fields of
    :class:`experiments.compare.MatchedEdit`; ``separates``, ``separates_published``: whether the edit that stage
    ``control`` keeps does; ``alpha_flip``: lower median over the class's test images.
    """
    rows = []
    for run in study.runs:
        flips = run.table("diagnose", "summary.csv").set_index("class")["alpha_flip_median"]
        rows += [
            {
                **{"testbed": study.testbed.name, "seed": run.seed, "class": one.name},
                **{key: int(run.selected[key][one.name]) for key in ("latent", "sign")},
                **one.edit._asdict(),
                **{sense: bool(run.verdicts.loc[one.name, sense]) for sense in SENSES},
                "alpha_flip": float(flips[one.name]),
            }
            for one in suppressed(run, study.classes)
        ]
    return pd.DataFrame(rows)


def strengths_of(study: Study) -> pd.DataFrame:
    """The exact strength that flips each correctly classified test image: ``class``, ``image``, ``margin`` (the
    unedited logit less the best other's), and a column for each seed; NaN under an SAE without a latent for the class.
    """

    def column(run: SAERun) -> pd.Series:
        images = run.table("diagnose", "images.csv")
        return images[images["correct"].astype(bool)].set_index(["class", "image"])["flip_exact"].rename(run.seed)

    table = pd.concat([column(run) for run in study.runs], axis=1)
    images = torch.tensor(table.index.get_level_values("image").to_numpy(int))
    tail = study.tail
    logits = tail(study.test.activations[images])
    table.insert(0, "margin", margins(logits, study.test.labels[images]).numpy())
    return table.reset_index()


def ranks_of(
    strengths: pd.DataFrame, classes: Sequence[str], seeds: Sequence[int]
) -> tuple[Float[np.ndarray, "C S S"], Float[np.ndarray, "C S"]]:
    """Rank correlations of the images' strengths, by class: of every two SAEs, and of each with the unedited margin."""
    found = np.full((len(classes), 1 + len(seeds), 1 + len(seeds)), np.nan)
    for k, name in enumerate(classes):
        rows = strengths[strengths["class"] == name]
        if len(rows):
            found[k] = rank_correlations(rows[["margin", *seeds]].to_numpy(float).T)
    return found[:, 1:, 1:], found[:, 0, 1:]


class Stability(NamedTuple):
    """What a study says about seeds.

    Attributes:
        alike: how alike the SAEs are. strengths: see :func:`strengths_of`. ranks, margin_ranks: see :func:`ranks_of`.
        median_ranks: ``[S, S]``, rank correlation of the classes' median strengths.
    """

    alike: Likeness
    strengths: pd.DataFrame
    ranks: Float[np.ndarray, "C S S"]
    margin_ranks: Float[np.ndarray, "C S"]
    median_ranks: Float[np.ndarray, "S S"]

    @property
    def by_class(self) -> dict[str, Float[np.ndarray, "C S S"]]:
        """The measures of every two SAEs, by name."""
        alike = self.alike
        return {"direction": alike.direction, "gate": alike.gate, "partners": alike.partners, "ranks": self.ranks}


def stability_of(study: Study, edits: pd.DataFrame) -> Stability:
    """Everything about a study's seeds; ``edits`` as of :func:`edits_of`."""
    seeds = [run.seed for run in study.runs]
    strengths = strengths_of(study)
    medians = edits.pivot_table("alpha_flip", "seed", "class", dropna=False).reindex(index=seeds)
    # A class that some SAE has no latent for has no place in an order of classes.
    complete = medians.to_numpy(float)[:, ~medians.isna().any(axis=0).to_numpy()]
    signed = study.runs[0].sae.signed
    return Stability(
        likeness(*decoders_of(study), signed),
        strengths,
        *ranks_of(strengths, study.classes, seeds),
        rank_correlations(complete) if complete.shape[1] > 1 else np.full((len(seeds), len(seeds)), np.nan),
    )


def mean_of_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
