# SPDX-License-Identifier: MIT
"""Targets of edits: each class's latent, and sets of latents. Shared by the stages that edit."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact
from salve.edit_settings import EditSettings
from salve.editing import contribution
from salve.editing.methods import Target
from salve.types import Labels, UserError


def targets_of(classes: Sequence[str], features: Artifact, sets: Sequence[Sequence[Any]]) -> list[Target]:
    """One target for each class that has a latent, then one for each set of ``edit.sets``.

    Raises:
        UserError: a set names neither a class nor a latent, or no class has a latent.
    """
    selected = features.table("selected.csv")
    latents = features.table("latents.csv")
    targets = []
    for k, row in enumerate(selected.itertuples()):
        if not pd.isna(row.latent):
            targets.append(Target(classes[k], (k,), (int(row.latent),), (int(row.sign),), (str(row.kind),)))
    if not targets:
        raise UserError(
            "No latent of the SAE fires for an image of any class, so there is nothing to edit; lower sae.sparsity, or "
            "train for more steps."
        )
    by_name = {target.name: target for target in targets}

    def member_of_set(member: Any) -> Target:
        if str(member) in by_name:
            return by_name[str(member)]
        if isinstance(member, int) and 0 <= member < len(latents):
            row = latents.iloc[member]
            owners = tuple(k for k, name in enumerate(classes) if name == row["top_class"])
            return Target(f"latent {member}", owners, (member,), (int(row["sign"]),), (str(row["kind"]),))
        raise UserError(
            f"edit.sets names {member}, which is neither a class ({', '.join(by_name)}) nor a latent "
            f"from 0 to {len(latents) - 1}."
        )

    for members in sets:
        parts = [member_of_set(member) for member in members]
        # Two classes may share a latent, which is edited once.
        latent = {part.latents[0]: (part.signs[0], part.kinds[0]) for part in parts}
        targets.append(
            Target(
                " + ".join(part.name for part in parts),
                tuple(dict.fromkeys(k for part in parts for k in part.classes)),
                tuple(latent),
                tuple(sign for sign, _ in latent.values()),
                tuple(kind for _, kind in latent.values()),
            )
        )
    return targets


def balanced(labels: Labels, per_class: int) -> list[int]:
    """Draw a sample of images with equally many of each class.

    It is the same in every run. What is drawn of a class depends on no other class, and a smaller sample is part of a
    larger one.

    Args:
        labels: ``[N]`` of a split. per_class: images of each class, at most.

    Returns:
        Numbers of images in the split, rising.
    """
    chosen: list[int] = []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(label))
        chosen += own[order[:per_class]].tolist()
    return sorted(chosen)


def contributions_of(decoder: Tensor, target: Target, settings: EditSettings) -> Tensor:
    """The contribution vectors ``[S, M]`` of a target's latents."""
    rows = [
        contribution(decoder, latent, settings.scale, settings.channels, sign)  # type: ignore[arg-type]
        for latent, sign in zip(target.latents, target.signs, strict=True)
    ]
    return torch.stack(rows)


def refuse_aligned_on_signed(settings: EditSettings, activations: Artifact) -> None:
    """Raise UserError for ``edit.channels=aligned`` where activations can be negative: see :func:`refuse_signed`."""
    record = activations.record("activations.json")
    if settings.channels == "aligned" and not record["nonnegative"]:
        raise refuse_signed(record["site"])


def refuse_signed(site: str) -> UserError:
    """The error for aligned edits at a site with negative activations, where either sign can carry the class."""
    return UserError(
        f"edit.channels=aligned needs activations that are never negative, but some at {site} are; use "
        "edit.channels=all."
    )
