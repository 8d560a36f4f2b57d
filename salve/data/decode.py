# SPDX-License-Identifier: MIT
"""Decode image files to three 8-bit channels, as a person sees the picture."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from salve.types import UserError

#: Environment variable: the largest number of pixels that an image may have, instead of Pillow's limit.
MOST_PIXELS = "SALVE_MOST_PIXELS"

_ORIENTATION = 0x0112  # the EXIF tag
_BITS_PER_SAMPLE = 258  # the TIFF tag
_OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
#: Values whose largest is below this share of white would look black.
_DIMMEST = 1 / 16
#: Pixels converted at a time, so that intermediate arrays take little memory.
_AT_ONCE = 2**20


class UnknownWhite(UserError):
    """It is unknown which value of an image is white."""


class TooLarge(UserError):
    """An image has more pixels than the limit allows."""


def check_white(white: float | None) -> None:
    """Check the setting ``data.white``.

    Raises:
        UserError: it is neither None nor a finite number above 0.
    """
    if white is not None and not 0 < white < float("inf"):
        raise UserError(f"data.white={white} must be above 0, or null to find it out from each image.")


def read_rgb(path: Path, white: float | None = None) -> Image.Image:
    """Read an image file as RGB; of several frames, the first. See :func:`to_rgb`.

    Takes at most 10 bytes of memory per pixel, whatever the mode.

    Args:
        path: the file.
        white: see :func:`to_rgb`.

    Raises:
        UnknownWhite: see :func:`to_rgb`; or the image has 16-bit colours that are almost black in 8 bits.
        TooLarge: it has more pixels than :func:`most_pixels`. A file of a few kilobytes may hold enough of them to fill
            the memory.
        Exception: almost any, from Pillow's decoders.
    """
    # The limit holds from the start, because some formats are decoded when they are opened.
    with _no_more_than(most_pixels()), Image.open(path) as image:
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # known only before decoding
        image.load()  # Pillow decodes lazily, and a damaged file must fail here
        rgb, deep = to_rgb(image, white), deep and not _is_grey(image)
    if deep and 0 < max(high for _, high in rgb.getextrema()) < 255 * _DIMMEST:  # type: ignore[misc]
        raise UnknownWhite("Its 16-bit colours are almost black; save it with 8 bits per channel.")
    return rgb


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, from its header, as :func:`read_rgb` turns it; Pillow may raise any exception."""
    with _no_more_than(most_pixels()), Image.open(path) as image:
        lies = image.getexif().get(_ORIENTATION, 1) >= 5  # turned by a quarter
        return image.size[::-1] if lies else image.size


def most_pixels() -> int | None:
    """The largest number of pixels that an image may have; None for no limit.

    The environment variable :data:`MOST_PIXELS` sets it; the default is Pillow's ``MAX_IMAGE_PIXELS``.

    Raises:
        UserError: the variable is no number.
    """
    text = os.environ.get(MOST_PIXELS, "")
    if not text:
        return Image.MAX_IMAGE_PIXELS
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**63):
        raise UserError(
            f"The environment variable {MOST_PIXELS}={text[:40]} must be a number of pixels, such as 200000000."
        )
    return int(text)


@contextmanager
def _no_more_than(most: int | None) -> Iterator[None]:
    """Let Pillow read images of at most ``most`` pixels (None: of any size); raise :class:`TooLarge` for others."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        # Pillow warns above the limit, and raises only above twice the limit.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = most
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            found = re.search(r"(\d+) pixels", str(error))
            pixels = f"{int(found[1]):,}" if found else "more"
            raise TooLarge(
                f"It has {pixels} pixels, but at most {most or 0:,} are read; make it smaller, or set the environment "
                f"variable {MOST_PIXELS}."
            ) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """Convert a picture to three 8-bit channels, as a person sees it.

    One-channel, palette and CMYK images are converted. Transparent ones are laid on white. The EXIF orientation is
    applied. Grey values of more than 8 bits are scaled so that ``white`` becomes 255; values of 0 or less are black.

    Args:
        image: of any mode.
        white: which grey value is white. None finds it out: for 16-bit values it is 65,535, or what the TIFF's bits per
            sample say. Otherwise it is the smallest level that no value exceeds, out of 255 and 65,535 for 32-bit whole
            numbers, and out of 1, 255 and 65,535 for floating-point numbers.

    Raises:
        UnknownWhite: some values are not finite. Without ``white`` also: some are negative or above 65,535, or all are
            below a sixteenth of white, so that the picture would look black.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if _is_grey(image):
        return _grey(image, white)
    if image.mode in _OPAQUE_MODES and "transparency" not in image.info:
        return image.convert("RGB")
    return _in_strips(image, _on_white)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _in_strips(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB strip by strip, to save memory; a small one at once."""
    rows = max(1, _AT_ONCE // image.width)
    if rows >= image.height:
        return change(image)
    found = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        found.paste(change(_strip(image, top, rows)), (0, top))
    return found


def _strip(image: Image.Image, top: int, rows: int) -> Image.Image:
    return image.crop((0, top, image.width, min(top + rows, image.height)))


def _is_grey(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _grey(image: Image.Image, white: float | None) -> Image.Image:
    """Scale grey values so that white becomes 255.

    Pillow's own conversion clips at 255 instead, so that 16-bit images become white, and floating-point ones black.
    """
    low, high = _range(image)
    if not np.isfinite([low, high]).all():
        raise UnknownWhite("It has values that are not finite.")
    level = _find_white(image, low, high) if white is None else white

    def scaled(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        if strip.mode == "F":
            found = np.rint(values.astype(np.float64) * (255 / level))
        else:
            found = values.astype(np.int64) * 255 // level
        return Image.fromarray(found.clip(0, 255).astype(np.uint8)).convert("RGB")

    return _in_strips(image, scaled)


def _range(image: Image.Image) -> tuple[float, float]:
    """The lowest and the highest value; NaN if any value is NaN."""
    rows = max(1, _AT_ONCE // image.width)
    ends = []
    for top in range(0, image.height, rows):
        values = np.asarray(_strip(image, top, rows))
        ends.append((float(values.min()), float(values.max())))
    lows, highs = np.asarray(ends).T
    return float(lows.min()), float(highs.max())


def _find_white(image: Image.Image, low: float, high: float) -> float:
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # Pillow has scaled a PPM to 16 bits
        levels: tuple[int, ...] = (2 ** min(bits, 16) - 1,)
    else:
        levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((level for level in levels if high <= level), None)
    if low < 0 or white is None or 0 < high < white * _DIMMEST:
        raise UnknownWhite(
            f"Its values go from {low:g} to {high:g}, and it is unknown which one is white; set data.white, such as "
            "data.white=4095."
        )
    return white
