"""Edits that take a class away, each at the strength where the class is at ``LEVEL``.

Pure functions on tensors and tables. All they read of a classifier is its linear head and cached activations.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from experiments import compare
from salve.editing import ablated_logits, edited_logits, rank_one_logits, rank_one_rows, steered_logits, strength_curves
from salve.editing.curves import LogitsAt
from salve.types import Activations, Labels

#: Strengths that are tried first: 0, then six per factor of ten. They span the units of all methods.
COARSE = np.concatenate([[0.0], np.geomspace(1e-3, 1e5, 49)])
#: Strengths that are then tried between the two where the class falls to ``LEVEL``.
FINE = 33
#: What is compared, besides the number of classes reached.
MEASURES = ("selectivity", "after", "drift", "lost", "worst_loss", "kl")

GATE, STEERING, ABLATION = "gate", "steering", "directional ablation"
RANK_ONE, BIAS = "rank-one edit", "class bias"


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
        directed: it follows a direction, the class's latent or, as its control, a random one; otherwise it is the same
            edit for every SAE.
        edit: from the class and the direction ``[M]`` to the logits at any strengths; None where there is no such edit.
    """

    name: str
    directed: bool
    edit: Callable[[int, Tensor], LogitsAt | None]


def methods(reader: compare.Reader) -> list[Method]:
    """All methods; the first is the one that the others are compared with."""
    tail = reader.tail
    rows = rank_one_rows(*reader.train, len(tail))

    def along(logits: Callable[..., Tensor]) -> Callable[[int, Tensor], LogitsAt]:
        """A method that follows a direction, whichever class it is of."""
        return lambda _, direction: lambda block, strengths: logits(tail, block, direction, strengths)

    def rank_one(k: int, _: Tensor) -> LogitsAt | None:
        if bool(rows[k].isnan().any()):
            return None
        return lambda block, strengths: rank_one_logits(tail, block, rows[k], k, strengths)

    def lower_bias(k: int, _: Tensor) -> LogitsAt:
        own = F.one_hot(torch.tensor(k), len(tail)).to(tail.weight.dtype)
        return lambda block, strengths: tail(block) - strengths.to(own.dtype)[:, None, None] * own  # [K, n, C]

    return [
        Method(GATE, True, along(edited_logits)),
        Method(STEERING, True, along(steered_logits)),
        Method(ABLATION, True, along(ablated_logits)),
        Method(RANK_ONE, False, rank_one),
        Method(BIAS, False, lower_bias),
    ]


def at_matched_effect(reader: compare.Reader, logits_at: LogitsAt | None, own: int) -> dict[str, float]:
    """An edit of class ``own`` on test, at the strength that takes its select accuracy to ``LEVEL``; None is no edit.

    Returns:
        The fields of ``MatchedEdit`` (``alpha`` is the strength, in the method's own unit), and means over the other
        classes, NaN if not reached: ``lost``, the part of ``drift`` that is a loss of accuracy, and ``kl``, from the
        original's predictive distribution, in nats.
    """
    chosen = logits_at or (lambda block, _: reader.tail(block)[None])

    def measure(
        images: tuple[Activations, Labels], strengths: Float[ndarray, " K"]
    ) -> tuple[Float[ndarray, "K C"], Float[ndarray, "K C"]]:
        found = strength_curves(reader.tail, *images, chosen, torch.from_numpy(strengths))
        return found[0].numpy(), found[1].numpy()

    strengths = COARSE if logits_at else COARSE[:1]
    mine = measure(reader.select, strengths)[0][:, own]
    down = np.flatnonzero(mine <= compare.LEVEL)
    if len(down) and down[0] > 0:
        low, high = COARSE[down[0] - 1 : down[0] + 1].tolist()
        strengths = np.unique(np.append(0.0, np.linspace(low, high, FINE)))
        mine = measure(reader.select, strengths)[0][:, own]
    alpha = compare.strength_to(strengths, mine)
    strengths = np.array([0.0, alpha] if math.isfinite(alpha) else [0.0])
    accuracy, kl = measure(reader.test, strengths)
    edit = compare.edit_at(strengths, accuracy, own, alpha)
    found = {"lost": math.nan, "kl": math.nan}
    if edit.reached:
        others = [k for k in range(len(reader.tail)) if k != own and not np.isnan(accuracy[0, k])]
        found["lost"] = float(np.mean([max(0.0, accuracy[0, k] - accuracy[1, k]) for k in others] or [0.0]))
        found["kl"] = float(np.mean([kl[1, k] for k in others] or [0.0]))
    return {**edit._asdict(), **found}


def compare_methods(reader: compare.Reader, chosen: Mapping[int, Chosen], classes: Sequence[str]) -> pd.DataFrame:
    """Every method's edit of every class.

    Args:
        reader: the classifier. chosen: by SAE seed, which draws the random directions, too. classes: ``C`` names.

    Returns:
        One row per method, direction, seed and class: ``method``, ``direction`` (``latent``, ``random`` or ``none``),
        ``seed``, ``class`` and what :func:`at_matched_effect` finds. A method without a direction has one seed, the
        first. A class without a latent (for the rank-one edit, without train images) is one that no strength reaches.
    """
    rows = []
    for method in methods(reader):
        for direction in ("latent", "random") if method.directed else ("none",):
            for seed in list(chosen)[: None if method.directed else 1]:
                columns, signs = chosen[seed]
                along = columns * signs[:, None]
                if direction == "random":
                    along = compare.random_directions(len(columns), columns.shape[1], seed)
                for k, name in enumerate(classes):
                    possible = direction != "latent" or bool(signs[k])
                    edit = at_matched_effect(reader, method.edit(k, along[k]) if possible else None, k)
                    rows.append({"method": method.name, "direction": direction, "seed": seed, "class": name, **edit})
    return pd.DataFrame(rows)


def summarise(edits: pd.DataFrame) -> pd.DataFrame:
    """The methods in few numbers: means over classes, with Student's interval over SAE seeds.

    Differences in selectivity are paired by seed, as both use the same SAE. The intervals of each kind of difference
    hold together with ``CONFIDENCE`` for all methods (Bonferroni).

    Args:
        edits: see :func:`compare_methods`.

    Returns:
        One row per method and direction: ``method``, ``direction``, ``seeds``, ``classes`` (that have images),
        ``reached`` (of these, mean over seeds: those that some strength takes to ``LEVEL`` on select) and each of
        ``MEASURES``, on test (all but selectivity of the classes reached); ``ahead``: how far the gate, along latents,
        is ahead of this method; ``over_random``: how far this method is ahead of itself along random directions. Each
        has its ``<measure>_half``, NaN where there is one seed only.
    """
    table = edits[edits["selectivity"].notna()]
    by_seed = {
        key: mine.groupby("seed").agg({"reached": "sum", **dict.fromkeys(MEASURES, "mean")})  # means pass over NaN
        for key, mine in table.groupby(["method", "direction"], sort=False)
    }
    directed = sum(direction == "latent" for _, direction in by_seed)
    rivals = sum(direction != "random" for _, direction in by_seed) - 1
    rows = []
    for (name, direction), mine in by_seed.items():
        row = {"method": name, "direction": direction, "seeds": len(mine)}
        row["classes"] = int(table[table["method"] == name]["class"].nunique())
        row |= compare.intervals({measure: mine[measure] for measure in ("reached", *MEASURES)})
        rival = name != GATE and direction != "random"
        row |= compare.intervals({"ahead": _ahead(by_seed[GATE, "latent"], mine) if rival else []}, rivals)
        chance = _ahead(mine, by_seed[name, "random"]) if direction == "latent" else []
        rows.append(row | compare.intervals({"over_random": chance}, directed))
    return pd.DataFrame(rows)


def _ahead(mine: pd.DataFrame, theirs: pd.DataFrame) -> pd.Series:
    """The difference in selectivity, seed by seed; what has one seed only is the same for all."""
    other = theirs["selectivity"]
    return mine["selectivity"] - (other if len(other) > 1 else float(other.iloc[0]))
