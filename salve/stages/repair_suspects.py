# SPDX-License-Identifier: MIT
"""What a repair is to take out: suspects that the settings name, or that the audit has ranked with labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from salve.artifacts import Artifact
from salve.editing.recalibrate import with_shifted_bias
from salve.repair_settings import RepairSettings
from salve.stages.context import StageContext
from salve.types import UserError

#: Methods that edit no latent.
WITHOUT_LATENTS = {"dfr", "leace"}
#: In place of a class's latents: all suspects that the audit lists for it.
AUDIT = "audit"


@dataclass(frozen=True)
class Suspects:
    """What a repair is to take out.

    Attributes:
        classes: labels of the classes that rely on it. latents, signs: the suspects, the worst first; none if no latent
            tells the attribute.
        value: index of the attribute's value that goes with the classes; None without labels.
        name: for files and tables.
    """

    classes: tuple[int, ...]
    latents: tuple[int, ...]
    signs: tuple[int, ...]
    value: int | None
    name: str


def suspects_of(context: StageContext, settings: RepairSettings, audit: Artifact, width: int) -> Suspects:
    """The suspects that the settings name, or those that the audit has ranked with labels.

    By itself a repair takes the value of the attribute that pulls images to some class most. Its classes are those that
    it pulls at least half as much to.

    Args:
        context: of the run. settings: of the stage. audit: its artifact. width: number of latents.

    Raises:
        UserError: the settings name no class or latent, or they name none and the audit had no labels.
    """
    table, record = audit.table("suspects.csv"), audit.record("audit.json")
    classes = context.classes
    if settings.suspects is not None:
        named = checked_suspects(settings, classes, width)
        for name, own in named.items():
            if own == AUDIT:
                rows = table[(table["class"] == name) & (table["score"] > 0)]
                named[name] = rows.sort_values("rank")["latent"].astype(int).tolist()
        signs = audit.tensors("signs.safetensors")["signs"]  # [C, d]
        latents = {latent: int(signs[classes.index(name), latent]) for name, own in named.items() for latent in own}
        labels = tuple(classes.index(name) for name in named)
        value = None
        if record["labels"]:
            value = record["values"].index(record["value"][labels[0]])
        return Suspects(labels, tuple(latents), tuple(latents.values()), value, " + ".join(named))
    assert record["labels"], "check_repair has refused this"
    pull = torch.tensor(record["pull"])
    worst = int(pull.argmax())
    value_name = record["value"][worst]
    chosen = [k for k in range(len(classes)) if record["value"][k] == value_name and pull[k] >= pull[worst] / 2]
    rows = table[table["class"].isin([classes[k] for k in chosen]) & (table["score"] > 0)]
    order = rows["score"] * rows["select_pull"]  # a class that is hardly pulled must not lead
    rows = rows.loc[order.sort_values(ascending=False).index].drop_duplicates("latent")
    if not len(rows) and not set(settings.methods) & WITHOUT_LATENTS:
        raise UserError(f"No latent tells {record['attribute']} and speaks for {classes[worst]}: nothing to repair.")
    return Suspects(
        *(tuple(chosen), tuple(map(int, rows["latent"])), tuple(map(int, rows["sign"]))),
        *(record["values"].index(value_name), f"{record['attribute']} {value_name}"),
    )


def check_repair(context: StageContext, settings: RepairSettings, labels: int, model: nn.Module, width: int) -> None:
    """Check what can be checked before an audit.

    Args:
        context, settings: of the run. labels: of the audit, of each group. model: the network.
        width: number of latents.

    Raises:
        UserError: suspects are not named and cannot be chosen, or a setting or the network does not allow a repair.
    """
    if settings.suspects is not None:
        checked_suspects(settings, context.classes, width)
    elif not labels or (context.data.groups("select") is None and context.data.pairs("select") is None):
        raise UserError(
            "Stage repair chooses suspects by itself only where the audit has labels (audit.labels, and data that know "
            "an attribute). Run stages=[audit,report], look at the suspects, and name what the network should not rely "
            f"on, such as repair.suspects={{{context.classes[0]}: [12, 40]}}."
        )
    for name in ("methods", "sizes", "strengths"):
        values = getattr(settings, name)
        if not values or (name != "methods" and not all(value > 0 for value in values)):
            raise UserError(f"repair.{name}={values} must be a list of at least one, all above 0.")
    with_shifted_bias(model, torch.arange(1), torch.zeros(1), {})  # which refuses a head without a bias


def checked_suspects(settings: RepairSettings, classes: Sequence[str], latents: int) -> dict[str, Any]:
    """The suspects that the settings name: by class a list of latents, or :data:`AUDIT`.

    Raises:
        UserError: they name no class, or no latent of it.
    """
    named = settings.suspects
    if not isinstance(named, Mapping) or not named:
        raise UserError(f"repair.suspects={named} must give latents by class, such as {{{classes[0]}: [12, 40]}}.")
    for name, own in named.items():
        if name not in classes:
            raise UserError(f"repair.suspects names {name}; the classes are {', '.join(classes)}.")
        if own == AUDIT:
            continue
        if not isinstance(own, Sequence) or not own or not all(isinstance(one, int) and one >= 0 for one in own):
            raise UserError(
                f"repair.suspects of {name} must be a list of latents, or {AUDIT} for all that it lists, not {own}."
            )
        if max(own) >= latents:
            raise UserError(f"repair.suspects of {name} names {max(own)}; latents go from 0 to {latents - 1}.")
    return {str(name): own if own == AUDIT else [int(one) for one in own] for name, own in named.items()}
