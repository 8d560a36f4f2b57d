"""What the runs of all variants found, and variants at a matched sparsity, since λ and k have no common unit.

Beside them stand edits without an SAE: along random directions, and along the classes' own directions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.compare import intervals, matched_edit, random_directions
from experiments.runs import SAERun, Study, edits_by_class
from salve.editing.curves import edit_curves
from salve.types import Activations, Labels

RANDOM, ORACLE = "random direction", "class direction"

#: Variants that λ makes sparse, and those that k does.
PRICED, BUDGETED = ("linear_l1", "relu_l1", "gated", "jumprelu"), ("topk", "batch_topk", "matryoshka")
#: Metrics of a run that are compared; by the last two runs are matched or chosen.
MEASURES = (
    *("fve", "l0", "dead_fraction", "downstream_accuracy", "concept_auroc"),
    *("separating", "separating_published", "select_fve", "select_l0"),
)
#: Measures of a run's edits: their means over classes.
MEANS = ("selectivity", "select_selectivity", "after", "drift", "worst_loss", "alignment")
#: What is compared at each target, besides selectivity.
COMPARED = (
    *("selectivity", "alignment", "reached", "after", "drift", "worst_loss"),
    *("fve", "l0", "downstream_accuracy", "concept_auroc", "separating", "separating_published"),
)
#: The default SAE; and the next of its kind, for an L0 that the default's latents, which are never zero, do not reach.
BASELINES = ("linear_l1", "relu_l1")


def class_directions(weight: Float[Tensor, "C M"], activations: Activations, labels: Labels) -> Float[Tensor, "C M"]:
    """Each class's evidence by channel, ``mean_{n ∈ k}(w_k ⊙ a_n)``, at unit norm ``[C, M]`` (docs/method.md).

    It reads the classifier's own weights and labels, which an SAE does not see.
    """
    means = torch.stack([activations[labels == k].mean(dim=0) for k in range(len(weight))])  # [C, M]
    return torch.nn.functional.normalize(weight * means, dim=1)


def alignment(columns: Float[Tensor, "C M"], directions: Float[Tensor, "C M"]) -> Float[Tensor, " C"]:
    """How well the gate of each class's latent covers the class: the cosine of ``|c_k|`` and ``|direction_k|``, 0 … 1.

    The gate acts by ``|c|``, so signs do not count. At 1 the edit closes channels as the class direction would.
    """
    return torch.nn.functional.cosine_similarity(columns.abs(), directions.abs(), dim=1)


def references_of(study: Study) -> pd.DataFrame:
    """The edits of every class along a random direction (one for each class and SAE seed) and along its own direction.

    Returns:
        One row per reference, seed and class: ``reference``, ``seed``, ``class``, the fields of ``MatchedEdit`` and
        ``testbed``. The train split gives the class directions.
    """
    tail, train, select, test = study.reader
    alphas = torch.tensor(study.runs[0].flat_settings["edit.alpha"], dtype=torch.float32)
    seeds = sorted({run.seed for run in study.runs})
    drawn = [(RANDOM, seed, random_directions(len(tail), tail.weight.shape[1], seed)) for seed in seeds]
    rows = []
    for reference, seed, directions in [*drawn, (ORACLE, 0, class_directions(tail.weight, *train))]:
        for k, name in enumerate(study.classes):
            chosen, found = (edit_curves(tail, *on, directions[k], alphas)[0].numpy() for on in (select, test))
            edit = matched_edit(alphas.numpy(), chosen, found, k)
            rows.append({"reference": reference, "seed": seed, "class": name, **edit._asdict()})
    return pd.DataFrame(rows).assign(testbed=study.testbed.name)


def knob_of(run: SAERun) -> float:
    """The setting that makes the run's variant sparse: λ or k."""
    return float(run.flat_settings["sae.sparsity" if run.flat_settings["sae.variant"] in PRICED else "sae.k"])


def edits_of(study: Study) -> pd.DataFrame:
    """One row per run and class: ``testbed``, ``variant``, ``knob``, ``seed``, ``run`` (its key), ``class``, its
    ``alignment`` (NaN for a class without a latent), and what :func:`experiments.runs.edits_by_class` tells."""
    own = class_directions(study.tail.weight, *study.reader.train)
    parts = []
    for run in _in_order(study):
        latents = torch.tensor(run.selected["latent"].fillna(-1).to_numpy(int))
        found = alignment(run.sae.decoder[:, latents.clamp_min(0)].T, own)
        edits = edits_by_class(run, study.classes)
        parts.append(edits.assign(alignment=torch.where(latents >= 0, found, torch.nan).tolist(), **_where(study, run)))
    return pd.concat(parts, ignore_index=True)


def runs_of(study: Study, edits: pd.DataFrame) -> pd.DataFrame:
    """One row per run: ``testbed``, ``variant``, ``knob``, ``seed``, ``run``, ``MEASURES``; over its classes the mean
    of each of ``MEANS`` (``after``, ``drift``, ``worst_loss``: of those reached), ``reached`` and ``classes``."""
    rows = []
    for run in _in_order(study):
        # A class without images does not count.
        known = edits[(edits["run"] == run.key) & edits["selectivity"].notna()]
        measures = {name: run.metrics.get(name) for name in MEASURES}
        counts = {"reached": int(known["reached"].sum()), "classes": len(known)}
        rows.append({**_where(study, run), **measures, **known[list(MEANS)].mean(), **counts})
    return pd.DataFrame(rows).astype(dict.fromkeys(MEASURES, float))


def _in_order(study: Study) -> list[SAERun]:
    """The runs by variant, knob and seed."""
    order = (*PRICED, *BUDGETED)
    return sorted(study.runs, key=lambda run: (order.index(run.flat_settings["sae.variant"]), knob_of(run), run.seed))


def _where(study: Study, run: SAERun) -> dict[str, object]:
    what = {"variant": run.flat_settings["sae.variant"], "knob": knob_of(run), "seed": run.seed, "run": run.key}
    return {"testbed": study.testbed.name, **what}


def at_target(x: Float[np.ndarray, " n"], values: Float[np.ndarray, "n m"], target: float) -> Float[np.ndarray, " m"]:
    """Values where ``x`` is ``target``, linear between the two neighbours by ``x``; NaN if the target lies outside of
    the range of ``x``: nothing is extrapolated."""
    known = ~np.isnan(x)
    x, values = x[known], values[known]
    order = np.argsort(x, kind="stable")
    x, values = x[order], values[order]
    if not len(x) or not x[0] <= target <= x[-1]:
        return np.full(values.shape[1], np.nan)
    return np.array([np.interp(target, x, column) for column in values.T])


class Target(NamedTuple):
    """What SAEs have in common on select: ``l0`` or ``fve`` at a value; or ``best``, each variant's best setting."""

    by: str
    value: float = math.nan

    @property
    def label(self) -> str:
        """``L0 = 8``, ``FVE = 0.85``, ``own best``."""
        return "own best" if self.by == "best" else f"{self.by.upper()} = {self.value:g}"


def matched(runs: pd.DataFrame, target: Target, measures: Sequence[str]) -> pd.DataFrame:
    """Each SAE seed of each variant at a target.

    Select matches and chooses settings; the measures are of test. For ``best``, a seed takes the setting at which the
    variant's *other* seeds have the highest mean selectivity on select, so an SAE is judged neither on the images that
    chose its setting nor by its own luck.

    Returns:
        One row per variant and seed: ``variant``, ``seed``, the measures (all NaN if the seed's runs do not reach the
        target), and for ``best`` the ``knob``.
    """
    rows = []
    for (variant, seed), one in runs.groupby(["variant", "seed"], sort=False):
        row = {"variant": variant, "seed": seed}
        if target.by == "best":
            others = runs[(runs["variant"] == variant) & (runs["seed"] != seed)]
            judges = others if len(others) else one
            row["knob"] = judges.groupby("knob")["select_selectivity"].mean().idxmax()
            [found] = one.loc[one["knob"] == row["knob"], list(measures)].to_numpy()
        else:
            x, values = one[f"select_{target.by}"].to_numpy(float), one[list(measures)].to_numpy(float)
            found = at_target(x, values, target.value)
        rows.append(row | dict(zip(measures, found, strict=True)))
    return pd.DataFrame(rows)


def compared(runs: pd.DataFrame, target: Target, measures: Sequence[str], baselines: Sequence[str]) -> pd.DataFrame:
    """All variants at a target, each with its difference to a baseline.

    The difference in selectivity is taken seed by seed (a seed is the same initial weights and order of rows wherever
    shapes agree); its intervals hold together with ``CONFIDENCE`` for all variants that are compared (Bonferroni).

    Args:
        runs, target, measures: see :func:`matched`. baselines: the first that reaches the target is the baseline.

    Returns:
        One row per variant in the order of ``runs``: ``target``, ``variant``, ``seeds`` (that reach the target), and
        for each measure ``<measure>`` and ``<measure>_half``; ``baseline``, ``difference`` and ``difference_half``. A
        variant of which some seed does not reach the target has NaN, and says in ``reason`` what it covers.
    """
    found = matched(runs, target, measures)
    variants = list(dict.fromkeys(runs["variant"]))
    by_seed = {name: rows.set_index("seed")["selectivity"] for name, rows in found.groupby("variant")}
    whole = [name for name in variants if not by_seed[name].isna().any()]
    baseline = next((name for name in baselines if name in whole), "")
    others = max(1, len([name for name in whole if name != baseline]))
    rows = []
    for variant in variants:
        mine = found[found["variant"] == variant]
        row = {"target": target.label, "variant": variant, "seeds": int(mine["selectivity"].notna().sum())}
        reached = variant in whole
        row |= intervals({name: mine[name] if reached else [] for name in measures})
        told_apart = reached and baseline and variant != baseline
        pairs = by_seed[variant] - by_seed[baseline] if told_apart else []
        row |= {"baseline": baseline} | intervals({"difference": pairs}, others)
        row["reason"] = "" if reached else _out_of_reach(runs[runs["variant"] == variant], target, row["seeds"])
        rows.append(row)
    return pd.DataFrame(rows)


def _out_of_reach(runs: pd.DataFrame, target: Target, reaching: int) -> str:
    """The range that all seeds of a variant cover, in words."""
    if target.by == "best":
        return "no class to edit"
    ends = runs.groupby("seed")[f"select_{target.by}"].agg(["min", "max"])
    seeds = f", {reaching} of {len(ends)} seeds" if reaching else ""
    return f"{target.by.upper()} {ends['min'].max():.3g} to {ends['max'].min():.3g}{seeds}"


def summary(runs: pd.DataFrame, targets: Sequence[Target]) -> pd.DataFrame:
    """A testbed's variants at each target: see :func:`compared`; ``runs`` as of :func:`runs_of`."""
    table = pd.concat([compared(runs, target, COMPARED, BASELINES) for target in targets], ignore_index=True)
    table.insert(0, "testbed", runs["testbed"].iloc[0])
    return table


def reference_summary(references: pd.DataFrame) -> pd.DataFrame:
    """Mean selectivity, accuracy left, drift and number of classes reached by each reference, with an interval over its
    seeds."""
    rows = []
    for (testbed, reference), part in references.groupby(["testbed", "reference"], sort=False):
        by_seed = part.groupby("seed").agg({"selectivity": "mean", "after": "mean", "drift": "mean", "reached": "sum"})
        rows.append({"testbed": testbed, "reference": reference, **intervals(dict(by_seed.items()))})
    return pd.DataFrame(rows)
