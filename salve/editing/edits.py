# SPDX-License-Identifier: MIT
"""Edits as values: what an edit says of itself, and what undoing it needs besides.

There are two kinds. *Gates* scale the input channels of a site's readers (docs/method.md, Control). An *addition*
(:mod:`salve.editing.additions`) gives any tensors of the network new values. Both are applied and undone by
:mod:`salve.editing.applying`. A :class:`HeldEdit` is what a file of edited weights says of an edit; an
:class:`EditFile` has the original weights too.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from salve.artifacts import digest_of, digest_of_tensors
from salve.backbones.site import Reader
from salve.editing.gating import Channels, Mode, Scale, gate
from salve.types import UserError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Edit:
    """One latent at one strength.

    Attributes:
        latent: index in the SAE. alpha: strength ≥ 0, or +inf for ``suppress``.
        mode, scale, channels, sign: see :mod:`salve.editing.gating`.
    """

    latent: int
    alpha: float
    mode: Mode = "suppress"
    scale: Scale = "unit"
    channels: Channels = "all"
    sign: int = 1


@dataclass(frozen=True, eq=False)
class HeldEdit(ABC):
    """An edit of one network, without the weights that undoing needs; a file of edited weights holds such records.

    Attributes:
        name: what it acts on, such as a class; may be empty. backbone: the network, for people.
        site: name of the site; may be empty for an addition. before: checksum of the network that it was made for.
    """

    name: str
    backbone: str
    site: str
    before: str

    @property
    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that it changes."""

    @property
    @abstractmethod
    def strengths(self) -> tuple[float, ...]:
        """Its strengths α."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it does, at which strength, in a few words."""

    @property
    def title(self) -> str:
        """What a message calls it, such as ``church: suppress latent 3 at α = 2``."""
        return f"{self.name}: {self.summary}" if self.name else self.summary

    @property
    @abstractmethod
    def key(self) -> str:
        """Identifies the edit: it is the same for the same change of the same network, whatever it is called."""

    def is_same_but_for_strength(self, other: "HeldEdit") -> bool:
        """Whether both are the same edit of the same network, perhaps at different strengths."""
        return self.key == other.key


@dataclass(frozen=True, eq=False)
class EditFile(HeldEdit):
    """An edit of one network, with what applying and undoing it needs.

    Attributes:
        weights: name → checksum of every tensor of the network (:func:`checksums`).
        originals: name → the tensors that it changes, without edits, float32.
    """

    weights: Mapping[str, str]
    originals: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if set(self.originals) != set(self.tensors):
            raise ValueError(f"The original weights {sorted(self.originals)} are not {self.tensors}.")

    @property
    @abstractmethod
    def after(self) -> str:
        """Checksum of the network with only this edit, in float32."""

    @abstractmethod
    def at(self, alpha: float) -> "EditFile":
        """The same edit at another strength.

        Raises:
            UserError: the edit has no such strength; an addition has only that of its file.
        """


@dataclass(frozen=True, eq=False)
class HeldGates(HeldEdit):
    """Edits of latents that belong together; their gates multiply.

    Attributes:
        readers: the weights whose input channels are scaled. sae: fingerprint of the SAE. edits: ``E`` edits.
        contributions: ``[E, M]`` float32, one row per edit.
    """

    readers: tuple[Reader, ...]
    sae: str
    edits: tuple[Edit, ...]
    contributions: Tensor

    def __post_init__(self) -> None:
        if len(self.contributions) != len(self.edits):
            raise ValueError(f"{len(self.edits)} edits, but {len(self.contributions)} contribution vectors.")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the weights that are scaled."""
        return tuple(reader.weight for reader in self.readers)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of each edit."""
        return tuple(edit.alpha for edit in self.edits)

    @property
    def summary(self) -> str:
        """Each edit's mode, latent and strength."""
        return ", ".join(f"{edit.mode} latent {edit.latent} at α = {edit.alpha:g}" for edit in self.edits)

    @cached_property
    def key(self) -> str:
        """Identifies the edits: it is the same for the same network, site, latents and strengths."""
        facts = {name: getattr(self, name) for name in ("site", "sae", "before")}
        # Standard JSON has no infinity.
        edits = [{**asdict(edit), "alpha": repr(float(edit.alpha))} for edit in self.edits]
        rows = digest_of_tensors({"contributions": self.contributions})
        readers = {reader.weight: reader.groups for reader in self.readers}
        return digest_of({**facts, "readers": readers, "edits": edits, "contributions": rows})[:16]

    def gates(self) -> Tensor:
        """The gates of the edits, ``[E, M]``."""
        rows = zip(self.contributions, self.edits, strict=True)
        return torch.stack([gate(row, edit.alpha, edit.mode) for row, edit in rows])

    def fits(self, reader: Reader, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape, as this reader reads it, has as many input channels as the gates."""
        channels, groups = self.contributions.shape[1], reader.groups
        return len(shape) >= 2 and shape[1] * groups == channels and shape[0] % groups == 0

    def is_same_but_for_strength(self, other: HeldEdit) -> bool:
        """Whether both are the same edits of the same network, perhaps at different strengths."""
        return isinstance(other, HeldGates) and _at_zero(self).key == _at_zero(other).key


@dataclass(frozen=True, eq=False)
class GateFile(HeldGates, EditFile):
    """Edits of latents, with what applying and undoing them needs.

    Raises:
        UserError: the contributions do not fit the weights, or the edit would change nothing.
    """

    def __post_init__(self) -> None:
        HeldGates.__post_init__(self)
        EditFile.__post_init__(self)
        for reader in self.readers:
            shape, groups = tuple(self.originals[reader.weight].shape), reader.groups
            if not self.fits(reader, shape):
                in_groups = f" in {groups} groups" if groups > 1 else ""
                raise UserError(
                    f"The edit has {self.contributions.shape[1]} channels, but {reader.weight} has the shape {shape}"
                    f"{in_groups}."
                )
        if any(edit.alpha > 0 for edit in self.edits) == (self.before == self.after):
            raise UserError(
                f"This edit would not change the model: at the site {self.site}, all weights that the latents "
                f"{[edit.latent for edit in self.edits]} scale are zero."
            )

    @cached_property
    def after(self) -> str:
        """Checksum of the network with only these edits, in float32."""
        gated = {name: scaled(weight, [self], name, torch.float32) for name, weight in self.originals.items()}
        return checksum({**self.weights, **checksums(gated)})

    def at(self, alpha: float) -> "GateFile":
        """The same edits, all at another strength.

        Raises:
            UserError: the strength is negative, NaN, or infinite for ``enhance``.
        """
        return self.with_edits(tuple(replace(edit, alpha=float(alpha)) for edit in self.edits))

    def with_edits(self, edits: tuple[Edit, ...]) -> "GateFile":
        """The same edit file with other edits of the same latents, such as at other strengths."""
        return replace(self, edits=edits)


def _at_zero(held: HeldGates) -> HeldGates:
    facts = {name: getattr(held, name) for name in HeldGates.__dataclass_fields__}
    return HeldGates(**{**facts, "edits": tuple(replace(edit, alpha=0.0) for edit in held.edits)})


def scaled(weight: Tensor, held: Sequence[HeldGates], name: str, dtype: torch.dtype) -> Tensor:
    """The original weight ``[out, M / groups, …]`` with its input channels scaled by all gates, as ``dtype``."""
    readers = {edit: reader for edit in held for reader in edit.readers if reader.weight == name}
    gates = [edit.gates() for edit in readers]  # each [E, M]
    wide = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
    if gates:
        # Sorted, so that the product has the same bits in whatever order the edits came.
        factor = torch.cat(gates).sort(dim=0).values.prod(dim=0)  # [M]
        wide = next(iter(readers.values())).scaled(wide, factor.to(wide.dtype))
    return wide.to(dtype)


def checksums(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → checksum of a tensor's shape and of its values in float32 (of its bits, if it is not floating-point).

    BatchNorm's counters are left out, because many files lack them.
    """
    found = {}
    for name, tensor in state.items():
        if not is_counter(name):
            found[name] = digest_of_tensors({"": tensor.float() if tensor.is_floating_point() else tensor})[:32]
    return found


def is_counter(name: str) -> bool:
    """Whether a tensor counts batches for BatchNorm; a network in eval mode does not read it."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def checksum(weights: Mapping[str, str]) -> str:
    """One checksum of a network, from the checksums of its tensors."""
    return digest_of(dict(weights))
