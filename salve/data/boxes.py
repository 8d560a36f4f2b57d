# SPDX-License-Identifier: MIT
"""Boxes that people drew around the objects of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from salve.data.transforms import Preprocess


@dataclass(frozen=True)
class Boxes:
    """Boxes around the object that an image's class names, in some images of a split.

    Attributes:
        of_image: by number of the image in the split, ``[B, 4]`` float64: ``x0, y0, x1, y1`` in pixels of the stored
            image, where pixel number x covers x to x + 1.
        sizes: width and height of the same images.
    """

    of_image: Mapping[int, Float[Tensor, "B 4"]]
    sizes: Mapping[int, tuple[int, int]]

    def seen(self, image: int, preprocess: Preprocess) -> Float[Tensor, "b 4"]:
        """The boxes of an image as a backbone reads it, in its pixels; those that are cropped away are left out."""
        moved = preprocess.moved(self.of_image[image], *self.sizes[image])
        return moved[(moved[:, 2:] > moved[:, :2]).all(dim=1)]

    def masks(self, images: Sequence[int], preprocess: Preprocess) -> Bool[Tensor, "n S S"]:
        """The pixels of preprocessed images whose centres lie in a box."""
        centres = torch.arange(preprocess.size, dtype=torch.float64) + 0.5
        found = torch.zeros(len(images), preprocess.size, preprocess.size, dtype=torch.bool)
        for mask, image in zip(found, images, strict=True):
            for x0, y0, x1, y1 in self.seen(image, preprocess):
                mask |= ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))
        return found
