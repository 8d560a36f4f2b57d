"""Variants at a matched sparsity, where they have the same L0 or FVE, since λ and k have no common unit.

CSV has every number, Markdown is for people, and the figure shows selectivity against L0, FVE and alignment.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy import ndarray

from experiments.compare import LEVEL_TEXT, intervals, t_interval, with_half
from experiments.figures import class_rows, entry, printed
from experiments.runs import PUBLISHED
from experiments.sae_variants.runs import ORACLE, RANDOM
from salve.report.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, WIDTH, log_axis, new_figure
from salve.report.text import MISSING, is_missing


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
            cells = [with_half(record, name, digits) for _, name, digits in columns]
            against = "" if record["baseline"] == BASELINES[0] else f" (`{record['baseline']}`)"
            missing = is_missing(record["difference"])
            cells.append(MISSING if missing else with_half(record, "difference", signed=True) + against)
            if record["reason"]:
                cells = [record["reason"]] + [MISSING] * len(columns)
            lines.append(_row([record["target"], f"`{record['variant']}`", *cells]))
        lines.append("")
        for record in references[references["data"] == data].to_dict("records"):
            reached, left = with_half(record, "reached", 1), with_half(record, "after")
            lines.append(
                f"{record['reference']}: selectivity {with_half(record, 'selectivity')}; {reached} classes at "
                f"{LEVEL_TEXT} on select, {left} % left of them on test, others' mean change "
                f"{with_half(record, 'drift')}.  "
            )
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


NAME = "sae-variants"
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
TITLES = {"concepts": "Drawn scenes, small ResNet", "imagenette": "Imagenette, ResNet-18"}
#: How the references' lines are drawn.
DASHES = {ORACLE: (0, (5, 2)), RANDOM: (0, (1, 1.5))}
#: The targets of the right-hand panels, with their markers; the table has more.
SHOWN = {"own best": "o", "FVE = 0.85": "s", "L0 = 8": "^"}
FIGURE_WIDTH = 1.2 * WIDTH
#: Settings that explain less are in the table only.
LEAST_FVE = 0.2


@printed
def comparison_figure(runs: pd.DataFrame, table: pd.DataFrame, references: pd.DataFrame) -> Figure:
    """A row per data set: selectivity against L0, FVE and alignment, and at matched points.

    Args:
        runs: see :class:`runs.Found`. table: see :func:`summary`. references: see :func:`reference_summary`.
    """
    names = list(dict.fromkeys(runs["data"]))
    figure = new_figure(FIGURE_WIDTH, 0.9 + 2.8 * len(names))
    grid = figure.subplots(len(names), 4, squeeze=False, gridspec_kw={"width_ratios": (1, 1, 0.8, 1)})
    for row, data in zip(grid, names, strict=True):
        mine = runs[runs["data"] == data]
        lines = references[references["data"] == data]
        useful = mine[mine["fve"] > LEAST_FVE]
        for axes, x in zip(row[:3], ("l0", "fve", "alignment"), strict=True):
            _curves(axes, useful, x) if x != "alignment" else _scatter(axes, useful)
            _references(axes.axhline, lines)
            axes.set_ylim(-5, 102)
        row[0].set(title=TITLES.get(data, data), xlabel="L0 (latents per image)", ylabel="selectivity (points)")
        positive = useful.loc[useful["l0"] > 0, "l0"]
        log_axis(row[0], "x", (positive.min() / 1.2, positive.max() * 1.2))
        row[1].set(xlabel="FVE", xlim=(LEAST_FVE, 1))
        row[1].xaxis.set_major_formatter(PercentFormatter(1.0))
        row[2].set_xlabel("alignment (cosine)")
        _matched(row[3], table[table["data"] == data])
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
        colour, marker = LOOKS[str(variant)]
        looks: Any = {"color": colour, "markersize": 3, "alpha": 0.6, "markeredgewidth": 0}
        axes.plot(mine["alignment"], 100 * mine["selectivity"], marker, **looks)


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
