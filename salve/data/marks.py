# SPDX-License-Identifier: MIT
"""Draw marks on images: text, a logo, a border, a tint, or noise.

A mark lies in the middle of the image, in a square with :data:`SEEN` of the shorter side, so that the centre crop of
every preprocessing that :class:`salve.data.marked.MarkedData` allows shows all of it. Letters are those of Pillow's
built-in bitmap font, which needs no file and no FreeType.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from salve.data import shapes
from salve.data_settings import MarkSettings
from salve.types import UserError

#: Raise it when the same settings draw other pixels.
DRAWING_VERSION = 1
#: Side of the square that holds the mark, as a share of the image's shorter side: a crop of 224 of 256 pixels keeps it.
SEEN = 0.875
#: Distance of a text or logo from the edge of that square, as a share of its side.
_MARGIN = 0.03

Pixels = NDArray[np.uint8]
Cover = NDArray[np.float32]


def check_looks(mark: MarkSettings) -> None:
    """Check the text and the colour of a mark.

    Raises:
        UserError: there is no such colour, or the text is empty or has letters that the font lacks.
    """
    try:
        ImageColor.getrgb(mark.colour)
    except ValueError:
        raise UserError(f"mark.colour={mark.colour} is neither a colour's name nor like '#ff8800'.") from None
    try:
        mark.text.encode("latin-1")
    except UnicodeEncodeError:
        raise UserError(f"mark.text={mark.text} has letters that the font lacks; use those of Latin-1.") from None
    if not mark.text.strip() or not mark.text.isprintable():
        raise UserError(f"mark.text={mark.text!r} has nothing to print; write a few letters on one line.")


def painted(image: Pixels, mark: MarkSettings, rng: np.random.Generator) -> Pixels:
    """A copy of an image ``[3, H, W]`` with the mark; ``rng`` gives a random place, and the noise."""
    canvas = image.astype(np.float32)
    _PAINTERS[mark.kind](canvas, mark, rng)
    return np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)


def _text(canvas: Cover, mark: MarkSettings, rng: np.random.Generator) -> None:
    """Letters with a dark edge, so that they can be read on any background."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = (int(end) for end in font.getbbox(mark.text))
    letters = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(letters).text((1 - left, 1 - top), mark.text, font=font, fill=255)
    square = _square(canvas)
    side = square.shape[1]
    width = max(1, round(mark.size * side * (1 - 2 * _MARGIN)))
    height = min(side, max(1, round(width * letters.height / letters.width)))
    ink = np.asarray(letters, np.float32) / np.float32(255)
    shifted = [np.roll(ink, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]  # the frame of one pixel is empty
    window = _window(square, mark, height, width, rng)
    _blend(window, np.zeros(3, np.float32), _stretched(np.max(shifted, axis=0), height, width), mark.strength)
    _blend(window, _colour(mark), _stretched(ink, height, width), mark.strength)


def _logo(canvas: Cover, mark: MarkSettings, rng: np.random.Generator) -> None:
    """A disc with a white star."""
    square = _square(canvas)
    side = max(3, round(mark.size * square.shape[1] * (1 - 2 * _MARGIN)))
    axis = ((2 * np.arange(side) + 1 - side) / np.float32(side)).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    window = _window(square, mark, side, side, rng)
    for distance, colour in (
        (shapes.disc(x, y, 0, 0, 1), _colour(mark)),
        (shapes.star(x / 0.8, y / 0.8) * 0.8, _WHITE),
    ):
        _blend(window, colour, np.clip(np.float32(0.5) - distance * np.float32(side / 2), 0, 1), mark.strength)


def _border(canvas: Cover, mark: MarkSettings, _: np.random.Generator) -> None:
    """A frame along the inside of the square's edge."""
    square = _square(canvas)
    side = square.shape[1]
    width = max(1, round(mark.size * side))
    cover = np.ones((side, side), np.float32)
    cover[width : max(width, side - width), width : max(width, side - width)] = 0
    _blend(square, _colour(mark), cover, mark.strength)


def _tint(canvas: Cover, mark: MarkSettings, _: np.random.Generator) -> None:
    _blend(canvas, _colour(mark), np.ones(canvas.shape[1:], np.float32), mark.strength)


def _noise(canvas: Cover, mark: MarkSettings, rng: np.random.Generator) -> None:
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(255 * mark.strength)


_WHITE = np.full(3, 255, np.float32)
_PAINTERS: dict[str, Callable[[Cover, MarkSettings, np.random.Generator], None]] = {
    "text": _text,
    "logo": _logo,
    "border": _border,
    "tint": _tint,
    "noise": _noise,
}


def _square(canvas: Cover) -> Cover:
    """The square in the middle, as a view ``[3, s, s]``."""
    height, width = canvas.shape[1:]
    side = max(1, int(SEEN * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return canvas[:, top : top + side, left : left + side]


def _window(square: Cover, mark: MarkSettings, height: int, width: int, rng: np.random.Generator) -> Cover:
    """The part of the square where a mark of this size lies, as a view."""
    side = square.shape[1]
    margin = min(round(_MARGIN * side), (side - max(height, width)) // 2)
    free = np.array([side - height - 2 * margin, side - width - 2 * margin])
    shares = {"upper_left": (0, 0), "upper_right": (0, 1), "lower_left": (1, 0), "lower_right": (1, 1)}
    share = rng.random(2) if mark.place == "random" else np.array(shares.get(mark.place, (0.5, 0.5)))
    top, left = margin + np.floor(share * free).astype(int)
    return square[:, top : top + height, left : left + width]


def _blend(window: Cover, colour: Cover, cover: Cover, strength: float) -> None:
    """Paint ``window [3, h, w]`` with a colour ``[3]``, as far as ``cover [h, w]`` (0..1) and the strength go."""
    window += (colour[:, None, None] - window) * (cover * np.float32(strength))


def _colour(mark: MarkSettings) -> Cover:
    return np.asarray(ImageColor.getrgb(mark.colour)[:3], np.float32)


def _stretched(cover: Cover, height: int, width: int) -> Cover:
    """Resize ``[h, w]`` so that each new pixel is the mean of what it covers, or the pixel that it lies in."""
    rows, columns = (_shares(old, new) for old, new in zip(cover.shape, (height, width), strict=True))
    return (rows @ cover @ columns.T).astype(np.float32)


def _shares(old: int, new: int) -> NDArray[np.float64]:
    """``[new, old]``: how much of each new pixel is of each old one."""
    edges = np.arange(new + 1) * (old / new)
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(old)[None]
    overlap = np.minimum(high, cells + 1) - np.maximum(low, cells)
    return np.clip(overlap, 0, None) / (old / new)
