"""From an image file to three 8-bit channels, as a person sees the picture."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from salve.types import UserError

#: Names the number of pixels up to which an image is read, instead of Pillow's.
MOST_PIXELS = "SALVE_MOST_PIXELS"

_ORIENTATION = 0x0112  # the EXIF tag
_BITS_PER_SAMPLE = 258  # the TIFF tag
_OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
#: Of values that reach less than this share of the white that they are measured by, one would see all but black.
_DIMMEST = 1 / 16
#: Pixels that are converted at once, so that what is made on the way takes no memory to speak of.
_AT_ONCE = 2**20


class UnknownWhite(UserError):
    """Grey values of which nobody can tell which one is white."""


class TooLarge(UserError):
    """An image that would take more memory than images are given."""


def check_white(white: float | None) -> None:
    """Raises UserError for a white that is not above 0."""
    if white is not None and not 0 < white < float("inf"):
        raise UserError(f"data.white must be above 0, or null to be found out, not {white}")


def read_rgb(path: Path, white: float | None = None) -> Image.Image:
    """A file's picture as RGB, of several frames the first; see `to_rgb`.

    Whatever its mode, up to 10 bytes are held for each pixel.

    Raises:
        UnknownWhite: see `to_rgb`; also 16-bit colours of which Pillow's 8 bits are all but black.
        TooLarge: it has more pixels than Pillow's `MAX_IMAGE_PIXELS`, or the environment's `SALVE_MOST_PIXELS`: a file
            of a few kilobytes may have so many that they fill the memory.
        Exception: almost any, from Pillow's decoders.
    """
    # From the beginning: some formats are decoded when they are opened.
    with _no_more_than(most_pixels()), Image.open(path) as image:
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # told only until it is decoded
        image.load()  # Pillow decodes when asked to, and a damaged file must be found out here
        rgb, deep = to_rgb(image, white), deep and not _is_grey(image)
    if deep and 0 < max(high for _, high in rgb.getextrema()) < 255 * _DIMMEST:  # type: ignore[misc]
        raise UnknownWhite("its 16-bit colours are all but black: save it with 8 bits a channel")
    return rgb


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as its header has them; raises almost anything, from Pillow."""
    with _no_more_than(most_pixels()), Image.open(path) as image:
        return image.size


def most_pixels() -> int | None:
    """Pixels up to which an image is read: what the environment says, else Pillow's `MAX_IMAGE_PIXELS`.

    Raises:
        UserError: the environment says no number.
    """
    text = os.environ.get(MOST_PIXELS, "")
    if not text:
        return Image.MAX_IMAGE_PIXELS
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**63):
        raise UserError(f"{MOST_PIXELS}={text[:40]} in the environment must be a number of pixels, such as 200000000")
    return int(text)


@contextmanager
def _no_more_than(most: int | None) -> Iterator[None]:
    """Have Pillow read images of so many pixels; None for any. Raises TooLarge for others."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # above twice the limit it is an error anyway
        Image.MAX_IMAGE_PIXELS = most
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            found = re.search(r"(\d+) pixels", str(error))
            pixels = f"{int(found[1]):,}" if found else "more"
            raise TooLarge(
                f"it has {pixels} pixels, and images are read up to {most or 0:,}: make it smaller, or set "
                f"{MOST_PIXELS} in the environment"
            ) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """The picture as a person sees it, in three 8-bit channels.

    One-channel, palette and CMYK images are converted, transparent ones laid on white, and the camera's EXIF
    orientation is applied. Grey values of more than 8 bits are scaled so that `white` becomes 255; 0 and less is black.
    Without `white` it is, of 16-bit values, 65,535 (or what the TIFF's bits per sample say); of 32-bit whole numbers
    the smaller of 255 and 65,535, and of floating-point numbers the smallest of 1, 255 and 65,535, that no value
    exceeds.

    Raises:
        UnknownWhite: without `white`: negative values, values above 65,535, or values that reach less than a sixteenth
            of what would be white, which one would see as black. Always: values that are not finite.
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
    """An RGB image of what a function makes of an image's strips; of a small one at once."""
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
    """Pillow's own conversion clips at 255, which turns 16-bit images white and leaves floating-point ones black."""
    low, high = _range(image)
    if not np.isfinite([low, high]).all():
        raise UnknownWhite("it has values that are not finite")
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
    """The lowest and the highest value; NaN if one is."""
    rows = max(1, _AT_ONCE // image.width)
    ends = []
    for top in range(0, image.height, rows):
        values = np.asarray(_strip(image, top, rows))
        ends.append((float(values.min()), float(values.max())))
    lows, highs = np.asarray(ends).T
    return float(lows.min()), float(highs.max())


def _find_white(image: Image.Image, low: float, high: float) -> float:
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # of which Pillow scales the latter itself
        levels: tuple[int, ...] = (2 ** min(bits, 16) - 1,)
    else:
        levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((level for level in levels if high <= level), None)
    if low < 0 or white is None or 0 < high < white * _DIMMEST:
        seen = f"its values go from {low:g} to {high:g}"
        raise UnknownWhite(f"{seen}, and which one is white is not known: say so with data.white, such as 4095")
    return white
