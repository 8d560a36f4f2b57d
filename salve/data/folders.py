# SPDX-License-Identifier: MIT
"""Images in class folders."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np

from salve.data.base import check_split
from salve.data.boxes import Boxes
from salve.data.boxing import read_boxes
from salve.data.classes import chosen_classes
from salve.data.files import FileData, ImageFile, Index, first_of_each, refuse_empty
from salve.data.grouping import read_groups
from salve.data.groups import Groups
from salve.data.layout import read_layout
from salve.data.naming import listing
from salve.data.splits import check_share, divide, named_splits
from salve.data.walk import Found, find_images, loose_images, subfolders
from salve.types import Split, UserError


class FolderData(FileData):
    """Images in class folders: ``root/train/<class>/…``, and held-out ones in one or two folders beside ``train``.

    Without ``splits``, the held-out folders are found by name: ``select`` and ``test``, or ``val`` (as *select*) and
    ``test``, or ``val`` alone, or ``test`` alone. A single held-out folder is divided into *select* and *test*, class
    by class.

    Classes are the folders' names in sorted order; images are sorted by path. Hidden files and folders are skipped, and
    so are files that are no images; :meth:`remarks` counts them. The constructor does not read the disk; the first use
    does.

    Args:
        root: the folder that holds the folders of the splits.
        batch_size, num_workers: see :class:`ImageData`.
        limit_per_class: use only the first so many images of each class in each split; None uses all.
        splits: the folder of each split, such as ``{"train": "training", "test": "validation"}``. It must name "train"
            and at least one of "select" and "test"; if both are one folder, or only one is named, that is divided.
            None looks for the usual names.
        select_share: share of each class that goes to *select* where a folder is divided, in (0, 1).
        split_seed: seed of that division.
        classes: use only these class folders, in this order; a mapping also gives each a name for people. None uses
            all.
        outputs: the output of the network for each class folder, for a network with more outputs than classes: a
            mapping folder → unit; the path of a CSV file with the columns folder, output and optionally name; or
            "imagenet", for folders named by WordNet id or class name. See :attr:`ImageData.outputs`.
        white: which value is white in grey images of more than 8 bits; see :func:`salve.data.decode.to_rgb`.
        groups: a CSV file with the columns file, class and one attribute, for :meth:`groups`; see
            :func:`salve.data.grouping.read_groups`.
        boxes: a CSV file with a row for each box around an object, for :meth:`boxes`; see
            :func:`salve.data.boxing.read_boxes`.

    Raises:
        UserError: no root, or a value outside its range; once the disk is read, whatever :meth:`check` finds.
    """

    name = "folder"

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        num_workers: int = 0,
        limit_per_class: int | None = None,
        splits: Mapping[str, str] | None = None,
        select_share: float = 0.5,
        split_seed: int = 0,
        classes: Sequence[str] | Mapping[str, str] | None = None,
        outputs: str | Mapping[str, int] | None = None,
        white: float | None = None,
        groups: str | Path | None = None,
        boxes: str | Path | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, limit_per_class, white)
        check_share(select_share, split_seed)
        self.splits = None if splits is None else named_splits(splits)
        self.select_share = select_share
        self.split_seed = split_seed
        self._chosen = None if classes is None else chosen_classes(classes)
        self._mapping = dict(outputs) if isinstance(outputs, Mapping) else outputs
        self._groups_file = None if groups is None else Path(groups).expanduser()
        self._boxes_file = None if boxes is None else Path(boxes).expanduser()

    def check(self) -> None:
        """Check folders, names and file sizes; opens no file that has the suffix of an image, but for those with boxes.

        Raises:
            UserError: no root, a split without a folder, fewer than two classes, a class that is empty or missing in a
                split, too few images to divide, an empty file, a folder that cannot be read, a name that is not UTF-8,
                outputs that do not fit the classes, or a file of groups or boxes that does not fit the images.
        """
        super().check()
        _ = self._grouping, self._boxed

    def groups(self, split: Split) -> Groups | None:
        check_split(split)
        return self._grouping[0].get(split)

    def boxes(self, split: Split) -> Boxes | None:
        check_split(split)
        return self._boxed[0].get(split)

    def remarks(self) -> list[str]:
        """See :meth:`FileData.remarks`; also images without a group, and rows without an image."""
        return [*super().remarks(), *self._grouping[1], *self._boxed[1]]

    @cached_property
    def _grouping(self) -> tuple[dict[Split, Groups], list[str]]:
        return ({}, []) if self._groups_file is None else read_groups(self._groups_file, self._index)

    @cached_property
    def _boxed(self) -> tuple[dict[Split, Boxes], list[str]]:
        return ({}, []) if self._boxes_file is None else read_boxes(self._boxes_file, self._index)

    def _folder(self) -> Path:
        """The folder that holds the folders of the splits."""
        return self.root

    def _class_name(self, folder: str) -> str:
        return folder

    @cached_property
    def _index(self) -> Index:
        layout = read_layout(self._folder(), self.splits, self._chosen, self._mapping, self._class_name)
        root, folders, classes, names, outputs = layout
        apart = list(dict.fromkeys(folders.values()))
        found = {folder: find_images(root / folder, classes) for folder in apart}
        files = {folder: _labelled(root / folder, classes, found[folder]) for folder in apart}
        own = {split: files[folder] for split, folder in folders.items()}
        if folders["select"] == folders["test"]:
            held_out = files[folders["test"]]
            labels = np.asarray([file.label for file in held_out], dtype=np.int64)
            try:
                select, test = divide(labels, names, self.select_share, self.split_seed)
            except UserError as error:
                raise UserError(f"{root / folders['test']} cannot be divided into select and test. {error}") from error
            own |= {"select": [held_out[i] for i in select], "test": [held_out[i] for i in test]}
        limited = {split: first_of_each(own[split], self.limit_per_class) for split in get_args(Split)}
        remarks = tuple(chain.from_iterable(_found_besides(root, folder, found[folder]) for folder in apart))
        return Index(root, folders, tuple(classes), names, outputs, limited, remarks)


def _labelled(folder: Path, classes: list[str], found: Found) -> list[ImageFile]:
    files: list[ImageFile] = []
    for label, (name, paths) in enumerate(zip(classes, found.images, strict=True)):
        if not paths:
            raise UserError(f"The class {name!r} has no image in {folder / name}.")
        files += [ImageFile(path, label) for path in paths]
    refuse_empty(folder, files)
    return files


def _found_besides(root: Path, folder: str, found: Found) -> list[str]:
    """Sentences about what lies in a split's folder and is not used."""
    remarks = []
    if found.left_out:
        kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in found.left_out.most_common(6))
        more = ", …" if len(found.left_out) > 6 else ""
        count = found.left_out.total()
        are = "1 file in {} is not a readable image" if count == 1 else f"{count} files in {{}} are not readable images"
        remarks.append(f"{are.format(folder)}: {kinds}{more}.")
    if loose := loose_images(root / folder):
        remarks.append(f"{loose} {'image lies' if loose == 1 else 'images lie'} in {folder} outside of class folders.")
    if hidden := subfolders(root / folder, hidden=True):
        remarks.append(f"Hidden folders in {folder} are not used as classes: {listing(hidden)}.")
    if found.not_followed:
        remarks.append(f"Links in {folder} to folders that are read anyway are skipped: {listing(found.not_followed)}.")
    return remarks
