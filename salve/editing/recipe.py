"""Edits as small files: made, applied to a plain ``state_dict``, undone to the same bits (METHOD §4).

A recipe is a JSON record a person can read, and beside it a safetensors file with the contribution vectors (so that
applying needs no SAE) and the readers' weights as they were (multiplying by a gate cannot be undone by arithmetic).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salve.artifacts import digest_of_tensors, load_tensors, read_record, save_tensors, write_record
from salve.backbones.sites import Site
from salve.editing.gate import Channels, Mode, Scale, contribution, gate
from salve.sae import SAE, fingerprint
from salve.types import UserError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Edit:
    """One latent, one strength.

    Attributes:
        latent: index in the SAE. alpha: strength ≥ 0, +inf allowed for ``suppress``. mode, scale, channels, sign: see
            :mod:`salve.editing.gate`.
    """

    latent: int
    alpha: float
    mode: Mode = "suppress"
    scale: Scale = "unit"
    channels: Channels = "all"
    sign: int = 1


@dataclass(frozen=True)
class Recipe:
    """A permanent edit of one model.

    Attributes:
        backbone: what the model is, for people. site: name of the site. readers: module paths whose input channels
            are scaled. sae: fingerprint of the SAE. edits: what is done; their gates multiply.
        before, after: digests of the whole ``state_dict``.
        contributions: ``[E, M]``, one row per edit. originals: the readers' weights before.
    """

    backbone: str
    site: str
    readers: tuple[str, ...]
    sae: str
    edits: tuple[Edit, ...]
    before: str
    after: str
    contributions: Tensor
    originals: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if len(self.contributions) != len(self.edits):
            raise ValueError(f"{len(self.edits)} edits, but {len(self.contributions)} contribution vectors.")
        if set(self.originals) != {f"{reader}.weight" for reader in self.readers}:
            raise ValueError(f"The original weights {sorted(self.originals)} are not those of {self.readers}.")
        if any(edit.alpha > 0 for edit in self.edits) == (self.before == self.after):
            raise UserError(
                f"This edit would leave the model as it is: at the site {self.site}, the latents "
                f"{[edit.latent for edit in self.edits]} scale no weight that is not zero."
            )

    def gate(self) -> Tensor:
        """The product of the edits' gates ``[M]``."""
        each = [gate(row, edit.alpha, edit.mode) for row, edit in zip(self.contributions, self.edits, strict=True)]
        return torch.stack(each).prod(dim=0)


def make_recipe(model: nn.Module, site: Site, sae: SAE, edits: Sequence[Edit], backbone: str) -> Recipe:
    """The recipe of one or more edits of a model; the model itself is not touched.

    Raises:
        UserError: no such latent, a strength out of range, an edit that would change nothing.
    """
    if sae.width != site.width:
        raise UserError(f"This SAE reads {sae.width} channels, but the site {site.name} has {site.width}.")
    rows = [contribution(sae.decoder, e.latent, e.scale, e.channels, e.sign) for e in edits]
    contributions = torch.stack(rows).detach()
    state = model.state_dict()
    originals = {f"{reader}.weight": state[f"{reader}.weight"].clone() for reader in site.readers}
    whole = torch.stack([gate(c, e.alpha, e.mode) for c, e in zip(contributions, edits, strict=True)]).prod(dim=0)
    before, after = digest_of_tensors(state), digest_of_tensors(_scaled(state, originals, whole))
    return Recipe(
        backbone, site.name, site.readers, fingerprint(sae), tuple(edits), before, after, contributions, originals
    )


def _scaled(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], gate: Tensor) -> State:
    """``state`` with input channel ``j`` of each weight ``[out, M, ...]`` scaled by ``gate[j]``."""
    edited = dict(state)
    for name, weight in weights.items():
        shape = (1, -1) + (1,) * (weight.ndim - 2)
        edited[name] = weight * gate.to(weight.dtype).reshape(shape)
    return edited


def apply_recipe(recipe: Recipe, state: Mapping[str, Tensor]) -> State:
    """The edited ``state_dict``; its tensors other than the readers' weights are the ones passed in.

    Raises:
        UserError: these are not the weights that the recipe was made for, or are edited already.
    """
    found = digest_of_tensors(state)
    if found == recipe.after != recipe.before:
        raise UserError("These weights carry this edit already; undo it before applying it again.")
    if found != recipe.before:
        raise UserError(
            f"These weights are not the ones that the recipe was made for ({recipe.backbone}, checksum "
            f"{recipe.before[:12]}…, these have {found[:12]}…)."
        )
    edited = _scaled(state, {name: state[name] for name in recipe.originals}, recipe.gate())
    return _proven(edited, recipe.after)


def undo_recipe(recipe: Recipe, state: Mapping[str, Tensor]) -> State:
    """The ``state_dict`` as it was before the edit, bit for bit.

    Raises:
        UserError: these weights are not what the recipe left.
    """
    found = digest_of_tensors(state)
    if found != recipe.after:
        raise UserError(
            f"These weights are not what the recipe left (checksum {recipe.after[:12]}…, these have {found[:12]}…), "
            "so it cannot be undone on them."
        )
    return _proven({**state, **{name: weight.clone() for name, weight in recipe.originals.items()}}, recipe.before)


def _proven(state: State, expected: str) -> State:
    if (found := digest_of_tensors(state)) != expected:
        raise RuntimeError(f"The result has checksum {found[:12]}… instead of {expected[:12]}…: the recipe is damaged.")
    return state


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write ``path`` (JSON) and, beside it, the same name with ``.safetensors``."""
    record: dict[str, Any] = {
        "format": "salve-recipe-1",
        **{name: getattr(recipe, name) for name in ("backbone", "site", "sae", "before", "after")},
        "readers": list(recipe.readers),
        # JSON has no infinity.
        "edits": [
            {**asdict(edit), "alpha": "inf" if edit.alpha == float("inf") else edit.alpha} for edit in recipe.edits
        ],
    }
    tensors = {"contributions": recipe.contributions} | {f"original.{k}": v for k, v in recipe.originals.items()}
    save_tensors(path.with_suffix(".safetensors"), tensors)
    write_record(path, record)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: a file is missing, or is no recipe.
    """
    beside = path.with_suffix(".safetensors")
    for file in (path, beside):
        if not file.is_file():
            raise UserError(f"There is no {file}; a recipe is a .json file and a .safetensors file of the same name.")
    try:
        record = read_record(path)
    except ValueError as error:
        raise UserError(f"{path} is no recipe: {error}") from error
    if record.get("format") != "salve-recipe-1":
        raise UserError(f"{path} is no recipe of this version of salve.")
    tensors = load_tensors(beside)
    prefix = "original."
    return Recipe(
        backbone=record["backbone"],
        site=record["site"],
        readers=tuple(record["readers"]),
        sae=record["sae"],
        edits=tuple(Edit(**{**edit, "alpha": float(edit["alpha"])}) for edit in record["edits"]),
        before=record["before"],
        after=record["after"],
        contributions=tensors["contributions"],
        originals={name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)},
    )
