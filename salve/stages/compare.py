# SPDX-License-Identifier: MIT
"""Stage ``compare``: edit methods on one footing, each at the strength that takes its class to the same accuracy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from salve.artifacts import Artifact, write_record, write_table
from salve.edit_settings import RETRAINED, CompareSettings
from salve.editing.methods import Method, make_method
from salve.integrity import USES
from salve.settings import SAESettings
from salve.stages.bench import EDITS, Bed, Bench, Retrained, retrained_networks, targets_among
from salve.stages.context import StageContext
from salve.types import UserError
from salve.values import check_values


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
    if settings.retrained and RETRAINED in settings.methods:
        raise UserError(f"compare.methods names {RETRAINED}, which is the row of the networks of compare.retrained.")
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
    if unknown := [name for name in targets_among(settings, classes) if name not in classes]:
        raise UserError(f"compare.targets names {unknown[0]}; the classes are {', '.join(classes)}.")
    if settings.retrained and len(classes) < 3:
        raise UserError(f"compare.retrained trains without one class, but then {len(classes) - 1} of them is left.")


class Makers(NamedTuple):
    """What makes further artifacts, where a comparison needs them.

    Attributes:
        capture: activations at the site of a context. sae: of other settings, an SAE and what its latents mean.
        without: a classifier that is trained without a class.
    """

    capture: Callable[[StageContext], Artifact]
    sae: Callable[[SAESettings], tuple[Artifact, Artifact]]
    without: Callable[[str], Artifact]


def compare(
    context: StageContext,
    settings: CompareSettings,
    own: SAESettings,
    makers: Makers,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Fit every method to every class, and measure each edit at its own strength.

    A method's edits are an artifact of their own, so that another method is added without repeating the others. Methods
    that use no SAE are not repeated for another SAE, and those that do not depend on the site are not for another site.

    Args:
        own: settings of the run's SAE. makers: of what else is needed.

    Returns:
        Artifact ``compare``: ``edits.csv``, one row per method and class; ``methods.json``, which names the artifacts
        of kind ``method``, whose ``seconds.csv`` says how long they took; ``uses.json``, all that it is made of.
    """
    entries, networks = entries_of(settings), Retrained(context, {})
    if settings.retrained:
        networks = retrained_networks(context, settings, makers.without)
    run = Bed(context, settings, classifier, activations, networks)
    here = Bench(run, run, own.seed, sae, features)
    head = here
    if not all(entry.method.of_site for entry in entries.values()):
        last = replace(context, layer="last")
        there = makers.capture(last)
        head = replace(here, seed=context.seed)
        if there.key != activations.key:
            head = Bench(Bed(last, settings, classifier, there, networks), run, context.seed)
    benches: dict[str, Bench] = {}
    uses = [*networks.classifiers.values(), head.site.activations]
    for name, entry in entries.items():
        benches[name] = here if entry.method.of_site else head
        other = entry.sae_of(own)
        if other != own:
            its_sae, its_features = makers.sae(other)
            benches[name] = Bench(run, run, own.seed, its_sae, its_features)
            uses += [its_sae, its_features]
    with context.progress("comparing edits", len(entries)) as advance:
        made = {}
        for name, entry in entries.items():
            made[name] = benches[name].measured(name, entry.method)
            advance(1)
    if settings.retrained:
        made[RETRAINED] = here.bound()
    facts = {name: {"key": one.key, "digest": digest(one)} for name, one in made.items()}

    def make(folder: Path, _: Path) -> None:
        tables = [one.table(EDITS).assign(method=name) for name, one in made.items()]
        table = pd.concat(tables, ignore_index=True)
        write_table(folder / EDITS, table[["method", *[column for column in table if column != "method"]]])
        write_record(folder / "methods.json", {name: one.key for name, one in made.items()})
        by_kind: dict[str, list[str]] = {}
        for one in (*uses, *made.values()):
            by_kind.setdefault(one.kind, []).append(one.key)
        write_record(folder / USES, by_kind)

    return context.store.get_or_make("compare", {"methods": facts}, make)


def digest(method: Artifact) -> str:
    """Of what a method's artifact says of its edits, without the seconds."""
    return str(method.record("edits.json")["digest"])
