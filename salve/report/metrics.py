# SPDX-License-Identifier: MIT
"""The numbers of a run: what ``metrics.json`` holds and sweeps compare."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from salve.report.grouped import REPAIRED, sets_of, worst_group
from salve.report.tables import class_summary, column, critical, headline, mean_of_known
from salve.report.text import slug, yes_no
from salve.results import Artifacts

#: Prefix of the same numbers measured on select images, by which something may be chosen.
SELECT = "select_"

Metric = float | int | None

#: Measures of the trained SAE, as its record names them.
SAE_MEASURES = (
    *("fve", "cosine", "l0", "dead_fraction", "almost_dead_fraction", "dense_fraction"),
    *("downstream_accuracy", "downstream_kl", "kl_recovered_from_mean", "kl_recovered_from_zero"),
)


def run_metrics(paths: Mapping[str, Path]) -> dict[str, Metric]:
    """The numbers of a run, from what its stages wrote.

    Args:
        paths: kind ("classifier", "activations", "sae", "features", "control", "diagnose") → the folder that its stage
            wrote; kinds that are missing leave their numbers out.

    Returns:
        Plain numbers. None stands for a number that is not finite, which JSON cannot hold.

        Of test images, which report, unless said otherwise:

        - ``test_accuracy``: of the untouched classifier [fraction].
        - Of the SAE: ``fve``, ``cosine``, ``l0`` [latents per image], ``downstream_accuracy`` and, in nats,
          ``downstream_kl``; how much of the ablations' KL it recovers, ``kl_recovered_from_mean`` and ``…_from_zero``.
          On train: ``dead_fraction``, ``almost_dead_fraction``, ``dense_fraction``.
        - ``purity``: mean over the latents that fire (:func:`salve.features.top_purity`, on train).
        - ``concept_auroc``: mean over the concepts of data that know them, each told by its best latent, which train
          chose.
        - ``classes``: targets that are a class. The following are over these: ``separating``: how many do, with its
          interval ``separating_low`` and ``separating_high``, and ``separating_published``, in the published sense;
          ``on_target_drop``: mean of accuracy before − after the edit at the strength that select chose;
          ``off_target_drift``: mean of the other classes' mean absolute change there; ``selectivity``: mean of the
          first minus the second [all fractions]; ``alpha_used_median``: median of that strength.
        - ``alpha_flip_median``: lower median over correctly classified images (None: infinite), and
          ``alpha_flip_infinite``: share of them that no strength flips.
        - Of each evaluation set, such as "pairs": ``pairs_accuracy``; where groups are known ``pairs_worst_group``; and
          of pairs ``pairs_flips``. With ``_edited`` behind it, the mean over the networks that stage ``control``
          edited, and with ``_repaired``, the repaired one's [all fractions].
        - Of a repair: accuracy of the worst group, ``worst_group_before``, ``…_recalibrated`` (biases alone),
          ``…_edited`` (the edit alone) and ``…_after``; ``average_before`` and ``…_after``, weighted by the groups'
          train shares; ``counterfactual_flips_before`` and ``…_after``, pairs whose prediction the mark changes.

        Of select images, by which a search or a reader of a sweep may choose: ``select_accuracy`` and, with the same
        prefix, the SAE's measures that are not of train, ``separating``, ``on_target_drop``, ``off_target_drift`` and
        ``selectivity``.
    """
    found = Artifacts(paths)
    rows = class_summary(found)
    main = headline(found, rows)
    sae = found.record("sae", "sae.json")
    measured = main.test_accuracy
    values: dict[str, Metric] = {
        "test_accuracy": sae.get("original_accuracy") if measured is None else measured,
        "select_accuracy": _select_accuracy(found, sae.get(f"{SELECT}original_accuracy")),
    }
    values |= {prefix + name: sae.get(prefix + name) for name in SAE_MEASURES for prefix in ("", SELECT)}
    for name, table, measure in (("purity", "latents.csv", "purity"), ("concept_auroc", "concepts.csv", "auroc")):
        values[name] = mean_of_known(column(found.table("features", table), measure))
    edits = found.table("control", "summary.csv")
    if "target" in edits:
        edits = edits[edits["target"].isin(rows["class"])]
        values |= {"classes": len(edits), "alpha_used_median": float(column(edits, "alpha_used").median())}
        values |= _effect(edits, "") | _effect(edits, SELECT)
        if f"{SELECT}separates" in edits:
            values[f"{SELECT}separating"] = [yes_no(value) for value in edits[f"{SELECT}separates"]].count("yes")
    if main.verdict is not None:
        values |= {
            "separating": main.verdict.separates,
            "separating_low": main.verdict.low,
            "separating_high": main.verdict.high,
            "separating_published": main.verdict.published,
        }
    known = {name: value for name, value in (values | _flips(found) | _repaired(found)).items() if value is not None}
    return {name: plain(value) for name, value in (_evaluated(found) | known).items()}


def _repaired(found: Artifacts) -> dict[str, Metric]:
    """The network before a repair, with new biases alone, and after it."""
    record = found.record("repair", "repair.json")
    names = [f"worst_group_{state}" for state in ("before", "recalibrated", "edited", "after")]
    names += [f"{name}_{state}" for name in ("average", "counterfactual_flips") for state in ("before", "after")]
    measured: dict[str, Metric] = {name: record.get(name) for name in names}
    if record:
        measured |= {f"{SELECT}worst_group_after": record["select_score"][0]} if record["labels"] else {}
    return measured


def _effect(edits: pd.DataFrame, prefix: str) -> dict[str, Metric]:
    """Mean effect of the edits on the class and on the others, on test or, with the prefix, on select."""
    drop = column(edits, f"{prefix}accuracy_before") - column(edits, f"{prefix}accuracy_after")
    drift = column(edits, f"{prefix}others_mean_change")
    means = {"on_target_drop": drop, "off_target_drift": drift, "selectivity": drop - drift}
    return {prefix + name: mean_of_known(values) for name, values in means.items()}


def _select_accuracy(found: Artifacts, measured: float | None) -> float | None:
    """Of the classifier as it was kept; the best epoch's where nothing has been measured since its training."""
    if measured is not None:
        return measured
    history = found.table("classifier", "history.csv")
    if "split" not in history:
        return None
    return float(column(history[history["split"] == "select"], "accuracy").max())


def _flips(found: Artifacts) -> dict[str, Metric]:
    images = found.table("diagnose", "images.csv")
    if "correct" not in images:
        return {}
    right = images["correct"].map(yes_no) == "yes"
    flips = critical(images[right], "flip").dropna()
    if flips.empty:
        return {}
    # "lower" picks an observed value: between a number and infinity there is none.
    median = flips.quantile(0.5, interpolation="lower")
    return {"alpha_flip_median": float(median), "alpha_flip_infinite": float((flips == math.inf).mean())}


def _evaluated(found: Artifacts) -> dict[str, Metric]:
    """Accuracy, worst group and flips on each evaluation set, of the original and of edited networks."""
    table, values = found.table("evaluation", "evaluation.csv"), dict[str, Metric]()
    if "set" not in table:
        return {}
    for name, mine in sets_of(table).items():
        by_network: dict[str, list[dict[str, float | None]]] = {"": [], "_edited": [], "_repaired": []}
        for target, rows in mine.groupby("target", sort=False):
            (whole,) = rows[(rows["class"] == "") & (rows["attribute_value"] == "")].to_dict("records")
            worst = worst_group(rows)
            kind = "_repaired" if target == REPAIRED else "_edited" if target else ""
            by_network[kind].append(
                {
                    "accuracy": whole["accuracy"],
                    "worst_group": None if worst is None else float(worst["accuracy"]),
                    "flips": whole["flips"],
                }
            )
        for suffix, networks in by_network.items():
            for measure in networks[0] if networks else ():
                mean = mean_of_known(pd.Series([one[measure] for one in networks], dtype=float))
                if mean is not None:
                    values[f"{slug(name)}_{measure}{suffix}"] = mean
    return values


def plain(value: Metric) -> Metric:
    """A plain number; None for one that is not finite, which JSON cannot hold."""
    if isinstance(value, int):
        return int(value)
    return float(value) if value is not None and not pd.isna(value) and math.isfinite(value) else None
