"""Variants at a matched sparsity, where they have the same L0 or FVE, since λ and k have no common unit.

As tables: CSV with every number, and Markdown for people.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from experiments.compare import CONFIDENCE, LEVEL_TEXT, Interval, intervals, t_interval
from experiments.separation import PUBLISHED
from salve.report.text import MISSING, is_missing, points


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


#: What is compared at each target, besides selectivity.
COMPARED = (
    *("selectivity", "alignment", "reached", "after", "drift", "worst_loss"),
    *("fve", "l0", "downstream_accuracy", "concept_auroc", "separating", "separating_published"),
)
#: The default SAE; and the next of its kind, for an L0 that the default's latents, which are never zero, do not reach.
BASELINES = ("linear_l1", "relu_l1")


def summary(runs: pd.DataFrame, targets: Mapping[str, Sequence[Target]]) -> pd.DataFrame:
    """One row per data set, target and variant: see :func:`compared`.

    Args:
        runs: see :class:`runs.Found`. targets: by data set.
    """
    parts = [
        compared(rows, target, COMPARED, BASELINES).assign(data=data)
        for data, rows in runs.groupby("data", sort=False)
        for target in targets[str(data)]
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[["data", *table.columns.drop("data")]]


def reference_summary(references: pd.DataFrame) -> pd.DataFrame:
    """Mean selectivity, accuracy left, drift and number of classes reached by each reference, with an interval over its
    seeds."""
    rows = []
    for (data, reference), part in references.groupby(["data", "reference"], sort=False):
        by_seed = part.groupby("seed").agg({"selectivity": "mean", "after": "mean", "drift": "mean", "reached": "sum"})
        rows.append({"data": data, "reference": reference, **intervals(dict(by_seed.items()))})
    return pd.DataFrame(rows)


#: The columns of the Markdown table: head, measure, and decimals; in points where there are none.
COLUMNS = (
    ("FVE", "fve", 3),
    ("L0", "l0", 1),
    ("downstream accuracy %", "downstream_accuracy", None),
    ("concept AUROC", "concept_auroc", 3),
    ("alignment", "alignment", 2),
    (f"classes at {LEVEL_TEXT} on select", "reached", 1),
    ("left of them on test %", "after", None),
    ("classes that separate", "separating", 1),
    (PUBLISHED, "separating_published", 1),
    ("others' mean change", "drift", None),
    ("selectivity", "selectivity", None),
)


def markdown(table: pd.DataFrame, references: pd.DataFrame) -> str:
    """A section per data set: the variants at each target, and the references."""
    lines = []
    for data, rows in table.groupby("data", sort=False):
        recovery = rows["concept_auroc"].notna().any()
        columns = [column for column in COLUMNS if recovery or column[1] != "concept_auroc"]
        heads = ["at", "SAE", *(head for head, _, _ in columns), "difference"]
        lines += [f"### {data}", "", _row(heads), _row(["---"] * len(heads))]
        for record in rows.to_dict("records"):
            cells = [_cell(record, name, digits) for _, name, digits in columns]
            against = "" if record["baseline"] == BASELINES[0] else f" (`{record['baseline']}`)"
            missing = is_missing(record["difference"])
            cells.append(MISSING if missing else _cell(record, "difference", signed=True) + against)
            if record["reason"]:
                cells = [record["reason"]] + [MISSING] * len(columns)
            lines.append(_row([record["target"], f"`{record['variant']}`", *cells]))
        lines.append("")
        for record in references[references["data"] == data].to_dict("records"):
            reached, left = _cell(record, "reached", 1), _cell(record, "after")
            lines.append(
                f"{record['reference']}: selectivity {_cell(record, 'selectivity')}; {reached} classes at "
                f"{LEVEL_TEXT} on select, {left} % left of them on test, others' mean change "
                f"{_cell(record, 'drift')}.  "
            )
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(record: dict[str, object], name: str, digits: int | None = None, signed: bool = False) -> str:
    """A mean with its interval."""
    mean, half = record[name], record[f"{name}_half"]
    if digits is None:
        return points(mean, signed) + ("" if is_missing(half) else f" ± {points(half, signed=False)}")
    if is_missing(mean):
        return MISSING
    return f"{mean:.{digits}f}".replace("-", "−") + ("" if is_missing(half) else f" ± {half:.{digits}f}")
