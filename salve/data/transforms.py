# SPDX-License-Identifier: MIT
"""From a decoded image to the normalised tensor that a backbone reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from salve.data.decode import to_rgb
from salve.types import Images, UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RawImage = Image.Image | Tensor


def to_uint8_tensor(image: RawImage) -> Tensor:
    """Convert a PIL image of any mode to a uint8 tensor ``[3, H, W]``; such a tensor is returned as it is.

    Raises:
        UserError: a tensor of another shape or dtype.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise UserError(
                f"An image tensor must be uint8 of shape [3, H, W], not {image.dtype} of shape {list(image.shape)}."
            )
        return image
    return F.pil_to_tensor(to_rgb(image))


@dataclass(frozen=True)
class Preprocess:
    """How images are prepared for a backbone.

    Attributes:
        size: side of the square that the backbone reads, in pixels.
        resize: length of the shorter side, in pixels, before the centre crop of ``size``; None squashes the whole image
            to ``size × size``.
        interpolation: "bilinear" or "bicubic", with antialiasing.
        mean, std: of the three channels, on the 0..1 scale.

    Raises:
        UserError: a value outside its range.
    """

    size: int
    resize: int | None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"preprocess.size={self.size} must be at least 1 pixel.")
        if self.resize is not None and self.resize < self.size:
            raise UserError(
                f"preprocess.resize={self.resize} must be at least preprocess.size={self.size}: the centre crop must "
                "lie inside the image."
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"preprocess.interpolation={self.interpolation} must be bilinear or bicubic.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("preprocess.mean and preprocess.std must have three values each, and those of std above 0.")

    def describe(self) -> str:
        """Size and interpolation in words, such as "resize 256, crop 224, bicubic"."""
        if self.resize is None:
            return f"squashed to {self.size} × {self.size}, {self.interpolation}"
        return f"resize {self.resize}, crop {self.size}, {self.interpolation}"

    def eval_transform(self) -> Callable[[RawImage], Tensor]:
        """A deterministic transform: PIL image or uint8 ``[3, H, W]`` → normalised float32 ``[3, size, size]``."""
        return v2.Compose([to_uint8_tensor, *self._fit(), *self._to_float()])

    def moved(self, boxes: Float[Tensor, "B 4"], width: int, height: int) -> Float[Tensor, "B 4"]:
        """Where boxes of an image lie after :meth:`eval_transform`, in pixels of what the backbone reads.

        Args:
            boxes: ``[B, 4]``, ``x0, y0, x1, y1`` in pixels of the image. width, height: of the image.

        Returns:
            ``[B, 4]``, cut off at the border; one that is cropped away has no area.
        """
        inside = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        return v2.Compose(self._fit())(inside).as_subclass(Tensor)

    def moved_masks(self, masks: Bool[Tensor, "n H W"]) -> Bool[Tensor, "n S S"]:
        """Where masks of images lie after :meth:`eval_transform`: each pixel is that of the mask nearest to its centre.

        Args:
            masks: of images of one size.
        """
        # Not tv_tensors.Mask: torchvision moves it by "nearest", which lies up to half a pixel beside the image.
        return v2.Compose(self._fit(InterpolationMode.NEAREST_EXACT))(masks.to(torch.uint8)).bool()

    def train_transform(self, min_scale: float = 0.35) -> Callable[[RawImage], Tensor]:
        """As :meth:`eval_transform`, with a random resized crop and a random flip (torch's global generator).

        Args:
            min_scale: smallest share of the image's area that a crop keeps, in (0, 1]. The default suits photographs
                whose subject fills the frame; small objects near the border need a larger one.

        Raises:
            UserError: ``min_scale`` is out of range.
        """
        if not 0 < min_scale <= 1:
            raise UserError(
                f"min_scale={min_scale} must lie in (0, 1]; it is the share of the image that a crop keeps."
            )
        crop = v2.RandomResizedCrop(
            self.size, scale=(min_scale, 1.0), interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        return v2.Compose([to_uint8_tensor, crop, v2.RandomHorizontalFlip(), *self._to_float()])

    def denormalise(self, images: Images) -> Images:
        """Undo the normalisation: ``x · std + mean``, clamped to [0, 1], for images to be shown."""
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        return (images * std + mean).clamp(0, 1)

    def _fit(self, mode: InterpolationMode | None = None) -> list[Callable]:
        """Bring an image of any size to ``[3, size, size]``; ``mode`` in place of its own interpolation."""
        mode = mode or InterpolationMode(self.interpolation)
        if self.resize is None:
            return [v2.Resize((self.size, self.size), interpolation=mode, antialias=True)]
        return [v2.Resize(self.resize, interpolation=mode, antialias=True), v2.CenterCrop(self.size)]

    def _to_float(self) -> list[Callable]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
