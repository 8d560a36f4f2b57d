"""From an image file to three 8-bit channels, as a person sees the picture."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from salve.types import UserError

_ORIENTATION = 0x0112  # the EXIF tag
_BITS_PER_SAMPLE = 258  # the TIFF tag
_OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
#: Of values that reach less than this share of the white that they are measured by, one would see all but black.
_DIMMEST = 1 / 16


class UnknownWhite(UserError):
    """Grey values of which nobody can tell which one is white."""


def check_white(white: float | None) -> None:
    """Raises UserError for a white that is not above 0."""
    if white is not None and not 0 < white < float("inf"):
        raise UserError(f"data.white must be above 0, or null to be found out, not {white}")


def read_rgb(path: Path, white: float | None = None) -> Image.Image:
    """A file's picture as RGB; see `to_rgb`.

    Raises:
        UnknownWhite: see `to_rgb`; also 16-bit colours of which Pillow's 8 bits are all but black.
        Exception: almost any, from Pillow's decoders; and its warning of an image so large that it may be an attack.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path)
    with image:
        deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # told only until it is decoded
        image.load()  # Pillow decodes when asked to, and a damaged file must be found out here
        rgb = to_rgb(image, white)
        if deep and not _is_grey(image) and 0 < np.asarray(rgb).max() < 255 * _DIMMEST:
            raise UnknownWhite("its 16-bit colours are all but black: save it with 8 bits a channel")
        return rgb


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
        return _grey(image, white).convert("RGB")
    if image.mode in _OPAQUE_MODES and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _is_grey(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _grey(image: Image.Image, white: float | None) -> Image.Image:
    """Pillow's own conversion clips at 255, which turns 16-bit images white and leaves floating-point ones black."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise UnknownWhite("it has values that are not finite")
    if white is None:
        white = _find_white(image, low, high)
    if image.mode == "F":
        scaled = np.rint(values.astype(np.float64) * (255 / white))
    else:
        scaled = values.astype(np.int64) * 255 // white
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


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
