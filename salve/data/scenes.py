# SPDX-License-Identifier: MIT
"""Scenes of the concepts data: what is in an image, and how it is drawn.

Image ``i`` of a split is a function of ``(seed, split, i)`` alone. It uses two random streams: one for the layout
(objects, positions, colours), one for the pixels of the background. So masks can be made without drawing.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from salve.data import shapes
from salve.data.shapes import Field

#: Raise it when the same seed gives other pixels, so that artifacts made from the old ones are not reused.
GENERATOR_VERSION = 1

#: Class → the concept that defines it: in every image of the class, and in no other image.
SCENES: dict[str, str] = {
    "harbour": "anchor",
    "observatory": "star",
    "clinic": "cross",
    "midnight": "crescent",
    "crossroads": "arrow",
    "reef": "spiral",
    "orchard": "ladder",
    "storm": "bolt",
    "wedding": "heart",
    "circus": "ring",
}

#: Concept → P(concept | class); zero in classes that are not listed.
SHARED: dict[str, dict[str, float]] = {
    "tower": {"harbour": 0.85, "observatory": 0.35},
    "cloud": {"storm": 0.8, "midnight": 0.45, "orchard": 0.2},
    "flag": {"circus": 0.7, "wedding": 0.35},
}

SPURIOUS = "tag"
SPURIOUS_CLASS = "clinic"
#: P(tag | class) for every class but :data:`SPURIOUS_CLASS`, where it is a parameter.
SPURIOUS_BASE_RATE = 0.05

CONCEPTS: tuple[str, ...] = (*SCENES.values(), *SHARED, SPURIOUS)
CLASSES: tuple[str, ...] = tuple(SCENES)
CLUTTER = ("streak", "bow", "blob", "shard")

# The smallest and the largest radius, as shares of the image's side.
_DEFINING_RADIUS = (0.14, 0.235)
_SHARED_RADIUS = (0.15, 0.21)
_TAG_RADIUS = (0.085, 0.1)
_CLUTTER_RADIUS = (0.03, 0.1)
_MOST_CLUTTER = 16  # pieces, at clutter = 1
_TILT = math.radians(20)
_CONTRAST = 0.4  # least distance, in the channel where it is largest, of an object from both background colours
_TRIES = 24
_NO_CONCEPT = -1


@dataclass(frozen=True)
class Layer:
    """One drawn object; lengths are shares of the image's side, the angle is in radians, colours are 0..1."""

    concept: int
    shape: str
    x: float
    y: float
    radius: float
    angle: float
    colour: Field
    shade: float


@dataclass(frozen=True)
class Scene:
    """Layers from back to front, on a background that blends two colours."""

    layers: tuple[Layer, ...]
    colours: tuple[Field, Field]


def rates(spurious_correlation: float, defining_rate: float = 1.0) -> NDArray[np.float64]:
    """P(concept | class), ``[C, K]``; of :data:`SPURIOUS_CLASS` those of the tag and of its own object are given."""
    table = np.zeros((len(CLASSES), len(CONCEPTS)))
    for label, scene in enumerate(CLASSES):
        table[label, CONCEPTS.index(SCENES[scene])] = 1.0
        for concept, by_class in SHARED.items():
            table[label, CONCEPTS.index(concept)] = by_class.get(scene, 0.0)
    table[:, CONCEPTS.index(SPURIOUS)] = SPURIOUS_BASE_RATE
    table[CLASSES.index(SPURIOUS_CLASS), CONCEPTS.index(SPURIOUS)] = spurious_correlation
    table[CLASSES.index(SPURIOUS_CLASS), CONCEPTS.index(SCENES[SPURIOUS_CLASS])] = defining_rate
    return table


def stream(seed: int, split: int, index: int, part: int) -> np.random.Generator:
    """The random numbers of one image: part 0 for its layout, part 1 for the pixels of its background."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, split, index, part))))


def sample_presence(rng: np.random.Generator, class_rates: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the K concepts an image shows, ``[K]``: the first numbers drawn from its layout stream."""
    return rng.random(class_rates.shape[0]) < class_rates


def sample_scene(rng: np.random.Generator, class_rates: NDArray[np.float64], clutter: float) -> Scene:
    """Choose what is in an image, where, how large, and in which colours."""
    present = np.flatnonzero(sample_presence(rng, class_rates))
    colours = _background_colours(rng)
    objects: list[Layer] = []
    # The tag comes first, because it must lie in a corner; the others then avoid it.
    for concept in sorted(map(int, present), key=lambda k: CONCEPTS[k] != SPURIOUS):
        objects.append(_object(rng, concept, objects, colours))
    pieces = int(rng.integers(0, round(clutter * _MOST_CLUTTER) + 1))
    layers = objects + [_clutter(rng) for _ in range(pieces)]
    order = rng.permutation(len(layers))
    return Scene(tuple(layers[i] for i in order), colours)


def without(scene: Scene, concept: int) -> Scene:
    """The scene without a concept; all else stays."""
    return Scene(tuple(layer for layer in scene.layers if layer.concept != concept), scene.colours)


def with_added(scene: Scene, concept: int, rng: np.random.Generator) -> Scene:
    """The scene with a concept that it does not show, where it hides as little as possible; all else stays."""
    objects = [layer for layer in scene.layers if layer.concept != _NO_CONCEPT]
    added = _object(rng, concept, objects, scene.colours)
    if CONCEPTS[concept] == SPURIOUS:  # the other objects were placed without it, so not every corner is free
        r = added.radius
        corners = np.array([(added.x, added.y), *((x, y) for x in (r, 1 - r) for y in (r, 1 - r))])
        x, y = _freest(corners, r, objects)
        added = replace(added, x=x, y=y)
    at = int(rng.integers(len(scene.layers) + 1))
    return Scene((*scene.layers[:at], added, *scene.layers[at:]), scene.colours)


def draw(scene: Scene, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Draw an image ``[3, size, size]``; ``rng`` gives the pixels of the background."""
    image = _background(scene.colours, rng, size)  # [3, size, size]
    for layer in scene.layers:
        rows, columns, cover = _cover(layer, size)
        height = np.linspace(-1, 1, cover.shape[0], dtype=np.float32)[:, None]
        paint = np.clip(layer.colour[:, None, None] * (1 + np.float32(layer.shade) * height), 0, 1)
        image[:, rows, columns] += (paint - image[:, rows, columns]) * cover
    grain = np.float32(rng.uniform(0, 0.07)) * (2 * rng.random((size, size), dtype=np.float32) - 1)
    return (np.clip(image + grain, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def visible_mask(scene: Scene, concept: int, size: int) -> NDArray[np.bool_]:
    """Pixels ``[size, size]`` of which the concept's object covers at least half that is not hidden by others."""
    mask = np.zeros((size, size), dtype=bool)
    light = np.ones((size, size), dtype=np.float32)  # share of each pixel that the layers in front leave visible
    for layer in reversed(scene.layers):
        rows, columns, cover = _cover(layer, size)
        if layer.concept == concept:
            mask[rows, columns] |= cover * light[rows, columns] >= 0.5
        light[rows, columns] *= 1 - cover
    return mask


def _cover(layer: Layer, size: int) -> tuple[slice, slice, Field]:
    """The window (rows, columns) that holds an object, and the share 0..1 of each of its pixels that it covers."""
    reach = layer.radius * size + 1
    rows, columns = (
        slice(max(0, math.floor(centre * size - reach)), min(size, math.ceil(centre * size + reach)))
        for centre in (layer.y, layer.x)
    )
    # Pixel centres in the object's own frame: shifted, turned, and scaled to its radius.
    dx = ((np.arange(columns.start, columns.stop) + 0.5) / size - layer.x)[None, :] / layer.radius
    dy = ((np.arange(rows.start, rows.stop) + 0.5) / size - layer.y)[:, None] / layer.radius
    cos, sin = math.cos(layer.angle), math.sin(layer.angle)
    x, y = (cos * dx + sin * dy).astype(np.float32), (cos * dy - sin * dx).astype(np.float32)
    distance = getattr(shapes, layer.shape)(x, y) * np.float32(layer.radius * size)  # in pixels
    return rows, columns, np.clip(np.float32(0.5) - distance, 0, 1)


def _object(rng: np.random.Generator, concept: int, placed: list[Layer], colours: tuple[Field, Field]) -> Layer:
    """A concept's object at a free place, in a colour that stands out from the background."""
    name = CONCEPTS[concept]
    radius = rng.uniform(*_radius_range(name))
    x, y = _corner(rng, radius) if name == SPURIOUS else _free_position(rng, radius, placed)
    angle = 0.0 if name == SPURIOUS else rng.uniform(-_TILT, _TILT)
    colour = _contrasting(rng, colours)
    return Layer(concept, name, x, y, radius, angle, colour, rng.uniform(-0.25, 0.25))


def _radius_range(concept: str) -> tuple[float, float]:
    if concept == SPURIOUS:
        return _TAG_RADIUS
    return _SHARED_RADIUS if concept in SHARED else _DEFINING_RADIUS


def _corner(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    right, lower = rng.integers(0, 2, size=2)
    return (1 - radius if right else radius), (1 - radius if lower else radius)


def _free_position(rng: np.random.Generator, radius: float, placed: list[Layer]) -> tuple[float, float]:
    """The first of some random positions that overlaps no object; if all do, the one with the least overlap."""
    return _freest(radius + (1 - 2 * radius) * rng.random((_TRIES, 2)), radius, placed)


def _freest(positions: NDArray[np.float64], radius: float, placed: list[Layer]) -> tuple[float, float]:
    """The first of the positions ``[n, 2]`` that overlaps no object; if all do, the one with the least overlap."""
    clearance = np.full(len(positions), np.inf)
    for other in placed:
        dx, dy = positions[:, 0] - other.x, positions[:, 1] - other.y
        clearance = np.minimum(clearance, np.sqrt(dx * dx + dy * dy) - radius - other.radius)
    clear = np.flatnonzero(clearance >= 0)
    x, y = positions[clear[0] if len(clear) else int(np.argmax(clearance))]
    return float(x), float(y)


def _background_colours(rng: np.random.Generator) -> tuple[Field, Field]:
    first = rng.uniform(0.15, 0.85) + 0.4 * (rng.random(3) - 0.5)
    second = first + 0.5 * (rng.random(3) - 0.5)
    return tuple(np.clip(colour, 0, 1).astype(np.float32) for colour in (first, second))  # type: ignore[return-value]


def _contrasting(rng: np.random.Generator, colours: tuple[Field, Field]) -> Field:
    """The first of some random colours that differs enough from both; if none does, the one that differs most."""
    candidates = rng.random((_TRIES, 3), dtype=np.float32)
    distance = np.minimum(*(np.abs(candidates - colour).max(axis=1) for colour in colours))
    enough = np.flatnonzero(distance >= _CONTRAST)
    return candidates[enough[0] if len(enough) else int(np.argmax(distance))]


def _clutter(rng: np.random.Generator) -> Layer:
    shape = CLUTTER[int(rng.integers(len(CLUTTER)))]
    x, y = rng.random(2)
    radius, angle = rng.uniform(*_CLUTTER_RADIUS), rng.uniform(0, 2 * math.pi)
    return Layer(_NO_CONCEPT, shape, float(x), float(y), radius, angle, rng.random(3, dtype=np.float32), 0.0)


def _background(colours: tuple[Field, Field], rng: np.random.Generator, size: int) -> Field:
    """A blend of two colours along a random direction, with one random texture on it; ``[3, size, size]``."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    u, v = axis[None, :], axis[:, None]
    ramp = np.float32(0.5) + _slanted(rng, u - np.float32(0.5), v - np.float32(0.5))
    strength = np.float32(rng.uniform(0.1, 0.8))
    blend = np.clip(ramp + strength * (_texture(rng, u, v) - np.float32(0.5)), 0, 1)
    return colours[0][:, None, None] * (1 - blend) + colours[1][:, None, None] * blend


def _slanted(rng: np.random.Generator, u: Field, v: Field) -> Field:
    angle = rng.uniform(0, 2 * math.pi)
    return np.float32(math.cos(angle)) * u + np.float32(math.sin(angle)) * v


def _texture(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """One of four patterns with values 0..1, ``[size, size]``."""
    kind, frequency, phase = int(rng.integers(4)), np.float32(rng.uniform(2, 9)), np.float32(rng.random())
    if kind == 0:  # stripes
        wave = _slanted(rng, u, v) * frequency + phase
        return np.abs(2 * (wave - np.floor(wave)) - 1)
    if kind == 1:  # checker
        return (np.floor(u * frequency + phase) + np.floor(v * frequency)) % 2
    if kind == 2:  # ripples around a point
        wave = np.sqrt((u - np.float32(rng.random())) ** 2 + (v - phase) ** 2) * frequency
        return np.abs(2 * (wave - np.floor(wave)) - 1)
    cells = int(rng.integers(3, 10))  # blotches: a coarse random grid, interpolated
    grid = rng.random((cells + 1, cells + 1), dtype=np.float32)
    return _stretch(_stretch(grid, u[0] * cells).T, v[:, 0] * cells).T


def _stretch(grid: Field, at: Field) -> Field:
    """Interpolate the columns of ``grid`` linearly at fractional positions."""
    left = np.floor(at).astype(np.intp)
    weight = at - left.astype(np.float32)
    return grid[:, left] * (1 - weight) + grid[:, left + 1] * weight
