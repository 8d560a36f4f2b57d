"""Compare critical strengths: errors of the approximation and their reasons, a numerical solution, distributions.

First come pure functions, then the tables of an SAE's runs and of the edited network itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.func import functional_call

from experiments.compare import margins, rank_correlation
from experiments.runs import SAERun, Study
from salve.backbones import Site
from salve.backbones.tail import LinearTail
from salve.diagnosis.critical import Criterion
from salve.editing import contribution, edited_logits, gates

#: The approximation still counts as a lower bound if it is larger by this part, which is rounding.
ROUNDING = 1e-6
#: Strengths that the numerical solution tries before it bisects. A class that holds at the last counts as infinite.
SCAN = torch.from_numpy(np.geomspace(1e-2, 1e4, 400))
_HALVINGS = 60
#: Images of each class that are tried.
TRIED = 5
#: How far below and above the critical strength, as a part of it.
STEP = 1e-3
METHODS = ("logit_linear", "logit_exact", "flip_linear", "flip_exact")


class Closing(NamedTuple):
    """What closed channels do to the approximation ``α̂ = y(0) / Σ_j t_j s_j`` of a crossing at ``α*``; ``[N]`` each.

    At ``α*`` a channel with ``α* s_j > 1`` adds nothing to the logit, where the approximation has it add
    ``t_j (1 − α* s_j)``. So ``(α* − α̂) / α* = lift − drop``, and the approximation is a lower bound of ``α*`` just
    where ``lift ≥ drop``.

    Attributes:
        reach: ``α* max_j s_j``: up to 1 no channel is closed. closed: share of ``Σ |t_j|`` in closed channels.
        lift, drop: ``Σ |t_j| (α* s_j − 1) / (α* Σ_j t_j s_j)`` over the closed channels with ``t_j > 0``, ``t_j < 0``.
        negative: the part of ``lift`` from channels with ``a_j < 0``, where a negative weight speaks for the class.
    """

    reach: Float[Tensor, " N"]
    closed: Float[Tensor, " N"]
    lift: Float[Tensor, " N"]
    drop: Float[Tensor, " N"]
    negative: Float[Tensor, " N"]


def closing(
    activations: Float[Tensor, "N M"],
    weight: Float[Tensor, " M"],
    size: Float[Tensor, " M"],
    strength: Float[Tensor, " N"],
) -> Closing:
    """Why the approximation is off, for images of one class.

    Args:
        activations: at the site. weight: of the class; ``t_j = w_j a_j``. size: ``s_j = |c_j|``. strength: ``α*``.

    Returns:
        NaN where ``α*`` is 0 or infinite; ``lift``, ``drop`` and ``negative`` also where ``Σ t_j s_j ≤ 0``: the
        approximation then says that the logit never falls.
    """
    terms = activations * weight
    crosses = strength.isfinite() & (strength > 0)
    at = torch.where(crosses, strength, torch.nan)
    fall = terms @ size
    beyond = (at[:, None] * size - 1).clamp_min(0)  # NaN stays
    excess = terms * beyond / (at * torch.where(fall > 0, fall, torch.nan))[:, None]
    closed = torch.where(beyond > 0, terms.abs(), 0).sum(dim=1) / terms.abs().sum(dim=1)
    return Closing(
        at * size.max(),
        torch.where(crosses, closed, torch.nan),
        excess.clamp_min(0).sum(dim=1),
        (-excess).clamp_min(0).sum(dim=1),
        torch.where(activations < 0, excess, 0 * excess).clamp_min(0).sum(dim=1),
    )


def numerical(
    tail: LinearTail,
    activations: Float[Tensor, "N M"],
    contribution: Float[Tensor, " M"],
    labels: Int[Tensor, " N"],
    criterion: Criterion,
    scan: Float[Tensor, " K"] = SCAN,
) -> Float[Tensor, " N"]:
    """Critical strengths by trying: the first strength of a scan where the class has given way, then bisection.

    It knows nothing of the logits' form, and misses a class that gives way and recovers between two strengths.

    Returns:
        float64, for the class in ``labels``; +inf where it holds throughout the scan of rising strengths.
    """
    tail = LinearTail(tail.weight.double(), tail.bias.double())
    activations, contribution = activations.double(), contribution.double()

    def holds(gated: Float[Tensor, "N M"]) -> Bool[Tensor, " N"]:
        logits = tail(gated)
        return (margins(logits, labels) if criterion == "flip" else logits.gather(1, labels[:, None])[:, 0]) > 0

    first = torch.full((len(labels),), len(scan))
    for k in reversed(range(len(scan))):
        first[~holds(activations * gates(contribution, scan[k : k + 1]))] = k
    edges = torch.cat([scan.new_zeros(1), scan, scan.new_tensor([torch.inf])])
    low, high = edges[first].double(), edges[first + 1].double()
    crosses = high.isfinite()
    for _ in range(_HALVINGS):
        middle = torch.where(crosses, (low + high) / 2, 0)
        held = holds(activations * gates(contribution, middle))
        low, high = torch.where(held, middle, low), torch.where(held | ~crosses, high, middle)
    return torch.where(holds(activations), high, 0)


class Agreement(NamedTuple):
    """How an approximation stands to exact critical strengths.

    Attributes:
        n: images compared. bound: share where it is a lower bound. within_1, within_5: share within 1 %, 5 % of the
            exact strength; where one of the two is infinite, only if both are.
        infinite, exact_infinite: share where it (the exact one) is infinite.
        low, median, high: 5, 50 and 95 % quantiles of ``(α̂ − α*) / α*`` where both are finite.
        rank: Spearman's correlation, infinite ones last.
    """

    n: int
    bound: float
    within_1: float
    within_5: float
    infinite: float
    exact_infinite: float
    low: float
    median: float
    high: float
    rank: float


def agreement(approximate: ArrayLike, exact: ArrayLike) -> Agreement:
    """Compare critical strengths ``[N]`` of images whose class holds without an edit; all NaN for no image."""
    found, true = np.asarray(approximate, dtype=float), np.asarray(exact, dtype=float)
    error, never = relative_error(found, true), (np.isinf(found), np.isinf(true))
    within = [(np.abs(error) <= part) | (never[0] & never[1]) for part in (0.01, 0.05)]
    shares = [found <= true * (1 + ROUNDING), *within, *never]
    means = [float(share.mean()) if len(true) else np.nan for share in shares]
    finite = error[np.isfinite(error)]
    quantiles = np.quantile(finite, [0.05, 0.5, 0.95]).tolist() if len(finite) else [np.nan] * 3
    return Agreement._make([len(true), *means, *quantiles, rank_correlation(found, true)])


def relative_error(approximate: ArrayLike, exact: ArrayLike) -> Float[np.ndarray, " N"]:
    """``(α̂ − α*) / α*``; NaN where either is not finite or ``α*`` is 0."""
    found, true = np.asarray(approximate, dtype=float), np.asarray(exact, dtype=float)
    known = np.isfinite(found) & np.isfinite(true) & (true > 0)
    error = np.full(len(true), np.nan)
    error[known] = (found[known] - true[known]) / true[known]
    return error


def given_way(strengths: ArrayLike, alphas: ArrayLike) -> Float[np.ndarray, " K"]:
    """Share of images whose critical strength is at most ``α``: the empirical distribution function."""
    known = np.sort(np.asarray(strengths, dtype=float))
    return np.searchsorted(known, np.asarray(alphas), side="right") / len(known)


def median_of(strengths: ArrayLike) -> float:
    """The lower median, which is an observed value even if some are infinite; NaN for no values."""
    known = np.asarray(strengths, dtype=float)
    return float(np.quantile(known, 0.5, method="lower")) if len(known) else float("nan")


def concordance(values: Float[np.ndarray, "S C"]) -> float:
    """Mean Spearman correlation over all pairs of rows; NaN for fewer than two rows."""
    pairs = [rank_correlation(a, b) for k, a in enumerate(values) for b in values[:k]]
    return float(np.mean(pairs)) if pairs else float("nan")


def contribution_of(run: SAERun, name: str) -> Tensor:
    """The contribution vector ``[M]`` of a class's latent, as stage ``diagnose`` has it."""
    chosen = run.selected.loc[name]
    scale, channels = run.flat_settings["edit.scale"], run.flat_settings["edit.channels"]
    return contribution(run.sae.decoder, int(chosen["latent"]), scale, channels, int(chosen["sign"]))


def rows_of(study: Study, run: SAERun) -> pd.DataFrame:
    """One row per test image of a class that has a latent: ``images.csv`` of stage ``diagnose``, and the fields of
    :class:`experiments.salve2025.critical.measures.Closing` for α_logit."""
    weight = study.tail.weight
    parts = []
    for name, images in run.table("diagnose", "images.csv").groupby("class", sort=False):
        activations = study.test.activations[images["image"].tolist()].double()
        own = weight[study.classes.index(str(name))].double()
        exact = torch.tensor(images["logit_exact"].to_numpy(float))
        why = closing(activations, own, contribution_of(run, str(name)).double().abs(), exact)
        parts.append(images.assign(**{field: values.numpy() for field, values in why._asdict().items()}))
    found = pd.concat(parts, ignore_index=True)
    error = relative_error(found["logit_linear"], found["logit_exact"])
    return found.assign(seed=run.seed, testbed=study.testbed.name, error=error)


def solved(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """``images`` with columns ``logit_numerical`` and ``flip_numerical``."""
    parts = []
    for name, rows in images.groupby("class", sort=False):
        at, vector = rows["image"].tolist(), contribution_of(run, str(name))
        activations, labels = study.test.activations[at], study.test.labels[at]
        columns = {
            f"{criterion}_numerical": numerical(study.tail, activations, vector, labels, criterion).numpy()
            for criterion in ("logit", "flip")
        }
        parts.append(rows.assign(**columns))
    return pd.concat(parts)


def shares_of(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """By class and strength of the grid, the share of the rightly classified images whose class has given way.

    Columns: one for each of ``METHODS``; ``predicted``: the share that the edited head no longer classifies rightly.
    """
    alphas = list(run.flat_settings["edit.alpha"])
    parts = []
    for name, rows in images[images["correct"]].groupby("class", sort=False):
        at = rows["image"].tolist()
        labels = study.test.labels[at]
        logits = edited_logits(study.tail, study.test.activations[at], contribution_of(run, str(name)), alphas)
        lost = (logits.argmax(dim=2) != labels).double().mean(dim=1).numpy()
        columns = {method: given_way(rows[method], alphas) for method in METHODS}
        parts.append(pd.DataFrame({"class": name, "alpha": alphas, **columns, "predicted": lost}))
    return pd.concat(parts, ignore_index=True).assign(seed=run.seed, testbed=study.testbed.name)


def classes_of(images: pd.DataFrame) -> pd.DataFrame:
    """By class and SAE: ``images`` rightly classified, the ``median`` of each of ``METHODS``, and the share for which
    the exact ones are infinite; ``rank`` of the median α_flip, from 1, the most fragile."""
    parts = []
    for (testbed, seed, name), rows in images[images["correct"]].groupby(["testbed", "seed", "class"], sort=False):
        medians = {method: median_of(rows[method]) for method in METHODS}
        never = {f"{one}_infinite": float((rows[f"{one}_exact"] == float("inf")).mean()) for one in ("logit", "flip")}
        key = {"testbed": testbed, "seed": seed, "class": name, "latent": int(rows["latent"].iloc[0])}
        parts.append({**key, "images": len(rows), **medians, **never})
    found = pd.DataFrame(parts)
    return found.assign(rank=found.groupby(["testbed", "seed"])["flip_exact"].rank())


def edited_outputs(
    model: nn.Module, site: Site, image: Float[Tensor, "3 H W"], gate: Float[Tensor, "K M"]
) -> Float[Tensor, "K C"]:
    """Logits of the network whose readers' weights are scaled by each gate; all of the network is run each time."""
    weights = {reader.weight: model.get_parameter(reader.weight) for reader in site.readers}
    found = []
    with torch.inference_mode():
        for one in gate:
            edited = {name: weight * one.to(weight) for name, weight in weights.items()}
            found.append(functional_call(model, edited, (image[None],))[0])
    return torch.stack(found)


def spread(strengths: Sequence[float], count: int) -> list[int]:
    """Indices of up to ``count`` strengths that are neither 0 nor infinite, evenly over their order."""
    known = np.asarray(strengths, dtype=float)
    order = [int(k) for k in known.argsort(kind="stable") if 0 < known[k] < np.inf]
    count = min(count, len(order))
    return [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]


def tried(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """Some images of each class in one SAE's :func:`rows_of` through the edited network, for α_logit and for α_flip.

    Returns:
        Columns ``class``, ``image``, ``criterion``, ``alpha``; ``below``, ``above``: what is positive while the class
        holds (its logit, or its margin over the largest other one), at ``α (1 ∓ STEP)``; ``agrees``: whether the class
        holds at the one and not at the other.
    """
    cut = study.context.cut(run.artifact("classifier"))
    model, site = cut.model, cut.site
    data = study.context.data.dataset("test")
    found = []
    for name, rows in images[images["correct"]].groupby("class", sort=False):
        vector, label = contribution_of(run, str(name)), study.classes.index(str(name))
        for criterion in ("logit", "flip"):
            for k in spread(rows[f"{criterion}_exact"].tolist(), TRIED):
                row = rows.iloc[k]
                alpha = float(row[f"{criterion}_exact"])
                image = data[int(row["image"])][0].to(study.context.device)
                gate = gates(vector, torch.tensor([alpha * (1 - STEP), alpha * (1 + STEP)]))
                logits = edited_outputs(model, site, image, gate).cpu()
                ahead = margins(logits, torch.tensor([label, label])) if criterion == "flip" else logits[:, label]
                below, above = ahead.tolist()
                found.append((name, int(row["image"]), criterion, alpha, below, above, below > 0 >= above))
    columns = ["class", "image", "criterion", "alpha", "below", "above", "agrees"]
    return pd.DataFrame(found, columns=columns)
