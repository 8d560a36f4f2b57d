"""The comparison as a table: CSV with every number, and Markdown for people."""

from collections.abc import Mapping, Sequence

import pandas as pd

from experiments.compare import LEVEL_TEXT, t_interval
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
        row: dict[str, object] = {"data": data, "reference": reference}
        for name in by_seed:
            mean, half, _ = t_interval(by_seed[name])
            row |= {name: mean, f"{name}_half": half}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, references: pd.DataFrame) -> str:
    """A section per data set: the variants at each target, and the references."""
    lines = []
    for data, rows in table.groupby("data", sort=False):
        recovery = rows["concept_auroc"].notna().any()
        heads = ["at", "SAE", "FVE", "L0", "downstream accuracy %"]
        heads += ["concept AUROC"] if recovery else []
        heads += ["alignment", f"classes at {LEVEL_TEXT} on select", "left of them on test %", "classes that separate"]
        heads += [PUBLISHED, "others' mean change", "selectivity", "difference"]
        lines += [f"### {data}", "", _row(heads), _row(["---"] * len(heads))]
        for record in rows.to_dict("records"):
            cells = [record["target"], f"`{record['variant']}`"]
            if record["reason"]:
                cells += [record["reason"]] + [MISSING] * (len(heads) - 3)
            else:
                cells += [_interval(record, "fve", 3), _interval(record, "l0", 1)]
                cells += [_points(record, "downstream_accuracy")]
                cells += [_interval(record, "concept_auroc", 3)] if recovery else []
                cells += [
                    _interval(record, "alignment", 2),
                    _interval(record, "reached", 1),
                    _points(record, "after"),
                    _interval(record, "separating", 1),
                    _interval(record, "separating_published", 1),
                    _points(record, "drift"),
                    _points(record, "selectivity"),
                ]
                against = "" if record["baseline"] == BASELINES[0] else f" (`{record['baseline']}`)"
                cells += [
                    MISSING
                    if is_missing(record["difference"])
                    else _points(record, "difference", signed=True) + against
                ]
            lines.append(_row(cells))
        lines.append("")
        for record in references[references["data"] == data].to_dict("records"):
            reached, left = _interval(record, "reached", 1), _points(record, "after")
            lines.append(
                f"{record['reference']}: selectivity {_points(record, 'selectivity')}; {reached} classes at "
                f"{LEVEL_TEXT} on select, {left} % left of them on test, others' mean change "
                f"{_points(record, 'drift')}.  "
            )
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(record: dict[str, object], name: str, digits: int) -> str:
    mean, half = record[name], record[f"{name}_half"]
    if is_missing(mean):
        return MISSING
    return f"{mean:.{digits}f}".replace("-", "−") + ("" if is_missing(half) else f" ± {half:.{digits}f}")


def _points(record: dict[str, object], name: str, signed: bool = False) -> str:
    mean, half = record[name], record[f"{name}_half"]
    return points(mean, signed) + ("" if is_missing(half) else f" ± {points(half, signed=False)}")
