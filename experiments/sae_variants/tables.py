"""The comparison as a table: CSV with every number, and Markdown for people."""

from collections.abc import Mapping, Sequence

import pandas as pd

from experiments.compare import LEVEL_TEXT, intervals
from experiments.sae_variants.compare import Target, compared
from experiments.separation import PUBLISHED
from salve.report.text import MISSING, is_missing, points

#: What is compared at each target, besides selectivity.
COMPARED = (
    *("selectivity", "alignment", "reached", "after", "drift", "worst_loss"),
    *("fve", "l0", "downstream_accuracy", "concept_auroc", "separating", "separating_published"),
)
#: The default SAE; and the next of its kind, for an L0 that the default's latents, which are never zero, do not reach.
BASELINES = ("linear_l1", "relu_l1")


def summary(runs: pd.DataFrame, targets: Mapping[str, Sequence[Target]]) -> pd.DataFrame:
    """One row per data set, target and variant: see :func:`compare.compared`.

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
