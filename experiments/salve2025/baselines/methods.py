"""Edits that take a class away, each at the strength where the class is at ``LEVEL``.

Pure functions on tensors and tables. All they read of a classifier is its linear head and cached activations. Edits are
fitted by :mod:`salve.editing.methods`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from experiments import compare
from salve.backbones.cut import Cut
from salve.backbones.site import Reader, Site
from salve.backbones.tail import LinearTail
from salve.editing import edited_logits, strength_curves
from salve.editing.curves import LogitsAt
from salve.editing.methods import Fitting, Method, Target, make_method
from salve.editing.methods.base import changed_head
from salve.editing.methods.directions import directions
from salve.editing.methods.gate import GateEdit
from salve.sae import SAE, make_sae
from salve.types import Activations, Labels, UserError

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


class Rival(NamedTuple):
    """One way to take a class away.

    Attributes:
        name: as figure and table show it.
        method: fits the edit. One that uses the SAE follows a direction, the class's latent or, as its control, a
            random one; the others are the same edit for every SAE.
        unit: how large the edit is at full size (α = 1), in the method's own unit, in which strengths are given.
    """

    name: str
    method: Method
    unit: Callable[[Fitting, Target], float] = lambda _, __: 1.0


def steered_by(fitting: Fitting, target: Target) -> float:
    """How far steering at full size moves activations against the direction; negative where it moves them along it."""
    (direction,) = directions(fitting, target, "latent", STEERING)
    return float(fitting.own_mean(target) @ direction.double())


#: All that is compared; the first is what the others are compared with. Strengths of steering have the unit of the
#: activations, and those of the last two are logits.
RIVALS = (
    Rival(GATE, make_method("gate")),
    Rival(STEERING, make_method("steering"), steered_by),
    Rival(ABLATION, make_method("ablation")),
    Rival(RANK_ONE, make_method("rank_one"), Fitting.lead),
    Rival(BIAS, make_method("head_bias"), Fitting.lead),
)


def fitting_of(reader: compare.Reader) -> Fitting:
    """What edits are fitted on: the train split, and a network in float64 that is the head alone."""
    tail = reader.tail.to(reader.tail.weight.double())
    classes, width = tail.weight.shape
    network = nn.Sequential(nn.Linear(width, classes, dtype=torch.float64)).requires_grad_(False)
    network.load_state_dict({"0.weight": tail.weight, "0.bias": tail.bias})
    cut = Cut(network, Site("last", (Reader("0.weight"),), width), torch.arange(classes))
    activations, labels = reader.train
    return Fitting(cut, activations.double(), labels, classes)


def dictionary(columns: Float[Tensor, "C M"]) -> SAE:
    """An SAE with the given directions as the columns of its decoder, one latent each."""
    sae = make_sae("linear_l1", columns.shape[1], len(columns), torch.Generator())
    sae.decoder = nn.Parameter(columns.T, requires_grad=False)
    return sae


def logits_of(rival: Rival, tail: LinearTail, fitting: Fitting, target: Target) -> LogitsAt | None:
    """The logits that an edit gives at any strengths; None where there is no such edit.

    Behind the head all edits but the gate move a logit along a straight line, ``y(s) = y − s v``. So all strengths
    share ``y`` and ``v``, and the edit at α = 1 gives ``v``.

    Args:
        tail: the head. fitting: see :func:`fitting_of`; with a :func:`dictionary` if the method follows a direction.
        target: the class, and its latent in the dictionary.

    Raises:
        ValueError: the edit is not linear in its strength.
    """
    try:
        edit = rival.method.fit(fitting, target)
    except UserError:  # such as a class without train images
        return None
    if isinstance(edit, GateEdit):
        return lambda block, strengths: edited_logits(tail, block, edit.contributions, strengths)

    def moved_at(alpha: float) -> tuple[Tensor, Tensor]:
        """By how much the edit lowers weights and biases of the head."""
        change = edit.at(alpha).weights
        head = fitting.cut.linear
        assert change is not None
        assert head is not None
        changed = changed_head(fitting.cut, change())
        return head.weight - changed.weight, head.bias - changed.bias

    weight, bias = moved_at(1.0)
    if not all(torch.allclose(2 * one, two) for one, two in zip((weight, bias), moved_at(2.0), strict=True)):
        raise ValueError(f"{rival.name} is not linear in its strength.")
    unit = rival.unit(fitting, target) or 1.0  # steering of unit 0 changes nothing at all
    slope = LinearTail(weight / unit, bias / unit).to(tail.weight)
    constant = not bool(slope.weight.any())  # in all images

    def logits_at(block: Tensor, strengths: Tensor) -> Tensor:
        level = tail(block)
        falls = slope.bias if constant else slope(block)  # [C] or [n, C]
        return torch.addcmul(level, strengths.to(level)[:, None, None], falls, value=-1)  # [K, n, C]

    return logits_at


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
        first. A class without a latent, or without the train images that a method needs, is one that no strength
        reaches.
    """
    rows, fitting = [], fitting_of(reader)
    for rival in RIVALS:
        directed = rival.method.needs_sae
        for direction in ("latent", "random") if directed else ("none",):
            for seed in list(chosen)[: None if directed else 1]:
                columns, signs = chosen[seed]
                if direction == "random":
                    columns = compare.random_directions(len(columns), columns.shape[1], seed)
                if direction != "latent":
                    signs = torch.ones_like(signs)
                seeded = fitting.with_sae(dictionary(columns) if directed else None, seed)
                for k, name in enumerate(classes):
                    target = Target(name, (k,), (k,), (int(signs[k]),), (direction,))
                    logits_at = logits_of(rival, reader.tail, seeded, target) if signs[k] else None
                    edit = at_matched_effect(reader, logits_at, k)
                    rows.append({"method": rival.name, "direction": direction, "seed": seed, "class": name, **edit})
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
