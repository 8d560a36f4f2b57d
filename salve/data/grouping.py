# SPDX-License-Identifier: MIT
"""Read which group each image belongs to from a CSV file with the columns file, class and one attribute."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from salve.data.files import Index
from salve.data.groups import Groups
from salve.data.naming import listing, nearest
from salve.data.tables import ranked, read_table
from salve.types import Split, UserError

KEY = "data.groups"
_COLUMNS = ("file", "class")


def read_groups(path: Path, index: Index) -> tuple[dict[Split, Groups], list[str]]:
    """Read ``data.groups``.

    A file is named by its path relative to ``data.root``, by its path relative to the folder of its split, or by its
    name alone if no other image of its class has that name.

    Args:
        path: the CSV file. index: the images in use.

    Returns:
        The groups of each split, and sentences about rows without an image and images without a row.

    Raises:
        UserError: the file cannot be read or has other columns; a class is unknown, or not that of the image; a name
            stands for several images; an image has several rows; or no row is that of an image.
    """
    table = read_table(KEY, path)
    others = [name for name in table if name not in _COLUMNS]
    if not set(_COLUMNS) <= set(table) or len(others) != 1:
        raise UserError(
            f"{KEY}={path} must have the columns file, class and one more, the attribute, but has "
            f"{listing(list(table), 10)}."
        )
    (attribute,) = others
    labels = labels_of(path, table["class"], index, KEY)
    places = Places(index, KEY)
    found: dict[tuple[Split, int], str] = {}
    unknown = []
    for file, label, value in zip(table["file"], labels, table[attribute], strict=True):
        image = places.find(path, file, label)
        if image is None:
            unknown.append(file)
        elif image in found:
            raise UserError(f"{KEY}={path} has more than one row for {listing([file])}; leave one.")
        else:
            found[image] = value.strip()
    if not found:
        raise UserError(
            f"{KEY}={path} names no image of {index.root}: none of its {len(unknown)} files, such as "
            f"{listing(unknown[:1])}, is there; files are named by their path from data.root, or by name."
        )
    values = ranked(value for value in found.values() if value)
    if not values:
        raise UserError(f"{KEY}={path} has no value in its column {attribute!r}.")
    number = {"": -1} | {value: i for i, value in enumerate(values)}
    groups = {
        split: Groups(
            attribute, values, torch.tensor([number[found.get((split, i), "")] for i in range(len(index.files[split]))])
        )
        for split in index.files
    }
    return groups, _remarks(path, index, found, unknown)


def labels_of(path: Path, classes: Sequence[str], index: Index, key: str) -> list[int]:
    """The label that each row's class stands for: a name of a class, or of its folder.

    Args:
        path: of the table. classes: the cells of its column. index: the images in use. key: the setting that names it.

    Raises:
        UserError: a class is unknown.
    """
    known = {name: i for names in (index.values, index.names) for i, name in enumerate(names)}
    for name in classes:
        if name not in known:
            raise UserError(f"{key}={path} names the class {listing([name])}, {nearest(name, index.names)}.")
    return [known[name] for name in classes]


class Places:
    """Finds images by what a row calls them.

    Args:
        index: the images in use. key: the setting that names the table, for messages.
    """

    def __init__(self, index: Index, key: str) -> None:
        self._index, self._key = index, key
        self._by_path: dict[str, list[tuple[Split, int]]] = defaultdict(list)
        self._by_name: dict[str, list[tuple[Split, int]]] = defaultdict(list)
        for split, files in index.files.items():
            for i, file in enumerate(files):
                whole = f"{index.folders[split]}/{file.path}".removeprefix("./")
                for path in {whole, file.path}:
                    self._by_path[path].append((split, i))
                self._by_name[whole.rpartition("/")[2]].append((split, i))

    def find(self, path: Path, file: str, label: int) -> tuple[Split, int] | None:
        """The split and number of the image of a row; None if there is none.

        Args:
            path: of the table. file: what the row calls the image. label: its class.

        Raises:
            UserError: the image has another class, or the name stands for several images.
        """
        name = file.replace("\\", "/").removeprefix("./")
        images = self._by_path.get(name) or ([] if "/" in name else self._by_name.get(name, []))
        of_class = [(split, i) for split, i in images if self._index.files[split][i].label == label]
        if images and not of_class:
            split, i = images[0]
            own = self._index.names[self._index.files[split][i].label]
            raise UserError(
                f"{self._key}={path} gives {listing([file])} the class {listing([self._index.names[label]])}, but it "
                f"is of {listing([own])}."
            )
        if len(of_class) > 1:
            raise UserError(
                f"{self._key}={path} names {listing([file])}, of which there are {len(of_class)}; name such images by "
                "their path from data.root."
            )
        return of_class[0] if of_class else None


def _remarks(path: Path, index: Index, found: Mapping[tuple[Split, int], str], unknown: Sequence[str]) -> list[str]:
    remarks = []
    if unknown:
        names = "1 file" if len(unknown) == 1 else f"{len(unknown)} files"
        remarks.append(f"{path.name} names {names} that are no image in use, such as {listing(unknown[:1])}.")
    counts = Counter(split for (split, _), value in found.items() if value)
    for split, files in index.files.items():
        if missing := len(files) - counts[split]:
            first = next(file.path for i, file in enumerate(files) if not found.get((split, i)))
            remarks.append(
                f"{path.name} gives no group to {missing} of the {len(files)} images of {split}, such as "
                f"{listing([first])}."
            )
    return remarks
