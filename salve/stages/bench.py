# SPDX-License-Identifier: MIT
"""Where edit methods are fitted to classes, and measured on select and test images."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, digest_of, write_record, write_table
from salve.backbones.cut import Cut
from salve.edit_settings import RETRAINED, CompareSettings
from salve.editing.gap import gap_to_retrained
from salve.editing.matched import LEVEL, strength_to
from salve.editing.methods import FittedEdit, Fitting, Method, Target, key_of
from salve.editing.relearning import relearned
from salve.editing.verdict import effect
from salve.metrics import kl_divergence, per_class_accuracy
from salve.stages.context import StageContext, settings_of_key
from salve.stages.sampled import Sample, fitting_of
from salve.stages.targets import targets_of
from salve.types import Split, UserError

#: In the key: the level, and that 2 of 40 images are at 5 %, which in float32 were above it.
COUNTED = {"level": LEVEL, "counted_in": "float64"}
#: The table of a comparison, without what depends on the machine.
EDITS = "edits.csv"


def targets_among(settings: CompareSettings, classes: Sequence[str]) -> list[str]:
    """The names of the classes that are edited.

    Raises:
        UserError: the setting is neither names nor a number.
    """
    given = settings.targets
    if given is None:
        return list(classes)
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return list(classes[:given])
    if not isinstance(given, list | tuple) or not given:
        raise UserError(f"compare.targets={given} must be names of classes, a number of them, or null.")
    return [str(name) for name in given]


@dataclass(frozen=True, eq=False)
class Retrained:
    """Networks that were trained without one class each, with the same settings.

    Attributes:
        classifiers: by the class's name. seconds: that their trainings took, of those that were not there already.
    """

    context: StageContext
    classifiers: dict[str, Artifact]
    seconds: dict[str, float] = field(default_factory=dict)
    _logits: dict[tuple[str, Split], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, name: str, sample: Sample) -> Tensor:
        """The logits of a sample's images by the network without a class."""
        if (name, sample.split) not in self._logits:
            cut = self.context.cut(self.classifiers[name])
            found = [cut.logits(images).float().cpu() for images, _ in sample.images()]
            self._logits[name, sample.split] = torch.cat(found)
        return self._logits[name, sample.split]


def retrained_networks(
    context: StageContext, settings: CompareSettings, without: Callable[[str], Artifact]
) -> Retrained:
    """Train a network without each target, or find those that are there."""
    found, targets = Retrained(context, {}), targets_among(settings, context.classes)
    with context.progress("training without a class", len(targets)) as advance:
        for name in targets:
            began = time.perf_counter()
            classifier = without(name)
            found.classifiers[name] = classifier
            found.seconds[name] = math.nan if classifier.reused else time.perf_counter() - began
            advance(1)
    return found


@dataclass(frozen=True, eq=False)
class Bed:
    """What all methods at a site are fitted and measured on; made when the first one needs it."""

    context: StageContext
    settings: CompareSettings
    classifier: Artifact
    activations: Artifact
    retrained: Retrained

    @cached_property
    def cut(self) -> Cut:
        return self.context.cut(self.classifier)

    @cached_property
    def fitting(self) -> Fitting:
        return fitting_of(self.context, self.cut, self.activations, None, 0)

    @cached_property
    def samples(self) -> dict[Split, Sample]:
        splits: tuple[Split, Split] = ("select", "test")
        images = self.settings.images
        return {split: Sample(self.context, self.cut, self.activations, split, images) for split in splits}

    @property
    def judges(self) -> dict[Split, Sample]:
        """On which edits are measured: test, and select where something may be chosen by it."""
        return {split: one for split, one in self.samples.items() if split == "test" or self.settings.on_select}

    @cached_property
    def original(self) -> dict[Split, Tensor]:
        """The logits of the images of :attr:`judges` without an edit."""
        return {split: sample.logits() for split, sample in self.judges.items()}

    @cached_property
    def unedited(self) -> dict[tuple[int, ...], float]:
        """The accuracy of classes on select images without an edit, as far as it has been measured."""
        return {}

    def on_select(self, edit: FittedEdit, target: Target) -> Callable[[float], float]:
        """The accuracy of the edited classes on select images at a strength, in the mean over those that have images; a
        part of it, as soon as that is above the level."""
        select, classes = self.samples["select"], list(target.classes)
        images = {label: int((select.labels == label).sum()) for label in select.chosen(classes)}

        def measured(alpha: float) -> float:
            if not images:
                return math.nan
            right = dict.fromkeys(images, 0)
            for logits, labels in select.parts(edit.at(alpha) if alpha else None, classes):
                hits = logits.argmax(dim=1) == labels
                for label in images:
                    right[label] += int(hits[labels == label].sum())
                known = sum(right[label] / images[label] for label in images) / len(images)
                if round(known, 9) > LEVEL:
                    break  # what has not run yet cannot lower it
            return round(known, 9)

        def accuracy(alpha: float) -> float:
            if alpha:
                return measured(alpha)
            if target.classes not in self.unedited:
                self.unedited[target.classes] = measured(0.0)
            return self.unedited[target.classes]

        return accuracy


@dataclass(frozen=True, eq=False)
class Bench:
    """Where methods are fitted and measured: a site, and an SAE of it for methods that need one.

    Attributes:
        site: where edits are fitted and measured. run: where edited networks are trained on.
        seed: of what methods draw.
    """

    site: Bed
    run: Bed
    seed: int
    sae: Artifact | None = None
    features: Artifact | None = None

    @property
    def context(self) -> StageContext:
        return self.site.context

    @property
    def settings(self) -> CompareSettings:
        return self.site.settings

    @cached_property
    def fitting(self) -> Fitting:
        """With the activations and moments of the site, which all benches of the site share."""
        sae = None if self.sae is None else self.context.sae(self.sae, self.site.activations)
        return self.site.fitting.with_sae(sae, self.seed)

    def targets(self, of_latents: bool) -> list[Target]:
        """The classes that are edited; with the latents that were chosen for them, or without any."""
        wanted = targets_among(self.settings, self.context.classes)
        if not of_latents:
            return [Target(name, (self.context.classes.index(name),), (), (), ()) for name in wanted]
        assert self.features is not None, "methods with an SAE are measured where there is one"
        return [target for target in targets_of(self.context.classes, self.features, []) if target.name in wanted]

    def measured(self, name: str, method: Method) -> Artifact:
        """The artifact of one method's edits."""
        site, used = self.site, {name: getattr(self.settings, name) for name in ("images", "targets", "relearn")}
        used["on_select"] = self.settings.on_select
        key = {**key_of(method), **used, **COUNTED, "seed": self.seed if method.draws else None, "uses": True}
        inputs = [site.classifier, site.activations]
        if method.needs_sae:
            inputs += [one for one in (self.sae, self.features) if one is not None]
        if self.settings.relearn and site is not self.run:
            key["trained_on_at"] = self.run.activations.digest

        return self._made(name, key, inputs, lambda: self.targets(method.needs_sae), partial(self._row, method))

    def bound(self) -> Artifact:
        """The artifact of the networks that never saw a class, measured as edits are."""
        key = {"class": RETRAINED, "images": self.settings.images, **COUNTED, "on_select": self.settings.on_select}
        return self._made(RETRAINED, key, [self.site.classifier], lambda: self.targets(False), self._without)

    def _made(
        self,
        name: str,
        key: dict[str, Any],
        inputs: Sequence[Artifact],
        targets_of_it: Callable[[], list[Target]],
        row_of: Callable[[Target], tuple[dict[str, Any], dict[str, float]]],
    ) -> Artifact:
        if self.settings.retrained:
            key["retrained"] = {name: one.digest for name, one in self.site.retrained.classifiers.items()}

        def make(folder: Path, _: Path) -> None:
            targets = targets_of_it()
            rows, seconds = [], []
            with self.context.progress(f"editing: {name}", len(targets)) as advance:
                for target in targets:
                    row, taken = row_of(target)
                    rows.append(row)
                    seconds.append({"class": target.name, **taken})
                    advance(1)
            write_table(folder / EDITS, pd.DataFrame(rows))
            write_table(folder / "seconds.csv", pd.DataFrame(seconds))
            write_record(folder / "edits.json", {"digest": digest_of_rows(rows)})

        return self.context.store.get_or_make("method", settings_of_key(key, *inputs), make)

    def _without(self, target: Target) -> tuple[dict[str, Any], dict[str, float]]:
        """The network without a class on test images, and how many seconds its training took."""
        networks, select = self.site.retrained, self.site.samples["select"]
        row: dict[str, Any] = {"class": target.name, "alpha": math.nan, "before": self._before(target)}
        mine = torch.isin(select.labels, torch.tensor(target.classes))
        right = (networks.logits(target.name, select).argmax(dim=1) == select.labels)[mine]
        row["reached"] = bool(len(right)) and float(right.double().mean()) <= LEVEL
        row |= self._effect(
            {split: networks.logits(target.name, one) for split, one in self.site.judges.items()}, target
        )
        others = int((~torch.isin(self.fitting.per_image, torch.tensor(target.classes))).sum())
        weights = self.context.cut(networks.classifiers[target.name]).model.state_dict()
        row |= {"images": others, "labels": others} | self._facts(weights, "")
        return row, {"fit_seconds": networks.seconds[target.name], "apply_seconds": math.nan}

    def _row(self, method: Method, target: Target) -> tuple[dict[str, Any], dict[str, float]]:
        """A method's edit of one class on test images, and how many seconds were taken to fit and to apply it."""
        fitting, samples = self.fitting, self.site.samples
        began = time.perf_counter()
        fitting.used.clear()
        try:
            edit: FittedEdit | None = method.fit(fitting, target)
            reason = ""
        except UserError as error:
            edit, reason = None, str(error)
        seconds = {"fit_seconds": time.perf_counter() - began, "apply_seconds": math.nan}
        uses = {"images": len(fitting.used.images), "labels": len(fitting.used.labels)}
        row: dict[str, Any] = {"class": target.name, "alpha": math.inf, "reached": False}
        row["before"] = self._before(target)
        alpha = math.inf
        if edit is not None:
            alpha = strength_to(self.site.on_select(edit, target), edit.strongest, steps=edit.steps)
        judged = not math.isnan(alpha) and row["before"] > LEVEL
        if edit is None or not judged or math.isinf(alpha):
            nothing = 0.0 if judged else math.nan  # an edit that does not exist takes and harms nothing
            row |= dict.fromkeys(("after", "drift", "worst_loss", "kl_others"), math.nan)
            row |= {"drop": nothing, "selectivity": nothing, "worst_class": ""}
            row |= {"select_selectivity": nothing} if self.settings.on_select else {}
            reason = reason or ("no strength takes the class to the level" if judged else "nothing to take away")
            return row | uses | self._facts(None, reason), seconds
        change = edit.at(alpha)
        began = time.perf_counter()
        weights = change.weights() if change.weights else {}
        seconds["apply_seconds"] = time.perf_counter() - began
        row |= {"alpha": alpha, "reached": True}
        row |= self._effect({split: sample.logits(change) for split, sample in self.site.judges.items()}, target)
        if self.settings.relearn and change.permanent:
            seeded = replace(self.run.fitting, seed=fitting.seed if method.draws else self.context.seed)
            found = relearned(seeded, target, weights, samples["test"].images, self.settings.relearn)
            row |= {f"relearned_{number}": found[number] for number in self.settings.relearn}
        reason = "" if change.permanent else change.why_not_permanent
        return row | uses | self._facts(weights if change.permanent else None, reason), seconds

    def _by_class(self, split: Split, logits: Tensor) -> np.ndarray:
        """The accuracy of each class on images of a split."""
        labels, classes = self.site.samples[split].labels, len(self.context.classes)
        return per_class_accuracy(logits.argmax(dim=1), labels, classes).numpy()

    def _own(self, target: Target) -> np.ndarray:
        """Which classes the target is."""
        return np.isin(np.arange(len(self.context.classes)), target.classes)

    def _before(self, target: Target) -> float:
        before = self._by_class("test", self.site.original["test"])
        return float(effect(before, before, self._own(target)).before)

    def _effect(self, logits: Mapping[Split, Tensor], target: Target) -> dict[str, Any]:
        """What other logits mean for the target, and for the other classes, on test images; and where logits of select
        are given, one measure on these."""
        labels, own = self.site.samples["test"].labels, self._own(target)
        found = {
            split: effect(self._by_class(split, self.site.original[split]), self._by_class(split, changed), own)
            for split, changed in logits.items()
        }
        others = ~torch.isin(labels, torch.tensor(target.classes))
        kl = kl_divergence(self.site.original["test"], logits["test"]).clamp_min(0)[others]
        gap: dict[str, float] = {}
        if self.settings.retrained:
            retrained = self.site.retrained.logits(target.name, self.site.samples["test"])
            gap = gap_to_retrained(logits["test"], retrained, labels, target.classes)
        measures = {
            "after": float(found["test"].after),
            "drift": float(found["test"].mean_change),
            "worst_loss": float(found["test"].worst_loss),
            "kl_others": float(kl.mean()) if len(kl) else math.nan,
            "drop": float(found["test"].before - found["test"].after),
        }
        for split, one in found.items():
            name = "selectivity" if split == "test" else f"{split}_selectivity"
            measures[name] = float(one.before - one.after - one.mean_change)
        worst = int(found["test"].worst)
        return gap | measures | {"worst_class": self.context.classes[worst] if worst >= 0 else ""}

    def _facts(self, weights: Mapping[str, Tensor] | None, reason: str) -> dict[str, Any]:
        """How many weights the edit changes, and whether it is permanent; None for an edit that changes none."""
        state = self.site.cut.model.state_dict()
        changed = {name: int((tensor.cpu() != state[name].cpu()).sum()) for name, tensor in (weights or {}).items()}
        return {
            "permanent": weights is not None,
            "tensors": sum(count > 0 for count in changed.values()),
            "parameters": sum(changed.values()),
            "reason": reason,
        }


def digest_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A digest of a table's rows."""
    return digest_of([{name: repr(value) for name, value in row.items()} for row in rows])
