"""What the classes of a testbed share: latents, and the harm that one class's edit does to others.

No measure here grows with the number of classes by itself. A share of the sum over all classes would: the small means
of a hundred classes add up to more than those of ten.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from experiments.compare import MatchedEdit, accuracy_at, t_interval
from experiments.experiment import joined
from experiments.runs import SENSES, SAERun, Study, suppressed
from salve.data.cifar100 import Cifar100Data
from salve.features import shares

#: A class is a companion on another's latent if its mean there is at least this part of that class's.
COMPANION = 0.5
#: A class falls with an edited one if it loses at least this part of its accuracy.
FALLS = 0.5
KINDS = ("class-defining", "cross-class", "diffuse")


def companions(means: Float[np.ndarray, "C d"], latents: Int[np.ndarray, " C"]) -> Bool[np.ndarray, "C C"]:
    """Who shares the latent through which a class is edited: entry ``(k, m)`` is ``|μ_ml| ≥ COMPANION · |μ_kl|``,
    ``m ≠ k``, for the latent ``l`` of class ``k``; −1 for a class without a latent, which has no companions."""
    size = np.abs(np.nan_to_num(means))[:, latents].T  # [C edited, C]
    own = np.diagonal(size)[:, None]
    return (size >= COMPANION * own) & (own > 0) & (latents >= 0)[:, None] & ~np.eye(len(means), dtype=bool)


def chosen_by(latents: Int[np.ndarray, " C"]) -> Int[np.ndarray, " C"]:
    """How many classes are edited through the latent of each class: 1 where it is its own alone; 0 for −1."""
    return (latents[:, None] == latents[None]).sum(axis=1) * (latents >= 0)


def jaccard(has: Bool[np.ndarray, "C d"]) -> Float[np.ndarray, "C C"]:
    """``|a ∩ b| / |a ∪ b|`` of the sets of two classes, such as their dominant latents; NaN where both are empty."""
    sets = has.astype(float)
    both, count = sets @ sets.T, sets.sum(axis=1)
    either = count[:, None] + count[None] - both
    return np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)


def falling(change: Float[np.ndarray, "C C"], before: Float[np.ndarray, " C"]) -> Bool[np.ndarray, "C C"]:
    """Who falls with whom: entry ``(k, m)`` says that editing ``k`` takes ``FALLS`` of the accuracy that ``m`` had.

    Args:
        change: row ``k`` is that of every class's accuracy when ``k`` is edited. before: accuracy without an edit.
    """
    lost = np.nan_to_num(-change) >= FALLS * before[None]
    return lost & (before > 0)[None] & ~np.eye(len(change), dtype=bool)


def loses_most(change: Float[np.ndarray, "C C"]) -> Bool[np.ndarray, "C C"]:
    """For each edited class (row) the other classes that lose most: several if they lose the same, none if nothing
    is lost."""
    others = np.where(np.eye(len(change), dtype=bool) | np.isnan(change), 0.0, change)
    least = others.min(axis=1, keepdims=True)
    return (others == least) & (least < 0)


def siblings(groups: list[str]) -> Bool[np.ndarray, "C C"]:
    """Which pairs of different classes are of the same superclass."""
    names = np.array(groups)
    return (names[:, None] == names[None]) & ~np.eye(len(names), dtype=bool)


class Kinship(NamedTuple):
    """Do edits harm a class's siblings?

    Attributes:
        edits: those that take something from another class. share: of them, where the class that loses most is a
            sibling; an edit under which several lose the same counts in part. chance: that share if any other class
            were as likely; both NaN without edits.
    """

    edits: int
    share: float
    chance: float


def kinship(most: Bool[np.ndarray, "C C"], kin: Bool[np.ndarray, "C C"]) -> Kinship:
    """See :class:`Kinship`; ``most`` is :func:`loses_most`, ``kin`` is :func:`siblings`."""
    edited = np.flatnonzero(most.any(axis=1))
    if not len(edited):
        return Kinship(0, np.nan, np.nan)
    chance = kin[edited].sum(axis=1) / (len(kin) - 1)
    share = (most & kin)[edited].sum(axis=1) / most[edited].sum(axis=1)
    return Kinship(len(edited), float(share.mean()), float(chance.mean()))


@dataclass(frozen=True)
class Survey:
    """What was found on a testbed.

    Attributes:
        groups: the superclass of each class, where the data know one. classes: a row for each SAE and class.
        change: by SAE, edited class and other class, the change of test accuracy where the edited class is at ``LEVEL``
            on select; NaN where it cannot be taken there. overlap: of two classes' dominant latents. companion: see
            :func:`companions`. falls: see :func:`falling`.
        usage: a row for each SAE, what its latents are.
    """

    study: Study
    groups: tuple[str, ...] | None
    classes: pd.DataFrame
    change: Float[np.ndarray, "S C C"]
    overlap: Float[np.ndarray, "S C C"]
    companion: Bool[np.ndarray, "S C C"]
    falls: Bool[np.ndarray, "S C C"]
    usage: pd.DataFrame

    @cached_property
    def kin(self) -> Bool[np.ndarray, "C C"]:
        """Pairs of one superclass; none where there are no superclasses."""
        return siblings(list(self.groups or self.study.classes))

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row for each SAE: means over its classes, counts of latents, and how siblings fare."""
        rows = []
        for place, (seed, own) in enumerate(self.classes.groupby("seed")):
            reached = own[own["reached"]]
            kin = kinship(loses_most(self.change[place]), self.kin) if self.groups else Kinship(0, np.nan, np.nan)
            pairs = ~np.eye(len(self.study.classes), dtype=bool)
            row = {
                **{"testbed": self.study.testbed.name, "seed": seed, "classes": len(own)},
                **{name: own[name].mean() for name in (*SENSES, "reached")},
                "alpha": reached["alpha"].median(),
                **{name: reached[name].mean() for name in ("after", "drift", "worst_loss", "falls")},
                "with_companion": (own["companions"] > 0).mean(),
                "companions": own["companions"].mean(),
                "not_alone": (own["chosen_by"] > 1).mean(),
                **{kind: (own["kind"] == kind).mean() for kind in KINDS},
                "overlap_siblings": t_interval(self.overlap[place][self.kin]).mean,
                "overlap_others": t_interval(self.overlap[place][pairs & ~self.kin]).mean,
                **{"sibling_edits": kin.edits, "sibling_share": kin.share, "sibling_chance": kin.chance},
                "alpha_flip_median": own["alpha_flip_median"].median(),
            }
            rows.append(row)
        return pd.DataFrame(rows).merge(self.usage, on="seed")

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A row for each edited class and other class: mean over SAEs and range of the change, and what they share."""
        edited, other = np.nonzero(~np.eye(len(self.study.classes), dtype=bool))
        change = self.change[:, edited, other]
        names = np.array(self.study.classes)
        columns: dict[str, Any] = {"class": names[edited], "other": names[other]}
        if self.groups:
            columns["same_superclass"] = self.kin[edited, other]
        for name, over in (("change", np.nanmean), ("change_low", np.nanmin), ("change_high", np.nanmax)):
            columns[name] = over_saes(over, change)
        for name in ("falls", "companion", "overlap"):
            columns[name] = getattr(self, name)[:, edited, other].mean(axis=0)
        return pd.DataFrame(columns).assign(testbed=self.study.testbed.name)


def over_saes(statistic: Callable[..., np.ndarray], values: Float[np.ndarray, "S ..."]) -> Float[np.ndarray, "..."]:
    """A statistic over SAEs, of the values that are not NaN; NaN where all are."""
    known = ~np.isnan(values).all(axis=0)
    found = np.full(known.shape, np.nan)
    found[known] = statistic(values[:, known], axis=0)
    return found


def survey_of(study: Study) -> Survey:
    """Read a testbed's runs."""
    data = study.context.data
    groups = data.superclasses if isinstance(data, Cifar100Data) else None
    found = [_read(run, study.classes, groups) for run in study.runs]
    table = joined([one["rows"] for one in found]).assign(testbed=study.testbed.name)
    by_sae = {name: np.stack([one[name] for one in found]) for name in ("change", "overlap", "companion", "falls")}
    return Survey(study, groups, table, **by_sae, usage=pd.DataFrame([one["usage"] for one in found]))


def _read(run: SAERun, classes: list[str], groups: tuple[str, ...] | None) -> dict[str, Any]:
    """One SAE's rows, matrices ``[C, C]``, and its usage: how many latents are of which kind, and how many classes own
    a part of one that is alive."""
    selected = run.selected
    latents = selected["latent"].fillna(-1).astype(int).to_numpy()
    means = run.tensors("features", "class_means.safetensors")["class_means"].numpy()
    found: dict[int, MatchedEdit] = {}
    before = np.full(len(classes), np.nan)
    change = np.full((len(classes), len(classes)), np.nan)
    for one in suppressed(run, classes):
        found[one.own], before = one.edit, one.test[0]
        if one.edit.reached:
            change[one.own] = accuracy_at(one.alphas, one.test, one.edit.alpha) - before
    dominant = run.table("features", "dominant.csv")
    has = np.zeros((len(classes), means.shape[1]), dtype=bool)
    has[[classes.index(name) for name in dominant["class"]], dominant["latent"]] = True
    matrices = {
        "change": change,
        "overlap": jaccard(has),
        "companion": companions(means, latents),
        "falls": falling(change, before),
    }
    most = loses_most(change)
    flips = run.table("diagnose", "summary.csv").set_index("class").reindex(classes)
    columns = {
        "seed": run.seed,
        "class": classes,
        "superclass": groups or "",
        **{name: selected[name].to_numpy() for name in ("latent", "sign", "kind", "share")},
        **{sense: run.verdicts[sense].to_numpy(bool) for sense in SENSES},
        "companions": matrices["companion"].sum(axis=1),
        "chosen_by": chosen_by(latents),
        "falls": matrices["falls"].sum(axis=1),
        "loses_most": np.where(most.any(axis=1), np.array(classes)[most.argmax(axis=1)], ""),
        "lose_as_much": most.sum(axis=1),
        **{name: flips[name].to_numpy() for name in ("alpha_flip_median", "alpha_flip_infinite")},
    }
    rows = pd.DataFrame(columns).join(pd.DataFrame(found.values(), index=list(found)))
    rows = rows[latents >= 0].astype({"reached": bool})
    kinds = run.table("features", "latents.csv")["kind"]
    owners = (shares(torch.from_numpy(means)) >= run.flat_settings["discover.threshold"] / 2).sum(dim=0).numpy()
    usage = {
        "seed": run.seed,
        "dictionary_size": means.shape[1],
        **{f"latents {kind}": int((kinds == kind).sum()) for kind in (*KINDS, "dead")},
        "owners_per_latent": float(owners[np.abs(np.nan_to_num(means)).sum(axis=0) > 0].mean()),  # of those alive
        "latents_of_several": int((owners >= 2).sum()),
    }
    return {"rows": rows, "usage": usage, **matrices}
