"""Compare SAEs at a matched sparsity: where they have the same L0 or FVE, since λ and k have no common unit."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from experiments.compare import CONFIDENCE, Interval, intervals, t_interval


def at_target(x: Float[ndarray, " n"], values: Float[ndarray, "n m"], target: float) -> Float[ndarray, " m"]:
    """Values where ``x`` is ``target``, linear between the two neighbours by ``x``.

    Returns:
        ``[m]``; NaN if the target lies outside of the range of ``x``: nothing is extrapolated.
    """
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

    Args:
        runs: one row per run, with ``variant``, ``knob`` (λ or k), ``seed``, ``select_l0``, ``select_fve``,
            ``select_selectivity`` and the measures.

    Returns:
        One row per variant and seed: ``variant``, ``seed``, the measures (all NaN if the seed's runs do not reach the
        target), and for ``best`` the ``knob``.
    """
    if target.by == "best":
        return _best(runs, measures)
    rows = []
    for (variant, seed), one in runs.groupby(["variant", "seed"], sort=False):
        x, values = one[f"select_{target.by}"].to_numpy(float), one[list(measures)].to_numpy(float)
        found = at_target(x, values, target.value)
        rows.append({"variant": variant, "seed": seed, **dict(zip(measures, found, strict=True))})
    return pd.DataFrame(rows)


def _best(runs: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    rows = []
    for variant, mine in runs.groupby("variant", sort=False):
        for seed, one in mine.groupby("seed", sort=False):
            others = mine[mine["seed"] != seed]
            judges = others if len(others) else one
            knob = judges.groupby("knob")["select_selectivity"].mean().idxmax()
            [row] = one[one["knob"] == knob].to_dict("records")
            rows.append({"variant": variant, "seed": seed, "knob": knob, **{name: row[name] for name in measures}})
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
        difference = Interval(math.nan, math.nan, 0)
        if reached and baseline and variant != baseline:
            pairs = by_seed[variant] - by_seed[baseline]
            difference = t_interval(pairs, 1 - (1 - CONFIDENCE) / others)
        row |= {"baseline": baseline, "difference": difference.mean, "difference_half": difference.half}
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
