# SPDX-License-Identifier: MIT
"""Images that a table names, with their classes, splits and an attribute: Waterbirds, CelebA, and one's own."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from salve.data.classes import check_class_names, chosen_classes, map_outputs
from salve.data.files import FileData, ImageFile, Index, first_of_each, refuse_empty
from salve.data.groups import Groups
from salve.data.naming import listing, nearest
from salve.data.splits import HELD_OUT, LAYOUTS, check_share, divide, named_splits
from salve.data.tables import Table, joined, ranked, table_files
from salve.types import Split, UserError


class TableData(FileData):
    """Images below a folder, with a table that says of each its class, its split and, if wanted, an attribute.

    Args:
        root: the folder that the paths of images and tables start from.
        table: the CSV file; or several of the same images, whose columns are put side by side by the first column of
            the first file. A ``.txt`` file is read as CelebA's.
        file: the path of an image, with names of columns in braces: ``"{split}/{name}.jpg"``.
        label: the column of the class. split: the column of the split.
        attribute: the column of an attribute, for :meth:`groups`; None if there is none.
        object: the column of what several images may share, for :meth:`objects`; None if there is none.
        batch_size, num_workers: see :class:`ImageData`.
        limit_per_class: use only the first so many images of each class in each split; None uses all.
        classes: use only these values of the label, in this order; a mapping also gives each a name for people. None
            uses all values, numbers by size, texts in alphabetical order.
        values: value of the attribute → its name for people; None keeps them as they are. Groups are in this order.
        splits: the value of each split, such as ``{"train": 0, "select": 1, "test": 2}``. If only one of "select" and
            "test" is named, its images are divided. None looks for train with select, val or test.
        select_share, split_seed: of that division; see :class:`salve.data.FolderData`.
        outputs: the output of the network for each value of the label; see :class:`salve.data.FolderData`.
        white: see :class:`salve.data.FolderData`.

    Raises:
        UserError: no root, or a value outside its range; once the disk is read, whatever :meth:`check` finds.
    """

    name = "table"

    def __init__(
        self,
        root: str | Path,
        table: str | Sequence[str],
        file: str,
        label: str,
        split: str,
        batch_size: int,
        num_workers: int = 0,
        attribute: str | None = None,
        limit_per_class: int | None = None,
        classes: Sequence[str] | Mapping[str, str] | None = None,
        values: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
        select_share: float = 0.5,
        split_seed: int = 0,
        outputs: str | Mapping[str, int] | None = None,
        white: float | None = None,
        object: str | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, limit_per_class, white)
        check_share(select_share, split_seed)
        self.table = [table] if isinstance(table, str) else list(table)
        named = [None if one is None else str(one) for one in (attribute, object)]
        self.columns = _Columns(file, str(label), str(split), *named)
        self.values = None if values is None else {str(value): str(name) for value, name in values.items()}
        self.splits = None if splits is None else named_splits({k: str(v) for k, v in dict(splits).items()})
        self.select_share = select_share
        self.split_seed = split_seed
        self._chosen = None if classes is None else chosen_classes(classes)
        self._mapping = dict(outputs) if isinstance(outputs, Mapping) else outputs
        if not self.columns.of_file:
            raise UserError(f"data.file={file} names no column; write one in braces, such as '{{file}}'.")

    def check(self) -> None:
        """Check tables and files; opens no image.

        Raises:
            UserError: no root or table, a column that is not there, a file that is named twice, missing or empty, a
                split or class without images, or outputs that do not fit the classes.
        """
        super().check()

    def groups(self, split: Split) -> Groups | None:
        """The attribute of each image, if there is one; unknown where its cell is empty."""
        files = self._files(split)
        if self.columns.attribute is None:
            return None
        attribute = self._read.attribute
        names = self._value_names
        values = list(names)
        numbers = [values.index(attribute[file.path]) if attribute[file.path] else -1 for file in files]
        return Groups(self.columns.attribute, tuple(names.values()), torch.tensor(numbers))

    def objects(self, split: Split) -> Int[Tensor, " N"] | None:
        """See :meth:`ImageData.objects`; an image whose cell is empty has its own."""
        files = self._files(split)
        if self.columns.object is None:
            return None
        named = [
            (self._read.object[file.path], "") if self._read.object[file.path] else ("", file.path) for file in files
        ]
        number = {name: i for i, name in enumerate(dict.fromkeys(named))}
        return torch.tensor([number[name] for name in named])

    def _identity(self, file: ImageFile) -> list[str | int]:
        return [file.path, file.label]

    @cached_property
    def _value_names(self) -> dict[str, str]:
        """Value of the attribute → its name for people."""
        there = ranked(value for value in self._read.attribute.values() if value)
        if self.values is None:
            return {value: value for value in there}
        for value in there:
            if value not in self.values:
                raise UserError(
                    f"data.values has no name for the value {value!r} of the column {self.columns.attribute!r}, whose "
                    f"values are {listing(there, 10)}."
                )
        return self.values

    @cached_property
    def _read(self) -> "_Read":
        table = joined("data.table", table_files(self.root, self.table), self.columns.wanted)
        parts = [table[name] for name in self.columns.of_file]
        pattern = re.sub(r"\{[^{}]*\}", "{}", self.columns.file)
        paths = [pattern.format(*cells) for cells in zip(*parts, strict=True)]
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            raise UserError(
                f"{', '.join(self.table)} names {len(twice)} files more than once, such as {listing(twice[:1])}."
            )
        return _Read(paths, self.columns, table)

    @cached_property
    def _index(self) -> Index:
        read = self._read
        there = ranked(set(read.labels))
        values = there if self._chosen is None else tuple(self._chosen)
        for value in values:
            if value not in there:
                raise UserError(f"data.classes names {value!r}, {nearest(value, there)} in {self.columns.label!r}.")
        if len(values) < 2:
            raise UserError(f"The column {self.columns.label!r} has {len(values)} class; a classifier needs two.")
        units, named = map_outputs(self._mapping, values)
        given = self._chosen or {}
        names = tuple(given.get(value) or named.get(value) or value for value in values)
        check_class_names(names, values)
        label_of = {value: label for label, value in enumerate(values)}
        of_split = _splits(self.splits, ranked(set(read.splits)), self.columns.split)
        own: dict[Split, list[ImageFile]] = {split: [] for split in get_args(Split)}
        unused = 0
        for path, value, place in zip(read.paths, read.labels, read.splits, strict=True):
            mine = [split for split in get_args(Split) if of_split[split] == place]
            unused += not mine or value not in label_of
            for split in mine if value in label_of else ():
                own[split].append(ImageFile(path, label_of[value]))
        for split, files in own.items():
            have = {file.label for file in files}
            if lacking := [name for label, name in enumerate(names) if label not in have]:
                raise UserError(f"{', '.join(self.table)} has no image of {listing(lacking)} in {of_split[split]!r}.")
        self._refuse_missing(list(dict.fromkeys(file.path for files in own.values() for file in files)))
        if of_split["select"] == of_split["test"]:
            both = own["test"]
            labels = np.asarray([file.label for file in both], dtype=np.int64)
            select, test = divide(labels, names, self.select_share, self.split_seed)
            own |= {"select": [both[i] for i in select], "test": [both[i] for i in test]}
        limited = {split: first_of_each(files, self.limit_per_class) for split, files in own.items()}
        for split in limited:
            refuse_empty(self.root, list(limited[split]))
        remarks = [f"{unused} rows of {', '.join(self.table)} are of other classes or splits."] if unused else []
        folders = dict.fromkeys(get_args(Split), ".")
        return Index(self.root, folders, values, names, units, limited, tuple(remarks))

    def _refuse_missing(self, paths: Sequence[str]) -> None:
        if missing := [path for path in paths if not os.path.exists(self.root / path)]:
            raise UserError(
                f"{self.root} lacks {len(missing)} of the {len(paths)} images that {', '.join(self.table)} names, such "
                f"as {listing(missing[:1])}; data.file={self.columns.file} says where they lie."
            )


class _Columns(NamedTuple):
    """Which columns say what; see :class:`TableData`."""

    file: str
    label: str
    split: str
    attribute: str | None
    object: str | None

    @property
    def of_file(self) -> list[str]:
        """The columns that make up the path of an image."""
        return re.findall(r"\{([^{}]*)\}", self.file)

    @property
    def wanted(self) -> set[str]:
        """All columns that are read."""
        return {*self.of_file, self.label, self.split, *filter(None, (self.attribute, self.object))}


class _Read:
    """What a table says of its images, in its order; ``attribute`` and ``object``: by path."""

    def __init__(self, paths: list[str], columns: _Columns, table: Table) -> None:
        self.paths = paths
        self.labels, self.splits = ([cell.strip() for cell in table[name]] for name in (columns.label, columns.split))
        self.attribute, self.object = (
            {} if name is None else {path: cell.strip() for path, cell in zip(paths, table[name], strict=True)}
            for name in (columns.attribute, columns.object)
        )


def _splits(named: Mapping[str, str] | None, there: Sequence[str], column: str) -> dict[str, str]:
    """The value of each split."""
    if named is None:
        held_out = tuple(name for name in HELD_OUT if name in there)
        if "train" not in there or held_out not in LAYOUTS:
            raise UserError(
                f"The column {column!r} must say train and val, test, val and test, or select and test, but says "
                f"{listing(there, 10)}; data.splits={{train: …, select: …, test: …}} names its values."
            )
        return {"train": "train", **LAYOUTS[held_out]}
    for value in named.values():
        if value not in there:
            raise UserError(f"data.splits names {value!r}, but the column {column!r} has {listing(there, 10)}.")
    if named["train"] in (named["select"], named["test"]):
        raise UserError(f"data.splits={dict(named)} trains on images that are held out; give train its own value.")
    return dict(named)
