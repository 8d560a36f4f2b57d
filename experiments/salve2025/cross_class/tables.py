"""The tables: SAEs, latents in use, and the classes under every shared latent."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.experiment import joined
from experiments.runs import Study
from experiments.salve2025.cross_class.roles import (
    ALPHAS,
    FALL,
    FALLS,
    NO_BACKING,
    REDUNDANT,
    RISE,
    RISES,
    STAYS,
    Reading,
    Roles,
    Shared,
    weights,
)
from salve.features import kinds, shares

CHURCH, PUMP, SAW = "church", "gas pump", "chain saw"


class Case(NamedTuple):
    """A shared latent, and the roles on test."""

    reading: Reading
    shared: Shared
    roles: Roles

    @property
    def title(self) -> str:
        """For people."""
        size, sparsity = self.reading.setting
        return f"Latent {self.shared.latent} (d {size}, λ {sparsity:g}, seed {self.reading.run.seed})"

    def classes(self, role: str) -> list[int]:
        """The classes with a role, by how much they change."""
        found = [k for k, name in enumerate(self.roles.roles) if name == role]
        return sorted(found, key=lambda k: -abs(self.roles.change.mean[k]))


def cases_of(study: Study) -> tuple[list[Reading], list[Case]]:
    """All SAEs, and all their shared latents."""
    readings = [Reading.of(study, run) for run in study.runs]
    cases = [Case(one, shared, one.roles(shared)) for one in readings for shared in one.shared]
    return readings, cases


def telling(cases: Sequence[Case], count: int = 3) -> list[Case]:
    """The most telling shared latents, chosen on the select split, so that what test shows was not chosen.

    First come those that drag no other class along, then those that show more of the roles falls, redundant and rises,
    then those that count more for their second class; no two with the same classes.
    """

    def rank(case: Case) -> tuple[bool, int, float]:
        seen = case.reading.roles(case.shared, "select")
        return seen.clean, len({FALLS, REDUNDANT, RISES} & set(seen.roles)), case.shared.second

    chosen: dict[frozenset[int], Case] = {}
    for case in sorted(cases, key=rank, reverse=True):
        chosen.setdefault(frozenset(case.shared.classes), case)
    return list(chosen.values())[:count]


def sae_table(readings: Sequence[Reading], cases: Sequence[Case]) -> pd.DataFrame:
    """One row per SAE: how many latents are of which kind.

    Columns: ``testbed``, ``dictionary_size``, ``sparsity``, ``seed``; ``in_use``: latents that count for some class;
    ``by_share``: cross-class by their shares alone; ``shared``: those that count for two classes and take one of them
    to ``LEVEL`` on select; ``clean``: of these, those that drag no other class along on test; ``falls_redundant``,
    ``falls_rises``: of the clean ones, those with a class that falls and one that is redundant (rises).
    """
    rows = []
    for one in readings:
        mine = [case.roles for case in cases if case.reading is one]
        clean = [set(roles.roles) for roles in mine if roles.clean]
        by_share = kinds(one.means, float(one.run.flat_settings["discover.threshold"])).count("cross-class")
        both = [sum({FALLS, other} <= roles for roles in clean) for other in (REDUNDANT, RISES)]
        counts = {"in_use": len(one.in_use), "by_share": by_share, "shared": len(mine), "clean": len(clean)}
        rows.append(_where(one) | counts | {"falls_redundant": both[0], "falls_rises": both[1]})
    return pd.DataFrame(rows)


def latent_table(readings: Sequence[Reading]) -> pd.DataFrame:
    """One row per latent in use: ``kind``, ``owners``, ``alpha``: strength at which the first is at ``LEVEL`` on
    select (inf if none is); ``fallen``, ``risen``: classes that have then lost ``FALL``, gained ``RISE`` or more on
    test; NaN if none gets there."""
    rows = []
    for one in readings:
        for latent in one.in_use:
            names = [one.study.classes[k] for k in one.owners(latent)]
            alpha = one.alphas[latent]
            row = {"latent": latent, "kind": one.kinds[latent], "owners": "; ".join(names), "alpha": alpha}
            change = one.changes(latent) if math.isfinite(alpha) else None
            fallen, risen = (math.nan,) * 2 if change is None else ((change <= -FALL).sum(), (change >= RISE).sum())
            rows.append({**_where(one), **row, "fallen": float(fallen), "risen": float(risen)})
    return pd.DataFrame(rows)


def class_table(cases: Sequence[Case]) -> pd.DataFrame:
    """One row per shared latent and class.

    Columns: where; ``latent``, ``alpha``, ``clean``; ``class``, ``depends``, ``share``, ``weight``, ``mean``, ``role``;
    ``accuracy``, its ``change`` ± ``half``, what is ``usual``; ``margin`` ± ``margin_half``, in logits; ``gained``:
    images that are right now and were not, ``taken``: the share of these that were taken for a class that depends on
    the latent, ``mistaken``: the same share of all its images that were not right; of
    :class:`experiments.salve2025.cross_class.roles.Backing`: ``own``, ``own_alpha``, ``alone``, ``joint``, ``control``.
    """
    rows = []
    for case in cases:
        one, shared, roles = case
        share, weight = shares(one.means)[:, shared.latent], weights(one.means)[:, shared.latent]
        for k, name in enumerate(one.study.classes):
            backing = roles.backing.get(k, NO_BACKING)
            wrong = (one.study.test.labels == k) & (roles.before != k)
            gained = wrong & (roles.after == k)
            taken, mistaken = (float(np.isin(roles.before[some], shared.classes).mean()) if some.any() else math.nan
                               for some in (gained, wrong))  # fmt: skip
            row = {
                **{**_where(one), "latent": shared.latent, "alpha": shared.alpha, "clean": roles.clean},
                **{"class": name, "depends": k in shared.classes, "share": float(share[k])},
                **{"weight": float(weight[k]), "mean": float(one.means[k, shared.latent])},
                **{"role": roles.roles[k], "accuracy": roles.accuracy[k], "change": roles.change.mean[k]},
                **{"half": roles.change.half[k], "usual": roles.usual[k], "margin": roles.margin.mean[k]},
                **{"margin_half": roles.margin.half[k], "gained": int(gained.sum())},
                **{"taken": taken, "mistaken": mistaken, "own": backing.own, "own_alpha": backing.alpha},
            }
            rows.append(row | {field: getattr(backing, field) for field in ("alone", "joint", "control")})
    return pd.DataFrame(rows)


def curve_table(cases: Sequence[Case]) -> pd.DataFrame:
    """Test accuracy of every class by strength, of the latents in the figure."""
    parts = [pd.DataFrame()]
    for case in cases:
        one, latent = case.reading, case.shared.latent
        curve = pd.DataFrame(one.curves["test"][latent], columns=one.study.classes).assign(alpha=ALPHAS)
        parts.append(curve.melt("alpha", var_name="class", value_name="accuracy").assign(**_where(one), latent=latent))
    return joined(parts)


def _where(one: Reading) -> dict[str, object]:
    size, sparsity = one.setting
    return {"testbed": one.study.testbed.name, "dictionary_size": size, "sparsity": sparsity, "seed": one.run.seed}


def tower_table(study: Study, readings: Sequence[Reading], cases: Sequence[Case]) -> pd.DataFrame:
    """The paper's case by name: one row per SAE; no rows where the data lack its classes.

    Columns: ``depend``: latents on which church and gas pump both depend; ``tower``: of these, those under which gas
    pump falls, church is redundant or stays, and chain saw rises; ``nearest`` latent in use, by ``nearest_share``, the
    smaller of the two classes' shares; ``by_effect``: latents in use under which gas pump loses ``FALL`` or more,
    church changes by less than ``RISE`` and chain saw gains it or more; ``by_effect_defining``: of these, those that
    define gas pump.
    """
    names = [name.lower() for name in study.classes]
    if not {CHURCH, PUMP, SAW} <= set(names):
        return pd.DataFrame()
    church, pump, saw = (names.index(name) for name in (CHURCH, PUMP, SAW))
    rows = []
    for one in readings:
        both = [case for case in cases if case.reading is one and {church, pump} <= set(case.shared.classes)]
        roles = [[case.roles.roles[k] for k in (church, pump, saw)] for case in both]
        tower = [seen for seen in roles if seen[0] in (REDUNDANT, STAYS) and seen[1:] == [FALLS, RISES]]
        share = shares(one.means)[[church, pump]].amin(dim=0)
        nearest = max(one.in_use, key=lambda latent: float(share[latent]))
        alike = []
        for latent in one.in_use:
            change = one.changes(latent) if math.isfinite(one.alphas[latent]) else np.zeros(len(names))
            if change[pump] <= -FALL and abs(change[church]) < RISE and change[saw] >= RISE:
                alike.append(one.kinds[latent] == "class-defining" and one.owners(latent) == [pump])
        row = {**_where(one), "depend": len(both), "tower": len(tower), "nearest": nearest}
        row |= {"nearest_share": float(share[nearest]), "by_effect": len(alike), "by_effect_defining": sum(alike)}
        rows.append(row)
    return pd.DataFrame(rows)
