"""One number per question about a run: what ``metrics.json`` holds and a sweep is compared by."""

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from salve.report.inputs import Artifacts, column
from salve.report.tables import class_summary, headline, mean_of_known
from salve.report.text import yes_no

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
        Plain numbers. None is a number that is not finite, since JSON has no word for it.

        - ``val_accuracy``: of the untouched classifier [fraction].
        - Of the SAE, on val: ``fve``, ``cosine``, ``l0`` [latents per image], ``downstream_accuracy`` and, in nats,
          ``downstream_kl``; how much of the ablations' KL it recovers, ``kl_recovered_from_mean`` and ``…_from_zero``.
          On train: ``dead_fraction``, ``almost_dead_fraction``, ``dense_fraction``.
        - ``purity``: mean over the latents that fire (:func:`salve.features.top_purity`, on train).
        - ``concept_auroc``: mean over the concepts of data that know them, each told by its best latent; chosen on
          train, judged on val.
        - ``classes``: targets that are a class. The following are over these: ``separating``, ``separating_strictly``:
          how many do; ``on_target_drop``: mean of accuracy before − after the edit at the strength it is kept with;
          ``off_target_drift``: mean of the other classes' mean absolute change there; ``selectivity``: mean of the
          first minus the second [all fractions]; ``alpha_used_median``: median of that strength.
        - ``alpha_flip_median``: lower median over correctly classified images (None: infinite), and
          ``alpha_flip_infinite``: share of them that no strength flips.
    """
    found = Artifacts(paths)
    rows = class_summary(found)
    main = headline(found, rows)
    sae = found.record("sae", "sae.json")
    values: dict[str, Metric] = {"val_accuracy": _val_accuracy(found, main.val_accuracy, sae.get("original_accuracy"))}
    values |= {name: sae.get(name) for name in SAE_MEASURES}
    for name, table, measure in (("purity", "latents.csv", "purity"), ("concept_auroc", "concepts.csv", "auroc")):
        values[name] = mean_of_known(column(found.table("features", table), measure))
    edits = found.table("control", "summary.csv")
    if "target" in edits:
        edits = edits[edits["target"].isin(rows["class"])]
        drop = column(edits, "accuracy_before") - column(edits, "accuracy_after")
        drift = column(edits, "others_mean_change")
        values |= {
            "separating": main.separate,
            "separating_strictly": main.strictly,
            "classes": len(edits),
            "on_target_drop": mean_of_known(drop),
            "off_target_drift": mean_of_known(drift),
            "selectivity": mean_of_known(drop - drift),
            "alpha_used_median": float(column(edits, "alpha_used").median()),
        }
    return {name: _plain(value) for name, value in (values | _flips(found)).items() if value is not None}


def _val_accuracy(found: Artifacts, measured: float | None, original: float | None) -> float | None:
    """Of the classifier as it was kept; the best epoch's where nothing has been measured since its training."""
    if measured is not None or original is not None:
        return measured if measured is not None else original
    history = found.table("classifier", "history.csv")
    if "split" not in history:
        return None
    return float(column(history[history["split"] == "val"], "accuracy").max())


def _flips(found: Artifacts) -> dict[str, Metric]:
    images = found.table("diagnose", "images.csv")
    if "flip_exact" not in images:
        return {}
    right = images["correct"].map(yes_no) == "yes"
    flips = column(images[right], "flip_exact").dropna()
    if flips.empty:
        return {}
    # "lower" picks an observed value: between a number and infinity there is none.
    median = flips.quantile(0.5, interpolation="lower")
    return {"alpha_flip_median": float(median), "alpha_flip_infinite": float((flips == math.inf).mean())}


def _plain(value: Metric) -> Metric:
    if isinstance(value, int):
        return int(value)
    return float(value) if value is not None and not pd.isna(value) and math.isfinite(value) else None
