# SPDX-License-Identifier: MIT
"""What came of a repair, in words that all parts of a report share."""

import math
from typing import Any, Literal

from salve.report.text import number, percent, plural, span

#: The states of a network that a repair is told by, with their names.
STATES = {
    "before": "before",
    "recalibrated": "biases alone",
    "edited": "edit alone",
    "after": "repaired",
}
#: The method of a repair that leaves the network as it was.
NOTHING = "nothing"
#: What a repair that edits no latent does, in words.
WITHOUT_LATENTS = {"dfr": "the head trained anew (dfr)", "leace": "the attribute erased (leace)"}

#: ``kept``: select images chose no edit, and the network is as it was; ``unknown``: test images have neither groups nor
#: a mark; ``perhaps``: the worst group gains, but no more than chance would.
Outcome = Literal["kept", "unknown", "helped", "perhaps", "failed"]
#: What the weights are called that a repair has written. Test images decide nothing, so they are written in any case.
WEIGHTS: dict[Outcome, str] = {
    "kept": "Weights, unchanged",
    "unknown": "Edited weights, for you to judge",
    "helped": "Repaired weights",
    "perhaps": "Edited weights, which may not help",
    "failed": "Edited weights, which did not help",
}


def outcome(record: dict[str, Any]) -> Outcome:
    """What test images say of a repair.

    It helped if its worst group is better than that of the untouched network and of new biases alone, by more than
    twice the error of that gain: on few test images less may be chance.

    Args:
        record: the content of ``repair.json``.
    """
    if record.get("method") == NOTHING:
        return "kept"
    if not record.get("attribute"):
        return "unknown"
    after, before = record["worst_group_after"], max(record["worst_group_before"], record["worst_group_recalibrated"])
    spans = [record[f"worst_group_{one}_high"] - record[f"worst_group_{one}_low"] for one in ("before", "after")]
    error = math.hypot(*spans) / 4  # an interval of 95 % is about four standard errors wide
    if after - before > 2 * error:
        return "helped"
    return "perhaps" if after > before else "failed"


def taken_out(record: dict[str, Any]) -> str:
    """What a repair takes out: a value of the attribute, or the suspects that a person named for some classes."""
    name, classes = str(record["suspects"]), record.get("classes", ())
    return f"the suspects of {' and '.join(classes)}" if name == " + ".join(classes) else name


def worst_of(record: dict[str, Any]) -> str:
    """What the worst of is told: groups, or classes where test images have no groups."""
    return "worst group" if record.get("attribute") else "worst class"


def done(record: dict[str, Any]) -> str:
    """What a repair changes, such as "gate of the latents 3, 7 at α = 1, with the bias of ship raised by 0.4 logits";
    empty where the network stays as it was."""
    latents = ", ".join(map(str, record["latents"]))
    what = f"{record['method']} of the {'latent' if len(record['latents']) == 1 else 'latents'} {latents}"
    what = what if latents else WITHOUT_LATENTS.get(record["method"], record["method"])
    biases = " and ".join(
        f"the bias of {name} {'raised' if shift > 0 else 'lowered'} by {number(abs(shift))} logits"
        for name, shift in record["shifts"].items()
        if shift
    )
    at = "" if record["method"] == "dfr" else f" at α = {number(record['alpha'])}"
    return f"{what}{at}, with {biases or 'no bias changed'}" if record["alpha"] else biases


def rough(record: dict[str, Any], most: int | None = None) -> str:
    """A sentence that names the groups of few test images, ``most`` of them; empty if there are none."""
    few = sorted(record.get("small_groups", {}).items(), key=lambda one: one[1])
    if not few:
        return ""
    named = "; ".join(f"{name} ({count})" for name, count in few[:most])
    more = f"; and {len(few) - most} more" if most is not None and len(few) > most else ""
    return f"Groups of few test images, whose accuracy is rough: {named}{more}."


def few_objects(record: dict[str, Any]) -> str:
    """A sentence on how few objects have chosen a repair, of the class that shows the fewest; empty if they suffice."""
    few = sorted(record.get("few_objects", {}).items(), key=lambda one: one[1])
    if not few or not done(record):
        return ""
    name, count = few[0]
    return (
        f"The labelled select images of {name} show only {plural(count, 'object')}: what is better on these may be "
        "worse on others, so label images of more objects."
    )


def verdict(record: dict[str, Any]) -> str:
    """Whether the repair helped on test images, in a sentence or two."""
    found = outcome(record)
    if found == "kept" and not record["labels"]:
        return (
            "The network stays as it was: on select images nothing that was tried within the budget "
            f"(repair.max_accuracy_loss) lowers the probability of {' and '.join(record['classes'])} for the images "
            "that come nearest to it by more than twice the error of that."
        )
    if found == "kept":
        return (
            "The network stays as it was: nothing that was tried within the budget (repair.max_accuracy_loss) is "
            "better on select images by more than chance: the worst group must gain, and the mean over groups more "
            "than twice the error of that gain." + _forgone(record)
        )
    before, alone, after = (percent(record[f"worst_group_{one}"]) for one in ("before", "recalibrated", "after"))
    average = " instead of ".join(percent(record[f"average_{one}"]) for one in ("after", "before"))
    numbers = (
        f"on test images the {worst_of(record)} was right on {before}, on {alone} with new biases alone, and on "
        f"{after} repaired, and the average is {average}"
    )
    if found == "unknown":
        behind = all(record[f"{one}_after"] < record[f"{one}_recalibrated"] for one in ("worst_group", "average"))
        better = " New biases alone do better by both: rather keep those." if behind else ""
        return (
            f"Whether the shortcut is gone cannot be told without groups or a mark on test images: look at the images "
            f"in changed.csv, and judge. By class, {numbers}.{better}"
        )
    paid = ""
    if record["average_before"] - record["average_after"] > record.get("max_accuracy_loss", math.inf):
        paid = " That is more than the budget, which could only be held on select images."
    without = record.get("groups_without_images", ())
    unseen = f" Of {' and '.join(without)} there is no test image: what became of it is not known." if without else ""
    if found == "failed":
        return f"The repair did NOT help: {numbers}. Keep the network as it was.{unseen}{_forgone(record)}"
    if found == "helped":
        return f"The repair helped: {numbers}.{paid}{unseen}{_forgone(record)}"
    reference = "new biases alone" if record["worst_group_recalibrated"] > record["worst_group_before"] else "no repair"
    return (
        f"The repair may have helped: {numbers}. Its gain over {reference} is no more than chance could "
        f"give.{paid}{unseen}{_forgone(record)}"
    )


def _forgone(record: dict[str, Any]) -> str:
    """What a larger budget would have allowed."""
    other = record.get("beyond_budget")
    if not other or not record["labels"]:  # without labels the score is no share of a group
        return ""
    share, chosen = (percent(value) for value in (other["select_score"], record["select_score"][0]))
    return (
        f" Beyond the budget, {other['method']} has {share} of the worst group of select images in place of {chosen}; "
        "a larger repair.max_accuracy_loss allows it."
    )


def state_rows(record: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each state its name, and each measure with its interval as text."""
    measures = ["worst_group", "average", *(["counterfactual_flips"] if record["pairs"] else [])]
    rows = []
    for state, name in STATES.items():
        cells = []
        for measure in measures:
            key = f"{measure}_{state}"
            cells.append((percent(record[key]), span(record[f"{key}_low"], record[f"{key}_high"], percent)))
        rows.append((name, cells))
    return rows
