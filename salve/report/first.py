# SPDX-License-Identifier: MIT
"""The first lines of a page: what the network depends on, how sure that is, and what to do next."""

import math
from typing import NamedTuple

import pandas as pd

from salve.report.remarks import CHECKS, misused
from salve.report.repaired import few_objects, outcome, rough, taken_out, worst_of
from salve.report.tables import Headline, column, records
from salve.report.text import count_of, is_missing, label, number, percent, plural, points, span
from salve.results import Artifacts

#: Names in a line, at most.
NAMED = 3


class Line(NamedTuple):
    """One line: the question, and its answer in a sentence or two."""

    question: str
    answer: str


def first_lines(artifacts: Artifacts, main: Headline, rows: pd.DataFrame) -> list[Line]:
    """At most five lines; a line whose stage did not run is left out.

    Args:
        artifacts: of the run. main, rows: of :func:`salve.report.tables.headline` and ``class_summary``.
    """
    if main.test_accuracy is not None and misused(artifacts):
        right = f"it is right on {percent(main.test_accuracy)} of the test images"
        return [
            Line(
                "It depends on", f"what cannot be told: {right}, no better than one that always names the same class."
            ),
            Line("Next", f"before anything else, check {CHECKS}."),
        ]
    answers = {
        "It depends on": _depends(artifacts, main),
        "Most easily lost": _weakest(rows),
        "How sure": _sure(artifacts, main),
        "Not seen here": _unseen(artifacts),
    }
    lines = [Line(question, answer) for question, answer in answers.items() if answer]
    return [*lines, Line("Next", _next(artifacts, main, rows))] if lines else []


def _depends(artifacts: Artifacts, main: Headline) -> str:
    repair, suspects = artifacts.record("repair", "repair.json"), _first_suspects(artifacts)
    if repair:
        found, group = outcome(repair), repair.get("worst_group_of_before", "")
        worst = f"the worst group ({group})" if group else "the worst group"
        before, alone, after = (percent(repair[f"worst_group_{one}"]) for one in ("before", "recalibrated", "after"))
        if found == "kept":
            return (
                f"{taken_out(repair)}, still: nothing that was tried gains enough on select images, so the network "
                f"stays as it was. Of test images, {worst} is right on {before}."
            )
        if found == "unknown":
            return (
                f"{taken_out(repair)}, before the repair, and perhaps still: without groups or a mark, test images "
                "cannot tell."
            )
        if found != "helped":
            return (
                f"{taken_out(repair)}, still: the repair did not help, or no more than chance would. Of test images, "
                f"{worst} was right on {before}. With new biases alone the worst is right on {alone}, and after the "
                f"repair on {after}."
            )
        return (
            f"{taken_out(repair)}, and less so since the repair. Of test images, {worst} was right on {before}; after "
            f"it, the worst is right on {after}."
        )
    if suspects:
        whose = _listed([f"latent {row['latent']} for {label(row['class'], 30)}" for row in suspects])
        return f"perhaps what it should not: images of other classes are pushed towards a class by {whose}."
    if main.verdict is None:
        return ""
    verdict = main.verdict
    what = f"what {verdict.method} takes away" if verdict.method else "one direction of its own"
    if not verdict.separates:
        return f"{what}, for none of {plural(verdict.judged, 'class')}: what takes a class away takes others along."
    some = f"{count_of(verdict.separates)} of {plural(verdict.judged, 'class')}"
    rest = verdict.judged - verdict.separates
    shared = " All of them can be taken away alone." if not rest else " The others share theirs, or need more than one."
    return f"{what}, for {some}: without it the class is gone and the other classes stay.{shared}"


def _weakest(rows: pd.DataFrame) -> str:
    flips = rows.dropna(subset=["alpha_flip_median"]).sort_values("alpha_flip_median", kind="stable")
    if not len(flips) or math.isinf(flips["alpha_flip_median"].iloc[0]):
        return ""
    first, last = flips.iloc[0], flips.iloc[-1]
    return (
        f"{label(first['class'], 30)}: half of its images are lost at α = {number(first['alpha_flip_median'])}; of "
        f"{label(last['class'], 30)} at {number(last['alpha_flip_median'])}."
    )


def _sure(artifacts: Artifacts, main: Headline) -> str:
    repair, audit = artifacts.record("repair", "repair.json"), artifacts.record("audit", "audit.json")
    said = []
    if repair:
        between = span(repair["worst_group_after_low"], repair["worst_group_after_high"], percent)
        when = "" if outcome(repair) == "kept" else " after the repair"
        said.append(f"The {worst_of(repair)}'s accuracy{when} lies in {between} (95\u00a0% interval).")
        said += filter(None, [rough(repair, NAMED), few_objects(repair)])
    elif main.verdict is not None:
        verdict = main.verdict
        of = artifacts.record("control", "verdict.json").get("images_per_class")
        images = "" if not of else f" with {plural(int(of), 'test image')} of the smallest class"
        interval = f"{percent(verdict.confidence, 0)} interval"
        said.append(f"{verdict.range} of {plural(verdict.judged, 'class')} separate ({interval}){images}.")
    if audit:
        labelled = audit.get("labelled")
        said.append(
            f"Suspects were ranked on {plural(labelled, 'labelled image')}."
            if labelled
            else "Suspects were ranked without labels."
        )
    return " ".join([*said, "It is one network and one SAE: other seeds may differ."]) if said else ""


def _unseen(artifacts: Artifacts) -> str:
    record = artifacts.record("sae", "sae.json")
    if is_missing(record.get("fve")):
        return ""
    kept, before = record.get("downstream_accuracy"), record.get("original_accuracy")
    text = f"the latents explain {percent(record['fve'], 0)} of the activations' variance"
    if not is_missing(kept) and not is_missing(before):
        text += f", on which the network is right on {percent(kept)} instead of {percent(before)}"
    return text + "; what they leave out is not judged."


def _next(artifacts: Artifacts, main: Headline, rows: pd.DataFrame) -> str:
    if repair := artifacts.record("repair", "repair.json"):
        if outcome(repair) == "unknown":
            return (
                "look at the test images whose prediction changes (changed.csv), and judge; or give test images groups."
            )
        if outcome(repair) != "helped":
            return (
                "keep the network as it was; label more images of each group (audit.labels), or try another site "
                "(layer=)."
            )
        gain = repair["worst_group_after"] - max(repair["worst_group_before"], repair["worst_group_recalibrated"])
        return (
            f"look at the price, an average of {percent(repair['average_after'])} instead of "
            f"{percent(repair['average_before'])}. If that is worth it, take repaired.safetensors: its worst group is "
            f"{points(gain, signed=False)} points above the better of no change and new biases alone."
        )
    suspects = _first_suspects(artifacts)
    if suspects:
        first = suspects[0]
        return (
            f"look at the images of latent {first['latent']}. If {label(first['class'], 30)} should not depend on it: "
            "salve repair, with the options of this run."
        )
    failing = [str(row["class"]) for row in records(rows) if row["separates"] == "False"]
    if main.verdict is not None and failing:
        names = _listed([label(name, 30) for name in failing])
        return f"see in the explorer what goes along with {names}; try another SAE (sae=topk) or another site (layer=)."
    if main.verdict is not None:
        return (
            "ask whether it depends on what it should not: salve stages=[audit,report], with the options of this run."
        )
    return "measure what edits do: salve stages=[control,diagnose,report], with the options of this run."


def _first_suspects(artifacts: Artifacts) -> list[dict[str, object]]:
    """The first suspect of each class, those with the highest scores first."""
    table = artifacts.table("audit", "suspects.csv")
    if not {"class", "latent", "rank", "score"} <= set(table.columns):
        return []
    first = table[(column(table, "rank") == 1) & (column(table, "score") > 0)]
    return records(first.sort_values("score", ascending=False, kind="stable"))


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {count_of(more)} more" if more > 0 else "")
