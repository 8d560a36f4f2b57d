# SPDX-License-Identifier: MIT
"""Paste cut-out objects onto scenes, so that a background goes with a class: a shortcut that is known.

    python -m salve.data.compose --objects cut/outs --scenes my/scenes --out my/composed --places dog=land cat=water

``cut/outs/<class>/*`` are images with an alpha channel, or images with masks of the same names in another folder;
``my/scenes/<place>/*`` are backgrounds. No object and no scene is in two splits. The result is read by
``data=composed data.root=my/composed``.
"""

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageOps

from salve.artifacts import written_whole
from salve.data.decode import read_rgb
from salve.data.naming import listing, nearest
from salve.data.walk import find_images, subfolders
from salve.types import Split, UserError
from salve.untrusted import reason

COLUMNS = ("split", "class", "file", "place", "object", "scene", "aligned", "x0", "y0", "x1", "y1")
#: Shares of objects and of scenes that go to each split.
SHARES: dict[Split, float] = {"train": 0.6, "select": 0.15, "test": 0.25}
_OPAQUE = 0.5  # alpha from which a pixel belongs to the object


@dataclass(frozen=True)
class Composition:
    """What is composed.

    Attributes:
        objects: the folder of the classes, in which images with an alpha channel lie, or without one if there are
            masks. masks: a folder of the same structure: white where the object is; None takes the alpha channel.
        scenes: the folder of the places, in which backgrounds lie.
        places: class → the place that goes with it. per_class: images of each class in each split.
        alignment: share of a class's train images that show its place; the others show other places. In select and
            test, all places are equally frequent.
        size: side of the square images, in pixels.
        scale: between which shares of that the longer side of an object lies.
        seed: of everything drawn.
    """

    objects: Path
    scenes: Path
    places: Mapping[str, str]
    per_class: Mapping[Split, int]
    masks: Path | None = None
    alignment: float = 0.95
    size: int = 224
    scale: tuple[float, float] = (0.5, 0.8)
    seed: int = 0


def compose(settings: Composition, out: Path) -> int:
    """Write ``out/<split>/<class>/*.png`` and ``out/metadata.csv``.

    How the images of a class in a split are made depends on the seed, the class, the split, and the names of its
    objects and of the scenes alone.

    Returns:
        The number of images.

    Raises:
        UserError: a folder, class, place or mask is missing, too few objects or scenes to divide, a value is out of
            range, or ``out`` holds something already.
    """
    objects, scenes = _found(settings)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={out} holds files already; name a folder that is not there, or empty.")
    rows: list[dict[str, object]] = []
    for split in get_args(Split):
        for name in objects:
            rows += _of_class(settings, name, split, objects[name][split], {p: scenes[p][split] for p in scenes}, out)
    with written_whole(out / "metadata.csv") as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return len(rows)


def _found(settings: Composition) -> tuple[dict[str, dict[Split, list[str]]], dict[str, dict[Split, list[str]]]]:
    """The objects of each class and the scenes of each place, divided into splits."""
    if not 0 <= settings.alignment <= 1:
        raise UserError(f"--alignment={settings.alignment} must lie between 0 and 1: it is a share of train images.")
    low, high = settings.scale
    if not 0 < low <= high <= 1:
        raise UserError(f"--scale={low} {high} must be two rising numbers above 0 and up to 1: shares of the side.")
    if settings.size < 8:
        raise UserError(f"--size={settings.size} must be at least 8 pixels.")
    for split in get_args(Split):
        if settings.per_class.get(split, 0) < 1:
            raise UserError(f"--per-class must give {split} at least one image of each class.")
    classes, places = subfolders(settings.objects), subfolders(settings.scenes)
    if len(classes) < 2 or len(places) < 2:
        raise UserError(
            f"{settings.objects} has {len(classes)} class folders and {settings.scenes} {len(places)} folders of "
            "places; at least two of each are needed."
        )
    for name, place in settings.places.items():
        if name not in classes:
            raise UserError(f"--places names the class {name!r}, {nearest(name, classes)}.")
        if place not in places:
            raise UserError(f"--places gives {name} the place {place!r}, {nearest(place, places)}.")
    if without := [name for name in classes if name not in settings.places]:
        raise UserError(f"--places says no place for {listing(without)}; write {without[0]}=PLACE.")
    objects = dict(zip(classes, find_images(settings.objects, classes).images, strict=True))
    scenes = dict(zip(places, find_images(settings.scenes, places).images, strict=True))
    return (
        {name: _divided(settings.objects / name, paths, settings.seed) for name, paths in objects.items()},
        {name: _divided(settings.scenes / name, paths, settings.seed) for name, paths in scenes.items()},
    )


def _divided(folder: Path, paths: Sequence[str], seed: int) -> dict[Split, list[str]]:
    """Divide images at random, so that no split shares one with another."""
    if len(paths) < len(SHARES):
        raise UserError(f"{folder} has {len(paths)} images; it needs at least {len(SHARES)}, one for each split.")
    order = _random(seed, 0, folder.name).permutation(len(paths))
    found: dict[Split, list[str]] = {}
    for split in ("select", "test"):
        count = max(1, int(SHARES[split] * len(paths)))
        found[split], order = sorted(paths[i] for i in order[:count]), order[count:]
    return {"train": sorted(paths[i] for i in order), **found}


def _of_class(
    settings: Composition,
    name: str,
    split: Split,
    objects: Sequence[str],
    scenes: Mapping[str, Sequence[str]],
    out: Path,
) -> list[dict[str, object]]:
    """Write the images of a class in a split; returns their rows of the table."""
    rng = _random(settings.seed, 1 + get_args(Split).index(split), name)
    count = settings.per_class[split]
    own, all_places = settings.places[name], list(scenes)
    others = [place for place in all_places if place != own]
    # Exact shares, in random order: drawn one by one they would differ between classes.
    if split == "train":
        aligned = round(settings.alignment * count)
        places = [own] * aligned + [others[i % len(others)] for i in range(count - aligned)]
    else:
        places = [all_places[i % len(all_places)] for i in range(count)]
    places = [places[i] for i in rng.permutation(count)]
    (out / split / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number, place in enumerate(places):
        thing = objects[number % len(objects)]
        scene = scenes[place][int(rng.integers(len(scenes[place])))]
        image, box = _pasted(settings, thing, scene, rng)
        file = f"{number:05d}.png"
        image.save(out / split / name / file)
        said = (split, name, file, place, thing, scene, int(place == own), *box)
        rows.append(dict(zip(COLUMNS, said, strict=True)))
    return rows


def _pasted(
    settings: Composition, thing: str, scene: str, rng: np.random.Generator
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The object on the scene, and its box: left, upper, and behind the right and lower edge."""
    size = settings.size
    background = _filled(_read(settings.scenes / scene), size)
    cut_out = _cut_out(settings, thing)
    longest = max(1, round(size * rng.uniform(*settings.scale)))
    ratio = longest / max(cut_out.size)
    width, height = (max(1, min(size, round(side * ratio))) for side in cut_out.size)
    cut_out = cut_out.resize((width, height), Image.Resampling.BILINEAR)
    left, upper = (int(rng.integers(size - side + 1)) for side in (width, height))
    background.paste(cut_out, (left, upper), cut_out.getchannel("A"))
    return background, (left, upper, left + width, upper + height)


def _filled(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image as a square of ``size`` pixels."""
    side = min(image.size)
    left, upper = ((length - side) // 2 for length in image.size)
    return image.crop((left, upper, left + side, upper + side)).resize((size, size), Image.Resampling.BILINEAR)


def _cut_out(settings: Composition, thing: str) -> Image.Image:
    """The object, RGBA, cropped to where it is opaque.

    Raises:
        UserError: it has neither a mask nor an alpha channel, its mask has another size, or nothing of it is opaque.
    """
    path = settings.objects / thing
    if settings.masks is None:
        cut_out = _read(path, _with_alpha)
    else:
        names = sorted(settings.masks.glob(f"{Path(thing).with_suffix('').as_posix()}.*"))
        if len(names) != 1:
            raise UserError(f"The object {thing} has {len(names)} masks in {settings.masks}; it needs one of its name.")
        cut_out, alpha = _read(path), _read(names[0]).convert("L")
        if alpha.size != cut_out.size:
            raise UserError(f"The object {path} has {cut_out.size} pixels, but its mask {alpha.size}.")
        cut_out.putalpha(alpha)
    alpha = cut_out.getchannel("A")
    rows, columns = np.nonzero(np.asarray(alpha) >= 255 * _OPAQUE)
    if not len(rows):
        raise UserError(f"The object {path} is nowhere opaque.")
    return cut_out.crop((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))


def _read(path: Path, read: Callable[[Path], Image.Image] = read_rgb) -> Image.Image:
    """Read an image.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read(path)
    except Exception as error:  # for a damaged file Pillow's decoders raise almost anything
        raise UserError(f"{path} cannot be read as an image ({reason(error)}).") from error


def _with_alpha(path: Path) -> Image.Image:
    """An image with its alpha channel, RGBA; its colours are not laid on white, as those of other images are."""
    with Image.open(path) as image:
        if "A" not in image.getbands() and "transparency" not in image.info:
            raise UserError("it has no alpha channel: give --masks, a folder of masks")
        return ImageOps.exif_transpose(image).convert("RGBA")


def _random(seed: int, part: int, name: str) -> np.random.Generator:
    """Random numbers that depend on nothing but these."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, part, *name.encode()))))


def _places(texts: Sequence[str]) -> dict[str, str]:
    places = {}
    for text in texts:
        name, equals, place = text.rpartition("=")
        if not equals or not name or not place:
            raise UserError(f"--places has {text!r}; write CLASS=PLACE.")
        places[name] = place
    return places


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; ``--help`` says what it takes."""
    parser = argparse.ArgumentParser(
        prog="python -m salve.data.compose",
        description="Paste cut-out objects onto scenes, so that in train a place goes with each class.",
    )
    parser.add_argument("--objects", type=Path, required=True, help="folder with a folder of cut-out images per class")
    parser.add_argument("--masks", type=Path, help="masks of the same names, for objects without an alpha channel")
    parser.add_argument("--scenes", type=Path, required=True, help="folder with a folder of backgrounds per place")
    parser.add_argument("--places", nargs="+", required=True, metavar="CLASS=PLACE", help="the place of each class")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the images and metadata.csv")
    parser.add_argument("--alignment", type=float, default=0.95, help="share of train images on the class's place")
    parser.add_argument(
        "--per-class",
        type=int,
        nargs=3,
        default=(300, 60, 100),
        metavar=("TRAIN", "SELECT", "TEST"),
        help="images of each class",
    )
    parser.add_argument("--size", type=int, default=224, help="side of the square images in pixels")
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(0.5, 0.8),
        metavar=("LOW", "HIGH"),
        help="an object's longer side, as shares of --size",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    given = parser.parse_args(arguments)
    try:
        settings = Composition(
            given.objects,
            given.scenes,
            _places(given.places),
            dict(zip(get_args(Split), given.per_class, strict=True)),
            given.masks,
            given.alignment,
            given.size,
            tuple(given.scale),
            given.seed,
        )
        count = compose(settings, given.out)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(f"{count} images in {given.out}; read them with data=composed data.root={given.out}")


if __name__ == "__main__":
    main()
