"""Stage ``compare``: edit methods on one footing, each at the strength that takes its class to the same accuracy."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from salve.artifacts import Artifact, digest_of, write_record, write_table
from salve.backbones.cut import Cut
from salve.edit_settings import CompareSettings
from salve.editing.matched import LEVEL, strength_to
from salve.editing.methods import FittedEdit, Fitting, Method, Target, key_of, make_method
from salve.editing.relearning import relearned
from salve.editing.verdict import Effect, effect
from salve.metrics import kl_divergence, per_class_accuracy
from salve.stages.context import StageContext, settings_of_key
from salve.stages.sampled import Sample, fitting_of
from salve.stages.targets import targets_of
from salve.types import Split, UserError

#: The table of a comparison, without what depends on the machine.
EDITS = "edits.csv"


def methods_of(settings: CompareSettings) -> dict[str, Method]:
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
        own = {field: value for field, value in chosen.items() if field not in ("method", "_target_")}
        target = str(chosen.get("_target_", chosen.get("method")))
        found[name] = make_method(target, own, key, own="_target_" in chosen)
    return found


def check_compare(settings: CompareSettings, classes: Sequence[str]) -> None:
    """Raise UserError unless all methods exist and all targets are classes."""
    methods_of(settings)
    if wrong := [number for number in settings.relearn if number < 1]:
        raise UserError(f"compare.relearn={settings.relearn} names {wrong[0]} steps; each must be 1 or more.")
    if unknown := [name for name in settings.targets or [] if name not in classes]:
        raise UserError(f"compare.targets names {unknown[0]}; the classes are {', '.join(classes)}.")


def compare(
    context: StageContext,
    settings: CompareSettings,
    seed: int,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Fit every method to every class, and measure each edit at its own strength.

    A method's edits are an artifact of their own, so that another method is added without repeating the others, and
    methods that use no SAE are not repeated for another SAE.

    Args:
        seed: of what methods draw.

    Returns:
        Artifact ``compare``: ``edits.csv``, one row per method and class, and ``methods.json``, which names the
        artifacts of kind ``method``, whose ``seconds.csv`` says how long they took.
    """
    bench = _Bench(context, settings, seed, classifier, activations, sae, features)
    methods = methods_of(settings)
    with context.progress("comparing edits", len(methods)) as advance:
        found = {}
        for name, method in methods.items():
            found[name] = bench.measured(name, method)
            advance(1)
    facts = {name: {"key": one.key, "digest": digest(one)} for name, one in found.items()}

    def make(folder: Path, _: Path) -> None:
        tables = [found[name].table(EDITS).assign(method=name) for name in methods]
        table = pd.concat(tables, ignore_index=True)
        write_table(folder / EDITS, table[["method", *[column for column in table if column != "method"]]])
        write_record(folder / "methods.json", {name: one.key for name, one in found.items()})

    return context.store.get_or_make("compare", {"methods": facts}, make)


def digest(method: Artifact) -> str:
    """Of what a method's artifact says of its edits, without the seconds."""
    return str(method.record("edits.json")["digest"])


@dataclass(frozen=True, eq=False)
class _Bench:
    """What all methods are fitted and measured on; made when the first one needs it."""

    context: StageContext
    settings: CompareSettings
    seed: int
    classifier: Artifact
    activations: Artifact
    sae: Artifact
    features: Artifact

    @cached_property
    def cut(self) -> Cut:
        return self.context.cut(self.classifier)

    @cached_property
    def fitting(self) -> Fitting:
        sae = self.context.sae(self.sae, self.activations)
        return fitting_of(self.context, self.cut, self.activations, sae, self.seed)

    @cached_property
    def samples(self) -> dict[Split, Sample]:
        splits: tuple[Split, Split] = ("select", "test")
        images = self.settings.images
        return {split: Sample(self.context, self.cut, self.activations, split, images) for split in splits}

    @cached_property
    def original(self) -> dict[Split, Tensor]:
        """The logits of the images of select and test without an edit."""
        return {split: sample.logits() for split, sample in self.samples.items()}

    def effects(self, split: Split, own: NDArray[np.bool_], logits: Tensor) -> Effect:
        """What an edit with these logits changes in a split; ``own`` ``[C]`` are the classes that it is for."""
        labels, classes = self.samples[split].labels, len(own)
        before, after = (
            per_class_accuracy(one.argmax(dim=1), labels, classes).double().numpy()
            for one in (self.original[split], logits)
        )
        return effect(before, after, own)

    def targets(self, of_latents: bool) -> list[Target]:
        """The classes that are edited; with the latents that were chosen for them, or without any."""
        wanted = self.settings.targets or self.context.classes
        if not of_latents:
            return [Target(name, (self.context.classes.index(name),), (), (), ()) for name in wanted]
        return [target for target in targets_of(self.context.classes, self.features, []) if target.name in wanted]

    def measured(self, name: str, method: Method) -> Artifact:
        """The artifact of one method's edits."""
        used = {"images": self.settings.images, "targets": self.settings.targets, "relearn": self.settings.relearn}
        used |= {"measured_on": ["select", "test"]}
        key = {**key_of(method), **used, "level": LEVEL, "seed": self.seed if method.draws else None}
        inputs = [self.classifier, self.activations, *((self.sae, self.features) if method.needs_sae else ())]

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
        began = time.perf_counter()
        try:
            edit: FittedEdit | None = method.fit(self.fitting, target)
            reason = ""
        except UserError as error:
            edit, reason = None, str(error)
        seconds = {"fit_seconds": time.perf_counter() - began, "apply_seconds": math.nan}
        row: dict[str, Any] = {"class": target.name, "alpha": math.inf, "reached": False}
        own = np.zeros(len(self.context.classes), bool)
        own[list(target.classes)] = True
        row["before"] = float(self.effects("test", own, self.original["test"]).before)
        alpha = math.inf if edit is None else strength_to(self._on_select(edit, target), edit.strongest)
        judged = not math.isnan(alpha) and row["before"] > LEVEL
        if edit is None or not judged or math.isinf(alpha):
            nothing = 0.0 if judged else math.nan  # an edit that does not exist takes and harms nothing
            row |= dict.fromkeys(("after", "drift", "worst_loss", "kl_others"), math.nan)
            row |= {"drop": nothing, "selectivity": nothing, "select_selectivity": nothing, "worst_class": ""}
            reason = reason or ("no strength takes the class to the level" if judged else "nothing to take away")
            return row | self._facts(None, reason), seconds
        change = edit.at(alpha)
        began = time.perf_counter()
        weights = change.weights() if change.weights else {}
        seconds["apply_seconds"] = time.perf_counter() - began
        logits = {split: sample.logits(change) for split, sample in self.samples.items()}
        found, on_select = self.effects("test", own, logits["test"]), self.effects("select", own, logits["select"])
        others = ~torch.isin(self.samples["test"].labels, torch.tensor(target.classes))
        kl = kl_divergence(self.original["test"], logits["test"]).clamp_min(0)[others]
        worst = int(found.worst)
        row |= {
            "alpha": alpha,
            "reached": True,
            "after": float(found.after),
            "drift": float(found.mean_change),
            "worst_loss": float(found.worst_loss),
            "kl_others": float(kl.mean()) if len(kl) else math.nan,
            "drop": row["before"] - float(found.after),
            "selectivity": float(found.before - found.after - found.mean_change),
            "select_selectivity": float(on_select.before - on_select.after - on_select.mean_change),
            "worst_class": self.context.classes[worst] if worst >= 0 else "",
        }
        if self.settings.relearn and change.permanent:
            test, steps = self.samples["test"].images, self.settings.relearn
            found_after = relearned(self.fitting, target, weights, test, steps)
            row |= {f"relearned_{number}": found_after[number] for number in steps}
        reason = "" if change.permanent else change.why_not_permanent
        return row | self._facts(weights if change.permanent else None, reason), seconds

    def _on_select(self, edit: FittedEdit, target: Target) -> Any:
        """The accuracy of the edited classes on select images at a strength."""
        select, classes = self.samples["select"], list(target.classes)
        labels = select.labels_of(classes)

        def accuracy(alpha: float) -> float:
            if not len(labels):
                return math.nan
            logits = select.logits(edit.at(alpha) if alpha else None, classes)
            right = per_class_accuracy(logits.argmax(dim=1), labels, len(self.context.classes))[classes]
            return float(right[~right.isnan()].mean())

        return accuracy

    def _facts(self, weights: Mapping[str, Tensor] | None, reason: str) -> dict[str, Any]:
        """How many weights the edit changes, and whether it is permanent; None for an edit that changes none."""
        state = self.cut.model.state_dict()
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
