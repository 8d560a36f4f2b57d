# SPDX-License-Identifier: MIT
"""The corruptions of ImageNet-C (Hendrycks & Dietterich 2019): 15 kinds, each in five severities.

The package imagecorruptions-imaug draws them, a kept fork of imagecorruptions. It takes any size from 32 pixels. Widths
of blurs and the like are in pixels, so that a severity is harsher on a small image than on a large one.
"""

import contextlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from salve.data.base import RawImages
from salve.data.transforms import to_uint8_tensor
from salve.types import UserError

#: In the order of the benchmark: noise, blur, weather, digital. A kind's place is part of its seeds.
KINDS: tuple[str, ...] = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
#: Kinds that draw from a generator of their own, which is given its seed; the others draw from numpy's global one.
_OWN_GENERATOR = ("impulse_noise", "glass_blur")
_SMALLEST = 32  # pixels
_PACKAGE = "imagecorruptions-imaug"


class CorruptedImages:
    """Images with one corruption, uint8 ``[3, H, W]`` of the same size, and their labels; see :func:`corrupted`."""

    def __init__(self, raw: RawImages, kind: str, severity: int, seed: int) -> None:
        self.raw = raw
        self.kind = kind
        self.severity = severity
        self.seed = seed

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode and corrupt one image.

        Raises:
            UserError: the image is smaller than 32 pixels.
        """
        if index < 0:  # else the same image would have two seeds
            index += len(self)
        image, label = self.raw[index]
        pixels = to_uint8_tensor(image)
        height, width = pixels.shape[1:]
        if min(height, width) < _SMALLEST:
            raise UserError(
                f"Image {index} has {width} × {height} pixels; corruptions need at least {_SMALLEST} on each side."
            )
        own = image_seed(self.seed, self.kind, self.severity, index)
        drawn = _drawn(pixels.permute(1, 2, 0).contiguous().numpy(), self.kind, self.severity, own)
        return torch.from_numpy(drawn.transpose(2, 0, 1).copy()), label


def corrupted(raw: RawImages, kind: str, severity: int, seed: int) -> CorruptedImages:
    """The same images, in the same order, with one corruption, drawn when they are asked for.

    The corruption of image i depends on ``seed``, ``kind``, ``severity`` and i only.

    Args:
        raw: decoded images with labels.
        kind: of ``KINDS``.
        severity: 1 (mild) to 5 (harsh).
        seed: of all drawing, from 0.

    Raises:
        UserError: an unknown kind, a severity or seed out of range, or the package that draws is not installed.
    """
    if kind not in KINDS:
        raise UserError(f"There is no corruption {kind!r}; the kinds are {', '.join(KINDS)}.")
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity} of {kind} must be a whole number from 1 (mild) to 5 (harsh).")
    if seed < 0:
        raise UserError(f"The seed of corruptions, {seed}, must be at least 0.")
    check_installed()
    return CorruptedImages(raw, kind, int(severity), seed)


def image_seed(seed: int, kind: str, severity: int, index: int) -> int:
    """The seed of one image's corruption, 32 bits of a hash of all four."""
    return int(np.random.SeedSequence([seed, KINDS.index(kind), severity, index]).generate_state(1)[0])


def check_installed() -> None:
    """Check that the package is there.

    Raises:
        UserError: it is not installed.
    """
    _library()


def _library() -> Callable[..., NDArray[Any]]:
    """The package's function.

    Raises:
        UserError: it is not installed.
    """
    try:
        version(_PACKAGE)  # the original has the same modules, but fails with NumPy 2
        from imagecorruptions import corrupt
    except (PackageNotFoundError, ImportError) as error:
        raise UserError(
            f"Corruptions need the package {_PACKAGE} ({error or type(error).__name__}): pip install "
            "'salve[robustness]'."
        ) from error
    return corrupt


def _drawn(pixels: UInt8[np.ndarray, "H W 3"], kind: str, severity: int, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """Corrupt one image; numpy's global generator is as before afterwards."""
    corrupt = _library()
    more = {"seed": seed} if kind in _OWN_GENERATOR else {}
    before = np.random.get_state()  # noqa: NPY002 - it is the one that the package draws from
    np.random.seed(seed)  # noqa: NPY002
    try:
        # It prints a line where a layer is one pixel too small for the image.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return corrupt(pixels, severity=severity, corruption_name=kind, **more)
    finally:
        np.random.set_state(before)  # noqa: NPY002
