# SPDX-License-Identifier: MIT
"""Drawn objects as signed distance functions.

A shape maps points ``(x, y)`` (float32 arrays of one shape, y pointing down) to the signed distance from its edge:
negative inside, positive outside. Every shape fills the unit disc as far as it can. Only sums, products, square roots
and comparisons are applied to arrays, so that values are the same on every platform.

Distance functions after I. Quilez, "2D distance functions".
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Points = Sequence[tuple[float, float]]


def disc(x: Field, y: Field, cx: float, cy: float, radius: float) -> Field:
    """Signed distance to a disc."""
    return np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy)) - np.float32(radius)


def box(x: Field, y: Field, cx: float, cy: float, half_width: float, half_height: float) -> Field:
    """Signed distance to an upright rectangle."""
    dx, dy = np.abs(x - cx) - half_width, np.abs(y - cy) - half_height
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0)


def stroke(x: Field, y: Field, points: Points, half_width: float) -> Field:
    """Signed distance to a line of constant width through the points, with round ends."""
    ends = np.asarray(points, dtype=np.float32)
    return _distance(x, y, ends[:-1], ends[1:]) - np.float32(half_width)


def polygon(x: Field, y: Field, points: Points) -> Field:
    """Signed distance to a simple polygon."""
    start = np.asarray(points, dtype=np.float32)
    end = np.roll(start, -1, axis=0)
    (x0, y0), (x1, y1) = _columns(start, x), _columns(end, x)
    slope = np.divide(x1 - x0, y1 - y0, out=np.zeros_like(x0), where=y0 != y1)
    to_the_right = ((y0 > y) != (y1 > y)) & (x < slope * (y - y0) + x0)
    inside = np.logical_xor.reduce(to_the_right, axis=0)  # even-odd rule
    distance = _distance(x, y, start, end)
    return np.where(inside, -distance, distance)


def _distance(x: Field, y: Field, start: Field, end: Field) -> Field:
    """Distance to the nearest of S segments ``start [S, 2]`` → ``end [S, 2]``."""
    (x0, y0), (x1, y1) = _columns(start, x), _columns(end, x)
    ex, ey = x1 - x0, y1 - y0
    px, py = x - x0, y - y0  # [S, *x.shape]
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    px -= ex * along
    py -= ey * along
    return np.sqrt((px * px + py * py).min(axis=0))


def _columns(points: Field, like: Field) -> tuple[Field, Field]:
    """The two coordinates of S points, each in a shape that broadcasts against ``like``."""
    shape = (len(points), *(1,) * like.ndim)
    return points[:, 0].reshape(shape), points[:, 1].reshape(shape)


def _polar(radius: float, degrees: float, cx: float = 0.0, cy: float = 0.0) -> tuple[float, float]:
    return cx + radius * math.cos(math.radians(degrees)), cy + radius * math.sin(math.radians(degrees))


def _arc(cx: float, cy: float, radius: float, start: float, stop: float, pieces: int) -> list[tuple[float, float]]:
    return [_polar(radius, start + (stop - start) * i / pieces, cx, cy) for i in range(pieces + 1)]


# -- the objects that define a class

_ANCHOR_ARC = _arc(0, 0.1, 0.7, 15, 165, 9)
_STAR = [_polar(1.0 if i % 2 == 0 else 0.42, 36 * i - 90) for i in range(10)]
_CROSS = [
    (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
    (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
]  # fmt: skip
_ARROW = [(1, 0), (0.25, -0.72), (0.25, -0.27), (-0.95, -0.27), (-0.95, 0.27), (0.25, 0.27), (0.25, 0.72)]
_SPIRAL = [_polar(0.08 + 0.78 * i / 24, 34 * i) for i in range(25)]
_BOLT = [(0.3, -0.95), (-0.5, 0.14), (-0.06, 0.14), (-0.3, 0.95), (0.52, -0.2), (0.06, -0.2), (0.62, -0.75)]
_HEART = [(16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
          for t in (2 * math.pi * i / 26 for i in range(26))]  # fmt: skip
_HEART = [(x / 18.2, (y - 2.5) / 18.2) for x, y in _HEART]


def anchor(x: Field, y: Field) -> Field:
    eye = np.abs(disc(x, y, 0, -0.7, 0.19)) - np.float32(0.1)
    bars = np.minimum(stroke(x, y, [(0, -0.5), (0, 0.8)], 0.12), stroke(x, y, [(-0.38, -0.3), (0.38, -0.3)], 0.1))
    left = polygon(x, y, [(-0.94, 0.34), (-0.8, -0.06), (-0.42, 0.28)])
    right = polygon(x, y, [(0.94, 0.34), (0.8, -0.06), (0.42, 0.28)])
    arc = stroke(x, y, _ANCHOR_ARC, 0.12)
    return np.minimum(np.minimum(np.minimum(eye, bars), np.minimum(left, right)), arc)


def star(x: Field, y: Field) -> Field:
    return polygon(x, y, _STAR)


def cross(x: Field, y: Field) -> Field:
    return polygon(x, y, _CROSS)


def crescent(x: Field, y: Field) -> Field:
    return np.maximum(disc(x, y, 0, 0, 0.97), -disc(x, y, 0.42, -0.12, 0.76))


def arrow(x: Field, y: Field) -> Field:
    return polygon(x, y, _ARROW)


def spiral(x: Field, y: Field) -> Field:
    return stroke(x, y, _SPIRAL, 0.12)


def ladder(x: Field, y: Field) -> Field:
    rails = np.abs(x) - np.float32(0.4)
    rails = np.maximum(np.abs(rails) - np.float32(0.1), np.abs(y) - np.float32(0.85))
    # rungs repeat every 0.44: distance to the nearest of four
    rung = np.abs(y - 0.44 * (np.clip(np.floor((y + 0.88) / 0.44), 0, 3) - 1.5)) - np.float32(0.09)
    return np.minimum(rails, np.maximum(rung, np.abs(x) - np.float32(0.4)))


def bolt(x: Field, y: Field) -> Field:
    return polygon(x, y, _BOLT)


def heart(x: Field, y: Field) -> Field:
    return polygon(x, y, _HEART)


def ring(x: Field, y: Field) -> Field:
    return np.abs(disc(x, y, 0, 0, 0.74)) - np.float32(0.2)


# -- objects that several classes show

_TOWER = [
    (-0.42, 0.9), (-0.28, -0.35), (-0.46, -0.35), (-0.46, -0.88), (-0.22, -0.88), (-0.22, -0.62), (-0.11, -0.62),
    (-0.11, -0.88), (0.11, -0.88), (0.11, -0.62), (0.22, -0.62), (0.22, -0.88), (0.46, -0.88), (0.46, -0.35),
    (0.28, -0.35), (0.42, 0.9),
]  # fmt: skip


def tower(x: Field, y: Field) -> Field:
    door = np.minimum(box(x, y, 0, 0.75, 0.13, 0.22), disc(x, y, 0, 0.53, 0.13))
    return np.maximum(polygon(x, y, _TOWER), -door)


def cloud(x: Field, y: Field) -> Field:
    puffs = np.minimum(disc(x, y, -0.52, 0.12, 0.36), disc(x, y, 0.55, 0.14, 0.34))
    puffs = np.minimum(puffs, np.minimum(disc(x, y, -0.12, -0.18, 0.42), disc(x, y, 0.27, -0.06, 0.38)))
    return np.minimum(puffs, box(x, y, 0, 0.3, 0.54, 0.18))


def flag(x: Field, y: Field) -> Field:
    cloth = polygon(x, y, [(-0.4, -0.88), (0.85, -0.42), (-0.4, 0.05)])
    return np.minimum(cloth, stroke(x, y, [(-0.42, -0.8), (-0.42, 0.8)], 0.09))


def tag(x: Field, y: Field) -> Field:
    frame = np.maximum(box(x, y, 0, 0, 0.7, 0.7), -box(x, y, 0, 0, 0.44, 0.44))
    return np.minimum(frame, box(x, y, 0, 0, 0.2, 0.2))


# -- clutter, which means nothing


def streak(x: Field, y: Field) -> Field:
    return stroke(x, y, [(-0.9, 0), (0.9, 0)], 0.1)


def bow(x: Field, y: Field) -> Field:
    return stroke(x, y, [(-0.85, -0.2), (-0.35, 0.12), (0.35, 0.12), (0.85, -0.2)], 0.12)


def blob(x: Field, y: Field) -> Field:
    return np.minimum(disc(x, y, -0.3, 0, 0.6), disc(x, y, 0.35, 0.1, 0.5))


def shard(x: Field, y: Field) -> Field:
    return polygon(x, y, [(-0.8, 0.4), (0.1, -0.7), (0.85, 0.3)])
