# SPDX-License-Identifier: MIT
"""Additions: edits that give tensors of a network new values, by whatever method these were found.

Steering, erasing, fine-tuning and others end in new weights and biases. What such an edit adds to a tensor is the
difference ``Δ = new − original``, so that it can be stacked with others: see :mod:`salve.editing.applying`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from salve.artifacts import digest_of
from salve.editing.edits import EditFile, HeldEdit, checksum, checksums
from salve.types import UserError
from salve.untrusted import shown, some
from salve.values import LARGEST


class Stamp(NamedTuple):
    """Tells the new values of a tensor apart from others.

    Attributes:
        shape: of the tensor. checksum: see :func:`salve.editing.edits.checksums`.
    """

    shape: tuple[int, ...]
    checksum: str


@dataclass(frozen=True, eq=False)
class HeldAddition(HeldEdit):
    """New values of tensors, without these values.

    Attributes:
        method: how they were found, such as ``steering``; for people. alpha: the strength of the method; for people.
        changed: name → stamp of the tensor's new values.

    Raises:
        UserError: the method is not named, or the strength is no finite number.
    """

    method: str
    alpha: float
    changed: Mapping[str, Stamp]

    def __post_init__(self) -> None:
        if not self.method:
            raise UserError("An addition must say by which method it was made.")
        if not abs(self.alpha) <= LARGEST:
            raise UserError(f"The strength α of an addition must be a number, not {self.alpha:g}.")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that have new values."""
        return tuple(self.changed)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of the method."""
        return (self.alpha,)

    @property
    def summary(self) -> str:
        """The method and its strength."""
        return f"{self.method} at α = {self.alpha:g}"

    @cached_property
    def key(self) -> str:
        """Identifies the addition: it is the same for the same network and new values."""
        return digest_of({"before": self.before, "changed": self._sums})[:16]

    @property
    def file_of_changes(self) -> str:
        """Name of the file that holds the new values, beside the edit file; their digest is in it."""
        return f"changes-{digest_of(self._sums)[:12]}.safetensors"

    @property
    def _sums(self) -> dict[str, str]:
        return {name: stamp.checksum for name, stamp in self.changed.items()}


@dataclass(frozen=True, eq=False)
class AdditionFile(HeldAddition, EditFile):
    """New values of tensors, with what applying and undoing them needs.

    Attributes:
        edited: name → the new values, float32: those that the tensor has under this edit alone.

    Raises:
        UserError: new values are not finite, do not fit the network, are not those of their stamps, or change nothing.
    """

    edited: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        HeldAddition.__post_init__(self)
        EditFile.__post_init__(self)
        if set(self.edited) != set(self.changed):
            raise UserError(f"The new values are of {some(sorted(self.edited))}, not of {some(sorted(self.changed))}.")
        for name, tensor in self.edited.items():
            shape, expected = tuple(tensor.shape), tuple(self.originals[name].shape)
            if shape != expected:
                raise UserError(f"The new values of {shown(name)} have the shape {shape}, but it has {expected}.")
            if tensor.dtype != torch.float32:
                raise UserError(f"The new values of {shown(name)} are not float32.")
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"The new values of {shown(name)} hold NaN, infinity, or numbers that float32 cannot hold."
                )
            if not bool(self.originals[name].isfinite().all()):
                raise UserError(f"{shown(name)} of the network holds NaN or infinity, so that it cannot be edited.")
        if stamps(self.edited) != dict(self.changed):
            raise UserError("The new values do not have the checksums that the edit states.")
        if self.before == self.after:
            raise UserError("This edit would not change the model: all new values are those that it has.")

    @cached_property
    def after(self) -> str:
        """Checksum of the network with only this edit, in float32."""
        return checksum({**self.weights, **self._sums})

    def at(self, alpha: float) -> "AdditionFile":
        """Refuse another strength: the file holds weights, and only the method knows those at another one.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"The edit {shown(self.title)} cannot be set to α = {alpha:g}, because its file holds the new weights at "
            "one strength only; make another edit file with its method."
        )


def stamps(edited: Mapping[str, Tensor]) -> dict[str, Stamp]:
    """Name → stamp of new values."""
    return {name: Stamp(tuple(tensor.shape), checksums({"": tensor})[""]) for name, tensor in edited.items()}
