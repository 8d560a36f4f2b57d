"""Stage ``compare``: edit methods on one footing, each at the strength that takes its class to the same accuracy."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, digest_of, write_record, write_table
from salve.backbones.cut import Cut
from salve.edit_settings import CompareSettings
from salve.editing.matched import LEVEL, strength_to
from salve.editing.methods import FittedEdit, Fitting, Method, Target, key_of, make_method
from salve.editing.relearning import relearned
from salve.editing.verdict import effect
from salve.metrics import kl_divergence, per_class_accuracy
from salve.settings import CaptureSettings, DiscoverSettings, SAESettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.discover import capture, read_features
from salve.stages.sampled import Sample, fitting_of
from salve.stages.targets import targets_of
from salve.stages.train import train_sae
from salve.types import Split, UserError
from salve.values import check_values

#: The table of a comparison, without what depends on the machine.
EDITS = "edits.csv"


class Entry(NamedTuple):
    """A row of a comparison: an edit method, and what its SAE has other than that of the run."""

    method: Method
    sae: dict[str, Any]

    def sae_of(self, settings: SAESettings) -> SAESettings:
        """The settings of its SAE."""
        return replace(settings, **self.sae)


def entries_of(settings: CompareSettings) -> dict[str, Entry]:
    """The methods by the user's names.

    Raises:
        UserError: there are none, or one does not exist or has no such setting.
    """
    if not settings.methods:
        raise UserError("compare.methods is empty; name at least one, such as gate.")
    found = {}
    for name in settings.methods:
        chosen, key = settings.variants.get(name, {"method": name}), "compare.methods"
        if name in settings.variants:
            key = f"compare.variants.{name}"
        if not isinstance(chosen, Mapping) or len({"method", "_target_"} & set(chosen)) != 1:
            raise UserError(f"{key} must say method=NAME or _target_=package.module.Class, and the method's settings.")
        own = {field: value for field, value in chosen.items() if field not in ("method", "_target_", "sae")}
        target = str(chosen.get("_target_", chosen.get("method")))
        method = make_method(target, own, key, own="_target_" in chosen)
        found[name] = Entry(method, _sae_of(chosen.get("sae", {}), method, f"{key}.sae"))
    return found


def _sae_of(given: Any, method: Method, key: str) -> dict[str, Any]:
    known = [field.name for field in fields(SAESettings)]
    if not isinstance(given, Mapping):
        raise UserError(f"{key}={given} must hold settings of the SAE, such as {{decoder: random}}.")
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{key} has no setting {unknown[0]}; it has {', '.join(known)}.")
    if given and not method.needs_sae:
        raise UserError(f"{key} is for methods that use an SAE, and this one uses none.")
    return dict(given)


def check_compare(settings: CompareSettings, classes: Sequence[str], sae: SAESettings) -> None:
    """Raise UserError unless all methods and their SAEs can be made, and all targets are classes."""
    for name, entry in entries_of(settings).items():
        if entry.sae:
            own = entry.sae_of(sae)
            check_values(own, f"compare.variants.{name}.sae.")
            own.check()
    if wrong := [number for number in settings.relearn if number < 1]:
        raise UserError(f"compare.relearn={settings.relearn} names {wrong[0]} steps; each must be 1 or more.")
    if unknown := [name for name in settings.targets or [] if name not in classes]:
        raise UserError(f"compare.targets names {unknown[0]}; the classes are {', '.join(classes)}.")


class Parts(NamedTuple):
    """Settings of what a comparison makes besides the run's own SAE, where a method needs it."""

    capture: CaptureSettings
    sae: SAESettings
    discover: DiscoverSettings


def compare(
    context: StageContext,
    settings: CompareSettings,
    parts: Parts,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Fit every method to every class, and measure each edit at its own strength.

    A method's edits are an artifact of their own, so that another method is added without repeating the others. Methods
    that use no SAE are not repeated for another SAE, and those that do not depend on the site are not for another site.

    Returns:
        Artifact ``compare``: ``edits.csv``, one row per method and class, and ``methods.json``, which names the
        artifacts of kind ``method``, whose ``seconds.csv`` says how long they took.
    """
    entries, run = entries_of(settings), _Site(context, settings, classifier, activations)
    here = _Bench(run, run, parts.sae.seed, sae, features)
    head = here
    if context.layer != "last" and not all(entry.method.of_site for entry in entries.values()):
        last = replace(context, layer="last")
        head = _Bench(_Site(last, settings, classifier, capture(last, parts.capture, classifier)), run, context.seed)
    elif context.layer == "last":
        head = replace(here, seed=context.seed)
    benches: dict[str, _Bench] = {}
    for name, entry in entries.items():
        benches[name] = here if entry.method.of_site else head
        own = entry.sae_of(parts.sae)
        if entry.sae and own != parts.sae:
            other = train_sae(context, own, classifier, activations)
            found = read_features(context, parts.discover, own.pool, classifier, activations, other)
            benches[name] = _Bench(run, run, parts.sae.seed, other, found)
    with context.progress("comparing edits", len(entries)) as advance:
        made = {}
        for name, entry in entries.items():
            made[name] = benches[name].measured(name, entry.method)
            advance(1)
    facts = {name: {"key": one.key, "digest": digest(one)} for name, one in made.items()}

    def make(folder: Path, _: Path) -> None:
        tables = [one.table(EDITS).assign(method=name) for name, one in made.items()]
        table = pd.concat(tables, ignore_index=True)
        write_table(folder / EDITS, table[["method", *[column for column in table if column != "method"]]])
        write_record(folder / "methods.json", {name: one.key for name, one in made.items()})

    return context.store.get_or_make("compare", {"methods": facts}, make)


def digest(method: Artifact) -> str:
    """Of what a method's artifact says of its edits, without the seconds."""
    return str(method.record("edits.json")["digest"])


@dataclass(frozen=True, eq=False)
class _Site:
    """What all methods at a site are fitted and measured on; made when the first one needs it."""

    context: StageContext
    settings: CompareSettings
    classifier: Artifact
    activations: Artifact

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

    @cached_property
    def original(self) -> Tensor:
        """The test images' logits without an edit."""
        return self.samples["test"].logits()

    @cached_property
    def unedited(self) -> dict[tuple[int, ...], float]:
        """The accuracy of classes on select images without an edit, as far as it has been measured."""
        return {}

    def on_select(self, edit: FittedEdit, target: Target) -> Callable[[float], float]:
        """The accuracy of the edited classes on select images at a strength."""
        select, classes = self.samples["select"], list(target.classes)
        labels = select.labels_of(classes)

        def measured(alpha: float) -> float:
            if not len(labels):
                return math.nan
            logits = select.logits(edit.at(alpha) if alpha else None, classes)
            right = per_class_accuracy(logits.argmax(dim=1), labels, len(self.context.classes))[classes]
            return float(right[~right.isnan()].mean())

        def accuracy(alpha: float) -> float:
            if alpha:
                return measured(alpha)
            if target.classes not in self.unedited:
                self.unedited[target.classes] = measured(0.0)
            return self.unedited[target.classes]

        return accuracy


@dataclass(frozen=True, eq=False)
class _Bench:
    """Where methods are fitted and measured: a site, and an SAE of it for methods that need one.

    Attributes:
        site: where edits are fitted and measured. run: where edited networks are trained on.
        seed: of what methods draw.
    """

    site: _Site
    run: _Site
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
        wanted = self.settings.targets or self.context.classes
        if not of_latents:
            return [Target(name, (self.context.classes.index(name),), (), (), ()) for name in wanted]
        assert self.features is not None, "methods with an SAE are measured where there is one"
        return [target for target in targets_of(self.context.classes, self.features, []) if target.name in wanted]

    def measured(self, name: str, method: Method) -> Artifact:
        """The artifact of one method's edits."""
        site, used = self.site, {name: getattr(self.settings, name) for name in ("images", "targets", "relearn")}
        key = {**key_of(method), **used, "level": LEVEL, "seed": self.seed if method.draws else None, "uses": True}
        inputs = [site.classifier, site.activations]
        if method.needs_sae:
            inputs += [one for one in (self.sae, self.features) if one is not None]
        if self.settings.relearn and site is not self.run:
            key["trained_on_at"] = self.run.activations.digest

        def make(folder: Path, _: Path) -> None:
            targets = self.targets(method.needs_sae)
            rows, seconds = [], []
            with self.context.progress(f"editing: {name}", len(targets)) as advance:
                for target in targets:
                    row, taken = self._row(method, target)
                    rows.append(row)
                    seconds.append({"class": target.name, **taken})
                    advance(1)
            write_table(folder / EDITS, pd.DataFrame(rows))
            write_table(folder / "seconds.csv", pd.DataFrame(seconds))
            write_record(folder / "edits.json", {"digest": digest_of_rows(rows)})

        return self.context.store.get_or_make("method", settings_of_key(key, *inputs), make)

    def _row(self, method: Method, target: Target) -> tuple[dict[str, Any], dict[str, float]]:
        """A method's edit of one class on test images, and how many seconds were taken to fit and to apply it."""
        fitting, test = self.fitting, self.site.samples["test"]
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
            reason = reason or ("no strength takes the class to the level" if judged else "nothing to take away")
            return row | uses | self._facts(None, reason), seconds
        change = edit.at(alpha)
        began = time.perf_counter()
        weights = change.weights() if change.weights else {}
        seconds["apply_seconds"] = time.perf_counter() - began
        row |= {"alpha": alpha, "reached": True} | self._effect(test.logits(change), target)
        if self.settings.relearn and change.permanent:
            seeded = replace(self.run.fitting, seed=fitting.seed if method.draws else self.context.seed)
            found = relearned(seeded, target, weights, test.images, self.settings.relearn)
            row |= {f"relearned_{number}": found[number] for number in self.settings.relearn}
        reason = "" if change.permanent else change.why_not_permanent
        return row | uses | self._facts(weights if change.permanent else None, reason), seconds

    def _by_class(self, logits: Tensor) -> np.ndarray:
        """The accuracy of each class on test images."""
        labels, classes = self.site.samples["test"].labels, len(self.context.classes)
        return per_class_accuracy(logits.argmax(dim=1), labels, classes).double().numpy()

    def _own(self, target: Target) -> np.ndarray:
        """Which classes the target is."""
        return np.isin(np.arange(len(self.context.classes)), target.classes)

    def _before(self, target: Target) -> float:
        before = self._by_class(self.site.original)
        return float(effect(before, before, self._own(target)).before)

    def _effect(self, logits: Tensor, target: Target) -> dict[str, Any]:
        """What other logits on test images mean for the target, and for the other classes."""
        labels = self.site.samples["test"].labels
        found = effect(self._by_class(self.site.original), self._by_class(logits), self._own(target))
        others = ~torch.isin(labels, torch.tensor(target.classes))
        kl = kl_divergence(self.site.original, logits).clamp_min(0)[others]
        worst, before = int(found.worst), float(found.before)
        return {
            "after": float(found.after),
            "drift": float(found.mean_change),
            "worst_loss": float(found.worst_loss),
            "kl_others": float(kl.mean()) if len(kl) else math.nan,
            "drop": before - float(found.after),
            "selectivity": before - float(found.after) - float(found.mean_change),
            "worst_class": self.context.classes[worst] if worst >= 0 else "",
        }

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
