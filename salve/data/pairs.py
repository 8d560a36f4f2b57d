# SPDX-License-Identifier: MIT
"""Pairs of images that differ in a shortcut alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salve.data.base import RawImages


@dataclass(frozen=True)
class Pairs:
    """Every image of a split, without a shortcut and with it; all else in the two is the same.

    Attributes:
        name: of the shortcut, such as "tag".
        without: the images without it, in the order of the split's labels. with_mark: the same images with it.

    Raises:
        ValueError: the two differ in length.
    """

    name: str
    without: "RawImages"
    with_mark: "RawImages"

    def __post_init__(self) -> None:
        if len(self.without) != len(self.with_mark):
            raise ValueError(f"{len(self.without)} images without {self.name} and {len(self.with_mark)} with it.")
