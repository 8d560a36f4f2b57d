"""Experiment 7: the permanent gate against steering and a rank-one edit of the head, at a matched effect.

Pure functions on a classifier's linear reader and cached activations. Every method takes a class to ``LEVEL`` by a
strength of its own, and is judged by what the other classes lose there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.compare import CONFIDENCE, LEVEL, Interval, MatchedEdit, matched_edit, t_interval
from experiments.figures import PRINT_WIDTH
from experiments.sae_variants.references import random_directions
from salve.editing import edited_logits, rank_one_logits, rank_one_rows, steered_logits, strength_curves
from salve.editing.curves import LogitsAt
from salve.report.style import BLACK, BLUE, GREEN, ORANGE, log_axis, new_figure, styled
from salve.types import Activations, Labels

#: Strengths that are tried first: 0, then six to each factor of ten. Units differ by method, so they span all of them.
COARSE = np.concatenate([[0.0], np.geomspace(1e-3, 1e5, 49)])
#: Strengths that are tried between the two of these where the class falls to ``LEVEL``.
FINE = 33
#: What is compared, besides how many classes are reached.
MEASURES = ("selectivity", "drift", "worst", "kl")


class Reader(NamedTuple):
    """What an edit of the last site sees of a classifier.

    Attributes:
        weight: ``[C, M]``. bias: ``[C]``. train, val: activations ``[N, M]`` with labels ``[N]``.
    """

    weight: Float[Tensor, "C M"]
    bias: Float[Tensor, " C"]
    train: tuple[Activations, Labels]
    val: tuple[Activations, Labels]


class Chosen(NamedTuple):
    """The latents through which one SAE edits the classes.

    Attributes:
        columns: their decoder columns ``[C, M]``. signs: that they have for their classes ``[C]``, +1 or −1; 0 for a
            class without a latent.
    """

    columns: Float[Tensor, "C M"]
    signs: Int[Tensor, " C"]


class Method(NamedTuple):
    """One way to take a class away.

    Attributes:
        name: as figure and table show it.
        along: what gives its direction: the class's latent, a random unit vector in its place, or no direction at all
            (the same edit for every SAE).
        edit: from the class and the direction ``[M]`` to the logits at any strengths; None where there is no such edit.
    """

    name: str
    along: Literal["latent", "random", "nothing"]
    edit: Callable[[int, Tensor], LogitsAt | None]


def methods(reader: Reader) -> list[Method]:
    """All methods; the first is the one that the others are compared with."""
    weight, bias = reader.weight, reader.bias
    rows = rank_one_rows(*reader.train, len(weight))

    def suppress(_: int, direction: Tensor) -> LogitsAt:
        return lambda block, strengths: edited_logits(weight, bias, block, direction, strengths)

    def steer(_: int, direction: Tensor) -> LogitsAt:
        return lambda block, strengths: steered_logits(weight, bias, block, direction, strengths)

    def rank_one(k: int, _: Tensor) -> LogitsAt | None:
        if bool(rows[k].isnan().any()):
            return None
        return lambda block, strengths: rank_one_logits(weight, bias, block, rows[k], k, strengths)

    return [
        Method("suppress", "latent", suppress),
        Method("steering", "latent", steer),
        Method("rank-one edit", "nothing", rank_one),
        Method("suppress, random direction", "random", suppress),
        Method("steering, random direction", "random", steer),
    ]


def at_matched_effect(reader: Reader, logits_at: LogitsAt, own: int) -> dict[str, float]:
    """An edit of class ``own`` at the strength that takes its val accuracy to ``LEVEL``.

    Returns:
        The fields of ``MatchedEdit`` (``alpha`` is the strength, in the method's own unit), and ``kl``: from the
        original's predictive distribution, in nats, the mean over the other classes; NaN if not reached.
    """

    def measure(strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = strength_curves(reader.weight, reader.bias, *reader.val, logits_at, torch.from_numpy(strengths))
        return found[0].numpy(), found[1].numpy()

    strengths = COARSE
    accuracy, kl = measure(strengths)
    down = np.flatnonzero(accuracy[:, own] <= LEVEL)
    if len(down) and down[0] > 0:
        low, high = COARSE[down[0] - 1 : down[0] + 1].tolist()
        strengths = np.unique(np.append(0.0, np.linspace(low, high, FINE)))
        accuracy, kl = measure(strengths)
    edit = matched_edit(strengths, accuracy, own)
    others = np.delete(kl, own, axis=1)
    others = others[:, ~np.isnan(others[0])]
    mean = others.mean(axis=1) if others.shape[1] else np.zeros(len(kl))
    return {**edit._asdict(), "kl": float(np.interp(edit.alpha, strengths, mean)) if edit.reached else math.nan}


def compare_methods(reader: Reader, chosen: Mapping[int, Chosen], classes: Sequence[str]) -> pd.DataFrame:
    """Every method's edit of every class.

    Args:
        reader: the classifier. chosen: by SAE seed, which draws the random directions, too. classes: ``C`` names.

    Returns:
        One row per method, seed and class: ``method``, ``seed``, ``class`` and what :func:`at_matched_effect` finds. A
        method without a direction has one seed, the first. A class without a latent (for the rank-one
        edit, without train images) counts as one that no strength reaches.
    """
    no_edit = {**MatchedEdit(False, math.inf, 0.0, math.nan, math.nan, 0.0)._asdict(), "kl": math.nan}
    rows = []
    for method in methods(reader):
        for seed in list(chosen)[: 1 if method.along == "nothing" else None]:
            columns, signs = chosen[seed]
            directions = columns * signs[:, None]
            if method.along == "random":
                directions = random_directions(len(columns), columns.shape[1], seed)
            for k, name in enumerate(classes):
                possible = method.along != "latent" or bool(signs[k])
                logits_at = method.edit(k, directions[k]) if possible else None
                edit = at_matched_effect(reader, logits_at, k) if logits_at else no_edit
                rows.append({"method": method.name, "seed": seed, "class": name, **edit})
    return pd.DataFrame(rows)


def summarise(edits: pd.DataFrame) -> pd.DataFrame:
    """The methods in few numbers: means over classes, with Student's interval over SAE seeds.

    The difference in selectivity to the first method is paired by seed, as both use the same SAE; its intervals hold
    together with ``CONFIDENCE`` for all methods (Bonferroni).

    Args:
        edits: see :func:`compare_methods`.

    Returns:
        One row per method: ``method``, ``seeds``, ``classes`` (that have images), ``reached`` (of these, mean over
        seeds), each of ``MEASURES`` (drift, worst and kl of the classes reached) with ``<measure>_half``, and
        ``difference`` with ``difference_half``. A half is NaN where there is one seed only.
    """
    table = edits[edits["selectivity"].notna()]
    by_seed = {name: _over_classes(mine) for name, mine in table.groupby("method", sort=False)}
    first, *others = by_seed
    rows = []
    for name, mine in by_seed.items():
        row = {"method": name, "seeds": len(mine), "classes": int(table[table["method"] == name]["class"].nunique())}
        for measure in ("reached", *MEASURES):
            row[measure], row[f"{measure}_half"], _ = t_interval(mine[measure])
        difference = Interval(math.nan, math.nan, 0)
        if name != first:
            theirs = mine["selectivity"] if len(mine) > 1 else float(mine["selectivity"].iloc[0])
            difference = t_interval(theirs - by_seed[first]["selectivity"], 1 - (1 - CONFIDENCE) / len(others))
        row |= {"difference": difference.mean, "difference_half": difference.half}
        rows.append(row)
    return pd.DataFrame(rows)


def _over_classes(edits: pd.DataFrame) -> pd.DataFrame:
    """One row per seed; means pass over what is not reached."""
    return edits.groupby("seed").agg({"reached": "sum", **dict.fromkeys(MEASURES, "mean")})


#: By method, its colour and marker; along a random direction the marker is empty.
LOOKS = {
    "suppress": (BLUE, "o"),
    "steering": (ORANGE, "s"),
    "rank-one edit": (GREEN, "D"),
    "suppress, random direction": (BLUE, "o"),
    "steering, random direction": (ORANGE, "s"),
}
#: By measure, the name of its axis and the factor from its own unit to the axis's.
PANELS = {
    "selectivity": ("selectivity (points)", 100),
    "drift": ("others' drift (points)", 100),
    "kl": ("KL of the others (nats)", 1),
}


@styled
def baselines_figure(edits: pd.DataFrame) -> Figure:
    """A row of panels per ground: what each method takes and what it harms, at a matched effect.

    Large markers: mean over classes and SAE seeds, with the interval over seeds; dots: each class, mean over seeds. At
    the right, how many classes the method takes to ``LEVEL``; drift and KL are those of these.

    Args:
        edits: see :func:`compare_methods`, with ``ground``, its title.
    """
    grounds = list(dict.fromkeys(edits["ground"]))
    figure = new_figure(PRINT_WIDTH, 0.5 + 1.8 * len(grounds))
    grid = figure.subplots(len(grounds), len(PANELS), squeeze=False, sharex="col")
    for row, ground in zip(grid, grounds, strict=True):
        mine = edits[edits["ground"] == ground]
        summary = summarise(mine)
        for axes, (measure, (label, unit)) in zip(row, PANELS.items(), strict=True):
            _panel(axes, mine, summary, measure, unit)
            axes.set_yticks(range(len(summary)), summary["method"] if axes is row[0] else [""] * len(summary))
            if ground == grounds[-1]:
                axes.set_xlabel(label)
        row[0].set_title(ground)
        lines = [f"{reached:.3g} of {of}" for reached, of in zip(summary["reached"], summary["classes"], strict=True)]
        for place, line in enumerate(lines):
            row[-1].text(
                1.05, place, line, transform=row[-1].get_yaxis_transform(), fontsize=8, verticalalignment="center"
            )
        row[-1].set_title(f"taken to {100 * LEVEL:.0f} %", loc="right", fontweight="normal", fontsize=8, x=1.3)
    shown = edits.groupby(["ground", "method", "class"])[list(PANELS)].mean()
    for axes, (measure, (_, unit)) in zip(grid[0], PANELS.items(), strict=True):
        if measure == "selectivity":
            axes.set_xticks(range(0, 101, 25))
        elif len(positive := unit * shown[measure][shown[measure] > 0]):
            log_axis(axes, "x", (positive.min() / 1.4, positive.max() * 1.4))
    return figure


def _panel(axes: Axes, edits: pd.DataFrame, summary: pd.DataFrame, measure: str, unit: float) -> None:
    """A measure of every method, one below the other."""
    for place, row in enumerate(summary.to_dict("records")):
        colour, marker = LOOKS[row["method"]]
        by_class = edits[edits["method"] == row["method"]].groupby("class", sort=False)[measure].mean()
        beside = place + np.linspace(-0.25, 0.25, len(by_class))
        axes.plot(unit * by_class, beside, color=colour, alpha=0.6, marker=".", markersize=5, linestyle="", mew=0)
        axes.errorbar(
            unit * row[measure], place, xerr=unit * np.nan_to_num(row[f"{measure}_half"]), color=BLACK,
            markerfacecolor="white" if "random" in row["method"] else colour, marker=marker, markersize=6,
            elinewidth=1.2, capsize=2.5, linestyle="",
        )  # fmt: skip
    axes.set_ylim(len(summary) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
