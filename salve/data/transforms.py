"""From any decoded image to the normalised tensor that a backbone reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from salve.data.decode import to_rgb
from salve.types import Images, UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RawImage = Image.Image | Tensor


def to_uint8_tensor(image: RawImage) -> Tensor:
    """A PIL image of any mode, or a uint8 tensor `[3, H, W]` (returned as it is), as a uint8 tensor `[3, H, W]`.

    Raises:
        UserError: a tensor of another shape or dtype.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise UserError(
                f"an image tensor must be uint8 of shape [3, H, W], not {image.dtype} of shape {list(image.shape)}"
            )
        return image
    return F.pil_to_tensor(to_rgb(image))


@dataclass(frozen=True)
class Preprocess:
    """How a backbone wants its images.

    Attributes:
        size: side of the square the backbone reads, in pixels.
        resize: length of the shorter side, in pixels, before the centre crop of `size`; None squashes the whole image
            straight to `size × size`.
        interpolation: "bilinear" or "bicubic", always antialiased.
        mean, std: of the three channels, on the 0..1 scale.
    """

    size: int
    resize: int | None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"preprocess.size must be at least 1 pixel, not {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise UserError(
                f"preprocess.resize ({self.resize}) must not be below preprocess.size ({self.size}), "
                "or the centre crop would reach outside the image"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"preprocess.interpolation must be bilinear or bicubic, not {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("preprocess.mean and preprocess.std need three values each, and std only positive ones")

    def describe(self) -> str:
        """The geometry in words, such as "resize 256, crop 224, bicubic"."""
        if self.resize is None:
            return f"squashed to {self.size} × {self.size}, {self.interpolation}"
        return f"resize {self.resize}, crop {self.size}, {self.interpolation}"

    def eval_transform(self) -> Callable[[RawImage], Tensor]:
        """PIL image or uint8 `[3, H, W]` → normalised float32 `[3, size, size]`; deterministic."""
        mode = InterpolationMode(self.interpolation)
        steps: list[Callable] = [to_uint8_tensor]
        if self.resize is None:
            steps.append(v2.Resize((self.size, self.size), interpolation=mode, antialias=True))
        else:
            steps.append(v2.Resize(self.resize, interpolation=mode, antialias=True))
            steps.append(v2.CenterCrop(self.size))
        return v2.Compose([*steps, *self._to_float()])

    def train_transform(self, min_scale: float = 0.35) -> Callable[[RawImage], Tensor]:
        """As `eval_transform`, but a random resized crop and a random horizontal flip (torch's global generator).

        Args:
            min_scale: smallest share of the image's area that a crop may keep, in (0, 1]. The default suits
                photographs, whose subject fills the frame; small objects away from the centre need a larger one.
        """
        if not 0 < min_scale <= 1:
            raise UserError(f"the smallest crop must keep a share of the image in (0, 1], not {min_scale}")
        crop = v2.RandomResizedCrop(
            self.size, scale=(min_scale, 1.0), interpolation=InterpolationMode(self.interpolation), antialias=True
        )
        return v2.Compose([to_uint8_tensor, crop, v2.RandomHorizontalFlip(), *self._to_float()])

    def denormalise(self, images: Images) -> Images:
        """Undo the normalisation: `x · std + mean`, clamped to [0, 1] so that the result can be shown."""
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        return (images * std + mean).clamp(0, 1)

    def _to_float(self) -> list[Callable]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(self.mean), list(self.std))]
