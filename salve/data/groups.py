# SPDX-License-Identifier: MIT
"""Groups of images: an attribute beside the class, such as whether a tag is there or what lies behind the object."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from salve.types import Labels

#: Values of an attribute that is there or not, in this order.
ABSENT_PRESENT = ("absent", "present")


@dataclass(frozen=True)
class Groups:
    """The value of an attribute for each image of a split. A group is a class together with a value.

    Attributes:
        name: of the attribute, such as "place".
        values: names of its V values, such as "land" and "water".
        of_image: ``[N]`` (int64), an index into ``values`` for each image; −1 where the value is unknown.

    Raises:
        ValueError: no values, a wrong shape or dtype, or an index outside of −1 to V − 1.
    """

    name: str
    values: tuple[str, ...]
    of_image: Int[Tensor, " N"]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise ValueError(f"values {self.values} must be different names, and at least one.")
        if self.of_image.ndim != 1 or self.of_image.dtype != torch.int64:
            raise ValueError(f"of_image must be int64 [N], not {self.of_image.dtype} {list(self.of_image.shape)}.")
        if len(self.of_image) and not -1 <= int(self.of_image.min()) <= int(self.of_image.max()) < len(self.values):
            raise ValueError(f"of_image must lie in −1 to {len(self.values) - 1}.")

    def numbered(self, labels: Labels) -> Int[Tensor, " N"]:
        """The group of each image: ``label · V + value``, or −1 where the value is unknown.

        Args:
            labels: ``[N]``, of the same images.
        """
        return torch.where(self.of_image < 0, -1, labels * len(self.values) + self.of_image)

    def named(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """Class and value of each of the C · V groups, in the order of :meth:`numbered`."""
        return [(of_class, value) for of_class in classes for value in self.values]
