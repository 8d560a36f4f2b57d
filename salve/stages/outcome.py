# SPDX-License-Identifier: MIT
"""The outcome of an edit: choose its strength on select images, and summarise its effect on test images."""

from typing import Any

import numpy as np

from salve.editing.verdict import (
    LIMITS,
    Effect,
    percentile_interval,
    separated,
    separated_as_published,
    takes_away,
    wilson,
)
from salve.report.text import number, percent, points
from salve.stages.curves import Measured
from salve.stages.targets import Target


def choose(select: Effect) -> tuple[int, bool]:
    """Choose the strength of an edit.

    Among the strengths that separate the class, it is the one with the highest selectivity: the class's loss minus the
    others' mean absolute change. (The weakest of them would leave the class at the limit, and above it on other
    images.) If none separates the class, the choice is among those that take it away; if none does, it is the last.

    Args:
        select: on select images, fields ``[K]``.

    Returns:
        The index in the grid, and whether any strength takes the class away.
    """
    selectivity = select.before - select.after - select.mean_change
    for fitting in (separated(select), takes_away(select)):
        if fitting.any():
            return int(np.where(fitting, selectivity, -np.inf).argmax()), True
    return len(select.after) - 1, False


def summarise(
    target: Target,
    measured: Measured,
    at: int,
    reached: bool,
    resampled: Effect,
    images: int,
) -> dict[str, Any]:
    """One row of ``summary.csv``: the effect of the chosen strength on its class and on the others.

    Args:
        target: the edit. measured: its effects at its strengths.
        at, reached: from :func:`choose`.
        resampled: on resampled test images, fields ``[B]``.
        images: number of test images of the edited classes.
    """
    chosen, found = measured.effects["select"].at(at), measured.effects["test"].at(at)
    low, high = wilson(float(found.after) * images, images)
    mean_low, mean_high = percentile_interval(resampled.mean_change, found.mean_change)
    loss_low, loss_high = percentile_interval(resampled.worst_loss, found.worst_loss)
    return {
        "target": target.name,
        "latents": "; ".join(map(str, target.latents)),
        "sign": "; ".join(f"{sign:+d}" for sign in target.signs),
        "kind": "; ".join(target.kinds),
        "alpha": float(measured.alphas[at]) if reached else float("inf"),
        "alpha_used": float(measured.alphas[at]),
        "select_accuracy_before": float(chosen.before),
        "select_accuracy_after": float(chosen.after),
        "select_others_mean_change": float(chosen.mean_change),
        "select_others_worst_loss": float(chosen.worst_loss),
        "select_separates": bool(separated(chosen)),
        "accuracy_before": float(found.before),
        "accuracy_after": float(found.after),
        "accuracy_after_low": float(low),
        "accuracy_after_high": float(high),
        "others_mean_change": float(found.mean_change),
        "others_mean_change_low": float(mean_low),
        "others_mean_change_high": float(mean_high),
        "others_signed_change": float(found.signed_change),
        "others_worst_loss": float(found.worst_loss),
        "others_worst_loss_low": float(loss_low),
        "others_worst_loss_high": float(loss_high),
        "separates": reached and bool(separated(found)),
        "separates_published": reached and bool(separated_as_published(found)),
        "separates_share": float(separated(resampled).mean()) if reached else 0.0,
        "reason": reason(found, float(measured.alphas[at]), reached),
    }


def reason(found: Effect, alpha: float, reached: bool) -> str:
    """Why an edit at its chosen strength does not separate its class; empty if it does."""
    limit = percent(LIMITS.accuracy, 0)
    if np.isnan(found.before):
        return "it has no test images"
    if not found.before > LIMITS.accuracy:
        return f"without any edit its accuracy is only {percent(found.before, 0)}"
    if not found.after <= LIMITS.accuracy:
        if not reached:
            return f"its accuracy is {percent(found.after)} at α = {number(alpha)}, the strongest edit"
        return f"chosen on select to take it to {limit}, this strength leaves {percent(found.after)} on test"
    if not reached:
        return f"no strength takes it to {limit} on select"
    if not found.mean_change < LIMITS.others_mean_change:
        return f"the other classes change by {points(found.mean_change, signed=False)} points in the mean"
    if not found.worst_loss <= LIMITS.others_worst_loss:
        return f"another class loses {points(found.worst_loss, signed=False)} points"
    return ""
