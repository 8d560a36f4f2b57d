# SPDX-License-Identifier: MIT
"""Read boxes around the objects of images from a CSV file with the columns file, class, x0, y0, x1 and y1."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from salve.data.boxes import Boxes
from salve.data.decode import image_size
from salve.data.files import Index
from salve.data.grouping import Places, labels_of
from salve.data.naming import listing
from salve.data.tables import read_table
from salve.types import Split, UserError

KEY = "data.boxes"
_EDGES = ("x0", "y0", "x1", "y1")


def read_boxes(path: Path, index: Index) -> tuple[dict[Split, Boxes], list[str]]:
    """Read ``data.boxes``: a row for each box, with the columns file, class (or wnid), x0, y0, x1 and y1.

    Files are named as in :func:`salve.data.grouping.read_groups`. Other columns are not read.

    Args:
        path: the CSV file. index: the images in use.

    Returns:
        The boxes of each split, and a sentence about boxes of images that are not in use.

    Raises:
        UserError: the file cannot be read or lacks a column; a class is unknown, or not that of the image; an image is
            not there, or cannot be opened; a box is no box, or lies outside of its image; or no test image has one.
    """
    table = read_table(KEY, path)
    by_class = next((name for name in ("class", "wnid") if name in table), None)
    if by_class is None or not {"file", *_EDGES} <= set(table):
        raise UserError(
            f"{KEY}={path} must have the columns file, class, x0, y0, x1 and y1, but has {listing(list(table), 10)}."
        )
    labels = labels_of(path, table[by_class], index, KEY)
    places = Places(index, KEY)
    found: dict[Split, dict[int, list[list[float]]]] = {split: defaultdict(list) for split in index.files}
    sizes: dict[Split, dict[int, tuple[int, int]]] = {split: {} for split in index.files}
    unused = set()
    for row, (file, label) in enumerate(zip(table["file"], labels, strict=True)):
        image = places.find(path, file, label)
        if image is None:
            _refuse_missing(path, file, label, index)
            unused.add(file)
            continue
        split, number = image
        if number not in sizes[split]:
            sizes[split][number] = _size(path, file, index, split, number)
        cells = [table[edge][row] for edge in _EDGES]
        found[split][number].append(_box(path, file, cells, sizes[split][number]))
    if not found["test"]:
        raise UserError(
            f"{KEY}={path} has no box in an image of test, where maps are scored; it has boxes in "
            f"{', '.join(f'{len(own)} images of {split}' for split, own in found.items())}."
        )
    boxes = {
        split: Boxes({image: torch.tensor(one, dtype=torch.float64) for image, one in own.items()}, sizes[split])
        for split, own in found.items()
    }
    names = "1 file" if len(unused) == 1 else f"{len(unused)} files"
    said = f"{path.name} has boxes in {names} not in use, such as {listing(sorted(unused)[:1])}."
    return boxes, [said] if unused else []


def _size(path: Path, file: str, index: Index, split: Split, number: int) -> tuple[int, int]:
    try:
        return image_size(index.root / index.folders[split] / index.files[split][number].path)
    except Exception as error:  # for a damaged file Pillow raises almost anything
        raise UserError(f"{KEY}={path} has a box in {listing([file])}, whose header cannot be read.") from error


def _box(path: Path, file: str, cells: Sequence[str], size: tuple[int, int]) -> list[float]:
    """The numbers of a row, if they are a box inside an image of this width and height."""
    width, height = size
    try:
        x0, y0, x1, y1 = map(float, cells)
    except ValueError as error:
        raise UserError(
            f"{KEY}={path} has {listing(cells)} in a row of {listing([file])}, which are no numbers."
        ) from error
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"{KEY}={path} has a box {x0:g}, {y0:g}, {x1:g}, {y1:g} in {listing([file])}, which is {width} × {height} "
            "pixels; it must be 0 ≤ x0 < x1 ≤ width and 0 ≤ y0 < y1 ≤ height."
        )
    return [x0, y0, x1, y1]


def _refuse_missing(path: Path, file: str, label: int, index: Index) -> None:
    """Refuse a file that is not on the disk; one that is there may be left out, as by ``data.limit_per_class``."""
    name = file.replace("\\", "/")
    folders = [index.root / folder for folder in dict.fromkeys(index.folders.values())]
    near = [index.root, *folders, *(folder / index.values[label] for folder in folders)]
    if not any((folder / name).is_file() for folder in near):
        raise UserError(
            f"{KEY}={path} names {listing([file])}, which is no image of {listing([index.names[label]])} in "
            f"{index.root}; name files by their path from data.root, or by name."
        )
