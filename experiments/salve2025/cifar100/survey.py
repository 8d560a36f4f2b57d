"""Read from finished runs what the classes of a testbed share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy import ndarray

from experiments.compare import MatchedEdit, accuracy_at, t_interval
from experiments.experiment import joined
from experiments.runs import SAERun, Study, suppressed
from experiments.salve2025.cifar100 import measures
from experiments.separation import Separation, separation
from experiments.testbeds import Testbed
from salve.data.cifar100 import Cifar100Data
from salve.features import shares

KINDS = ("class-defining", "cross-class", "diffuse")


@dataclass(frozen=True)
class Survey:
    """What was found on a testbed.

    Attributes:
        classes: names. groups: the superclass of each, where the data know one. images: in the test split.
        table: a row for each SAE and class, see :func:`_rows`.
        separates: how many classes do.
        change: by SAE, edited class and other class, the change of test accuracy where the edited class is at ``LEVEL``
            on select; NaN where it cannot be taken there. overlap: of two classes' dominant latents. companion: see
            :func:`.measures.companions`. falls: see :func:`.measures.falling`.
        usage: a row for each SAE, what its latents are.
    """

    testbed: Testbed
    classes: list[str]
    groups: tuple[str, ...] | None
    images: int
    table: pd.DataFrame
    separates: Separation
    change: Float[ndarray, "S C C"]
    overlap: Float[ndarray, "S C C"]
    companion: Bool[ndarray, "S C C"]
    falls: Bool[ndarray, "S C C"]
    usage: pd.DataFrame

    @cached_property
    def kin(self) -> Bool[ndarray, "C C"]:
        """Pairs of one superclass; none where there are no superclasses."""
        return measures.siblings(list(self.groups or self.classes))

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row for each SAE: means over its classes, counts of latents, and how siblings fare."""
        rows = []
        for place, (seed, own) in enumerate(self.table.groupby("seed")):
            reached = own[own["reached"]]
            kin = (
                measures.kinship(measures.loses_most(self.change[place]), self.kin)
                if self.groups
                else measures.Kinship(0, np.nan, np.nan)
            )
            pairs = ~np.eye(len(self.classes), dtype=bool)
            row = {
                **{"testbed": self.testbed.name, "seed": seed, "classes": len(own)},
                **{name: own[name].mean() for name in ("separates", "separates_published", "reached")},
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
        edited, other = np.nonzero(~np.eye(len(self.classes), dtype=bool))
        change = self.change[:, edited, other]
        names = np.array(self.classes)
        columns: dict[str, Any] = {"class": names[edited], "other": names[other]}
        if self.groups:
            columns["same_superclass"] = self.kin[edited, other]
        for name, over in (("change", np.nanmean), ("change_low", np.nanmin), ("change_high", np.nanmax)):
            columns[name] = over_saes(over, change)
        for name in ("falls", "companion", "overlap"):
            columns[name] = getattr(self, name)[:, edited, other].mean(axis=0)
        return pd.DataFrame(columns).assign(testbed=self.testbed.name)


def over_saes(statistic: Callable[..., ndarray], values: Float[ndarray, "S ..."]) -> Float[ndarray, "..."]:
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
    return Survey(
        study.testbed,
        study.classes,
        groups,
        len(study.test.labels),
        joined([one["rows"] for one in found]).assign(testbed=study.testbed.name),
        separation(study.runs, len(study.classes)),
        **{name: np.stack([one[name] for one in found]) for name in ("change", "overlap", "companion", "falls")},
        usage=pd.DataFrame([one["usage"] for one in found]),
    )


def _read(run: SAERun, classes: list[str], groups: tuple[str, ...] | None) -> dict[str, Any]:
    """One SAE's rows, matrices ``[C, C]``, and what its latents are."""
    selected = run.selected
    latents = selected["latent"].fillna(-1).astype(int).to_numpy()
    means = run.found.tensors("features", "class_means.safetensors")["class_means"].numpy()
    found: dict[int, MatchedEdit] = {}
    before = np.full(len(classes), np.nan)
    change = np.full((len(classes), len(classes)), np.nan)
    for one in suppressed(run, classes):
        found[one.own], before = one.edit, one.test[0]
        if one.edit.reached:
            change[one.own] = accuracy_at(one.alphas, one.test, one.edit.alpha) - before
    dominant = run.found.table("features", "dominant.csv")
    has = np.zeros((len(classes), means.shape[1]), dtype=bool)
    has[[classes.index(name) for name in dominant["class"]], dominant["latent"]] = True
    matrices = {
        "change": change,
        "overlap": measures.jaccard(has),
        "companion": measures.companions(means, latents),
        "falls": measures.falling(change, before),
    }
    most = measures.loses_most(change)
    flips = run.found.table("diagnose", "summary.csv").set_index("class").reindex(classes)
    columns = {
        "seed": run.seed,
        "class": classes,
        "superclass": groups or "",
        **{name: selected[name].to_numpy() for name in ("latent", "sign", "kind", "share")},
        **{sense: run.verdicts[sense].to_numpy(bool) for sense in ("separates", "separates_published")},
        "companions": matrices["companion"].sum(axis=1),
        "chosen_by": measures.chosen_by(latents),
        "falls": matrices["falls"].sum(axis=1),
        "loses_most": np.where(most.any(axis=1), np.array(classes)[most.argmax(axis=1)], ""),
        "lose_as_much": most.sum(axis=1),
        **{name: flips[name].to_numpy() for name in ("alpha_flip_median", "alpha_flip_infinite")},
    }
    rows = pd.DataFrame(columns).join(pd.DataFrame(found.values(), index=list(found)))
    rows = rows[latents >= 0].astype({"reached": bool})
    return {"rows": rows, "usage": _usage(run, means), **matrices}


def _usage(run: SAERun, means: Float[ndarray, "C d"]) -> dict[str, Any]:
    """What all latents are: how many, of which kind, and how many classes own a part of one that is alive."""
    kinds = run.found.table("features", "latents.csv")["kind"]
    owners = (shares(torch.from_numpy(means)) >= run.settings["discover.threshold"] / 2).sum(dim=0).numpy()
    alive = np.abs(np.nan_to_num(means)).sum(axis=0) > 0
    return {
        "seed": run.seed,
        "dictionary_size": means.shape[1],
        **{f"latents {kind}": int((kinds == kind).sum()) for kind in (*KINDS, "dead")},
        "owners_per_latent": float(owners[alive].mean()),
        "latents_of_several": int((owners >= 2).sum()),
    }
