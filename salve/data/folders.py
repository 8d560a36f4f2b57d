"""Images in class folders."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from salve.data.base import ImageData, check_split
from salve.data.classes import chosen_classes
from salve.data.decode import TooLarge, UnknownWhite, check_white, image_size, read_rgb
from salve.data.digests import file_digests
from salve.data.layout import read_layout, root_folder
from salve.data.naming import listing
from salve.data.splits import check_share, divide, named_splits
from salve.data.transforms import RawImage
from salve.data.walk import Found, find_images, loose_images, subfolders
from salve.types import Labels, Split, UserError

_HEADERS = 64  # images whose headers are read to estimate the size of all


class UnreadableImage(UserError):
    """An image file that cannot be decoded."""

    def __init__(self, message: str) -> None:
        # A loader process passes on its error as text: a whole traceback that ends in this class's name and message.
        super().__init__(message.rsplit("UnreadableImage: ", 1)[-1].strip())


@dataclass(frozen=True)
class ImageFile:
    """One image: its path relative to the folder of its split, in POSIX form, and its label."""

    path: str
    label: int


class FileImages:
    """Decoded images of a split, with labels.

    Args:
        root: the folder that holds the folders of the splits.
        folder: the name of this split's folder.
        files: the images, in their order.
        white: see :func:`salve.data.decode.to_rgb`.
    """

    def __init__(self, root: Path, folder: str, files: tuple[ImageFile, ...], white: float | None = None) -> None:
        self.root = root
        self.folder = folder
        self.files = files
        self.white = white

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        """Decode one image.

        Raises:
            UnreadableImage: the file cannot be opened, is damaged, no image, or too large, or it is unknown which of
                its values is white; see :func:`salve.data.decode.read_rgb`.
        """
        file = self.files[index]
        name = f"{self.folder}/{file.path}"
        try:
            return read_rgb(self.root / self.folder / file.path, self.white), file.label
        except UnknownWhite as error:
            raise UnreadableImage(f"The image {name} would look wrong or black. {error}") from error
        except TooLarge as error:
            raise UnreadableImage(f"The image {name} is too large. {error}") from error
        # For a damaged file Pillow's decoders raise almost anything: OSError, SyntaxError, ValueError, struct.error.
        except Exception as error:
            reason = " ".join(str(error).replace(str(self.root) + os.sep, "").split())
            raise UnreadableImage(f"The image {name} cannot be read ({reason}); replace or remove it.") from error


class FolderData(ImageData):
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
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_limit(limit_per_class)
        check_share(select_share, split_seed)
        check_white(white)
        self.root = root_folder(root)
        self.limit_per_class = limit_per_class
        self.splits = None if splits is None else named_splits(splits)
        self.select_share = select_share
        self.split_seed = split_seed
        self.white = white
        self._chosen = None if classes is None else chosen_classes(classes)
        self._mapping = dict(outputs) if isinstance(outputs, Mapping) else outputs

    @property
    def classes(self) -> tuple[str, ...]:
        return self._index.names

    @property
    def outputs(self) -> tuple[int, ...] | None:
        return self._index.outputs

    def raw(self, split: Split) -> FileImages:
        files = self._files(split)
        return FileImages(self._index.root, self._index.folders[split], files, self.white)

    def labels(self, split: Split) -> Labels:
        return torch.tensor([file.label for file in self._files(split)])

    def fingerprint(self) -> str:
        """SHA-256 of class names, outputs, white, and of the split, relative path and bytes of every file in use.

        Reads files that are new or may have changed; see :mod:`salve.data.digests`.
        """
        return self._fingerprint

    def check(self) -> None:
        """Check folders, names and file sizes; opens no file that has the suffix of an image.

        Raises:
            UserError: no root, a split without a folder, fewer than two classes, a class that is empty or missing in a
                split, too few images to divide, an empty file, a folder that cannot be read, a name that is not UTF-8,
                or outputs that do not fit the classes.
        """
        _ = self._index

    def remarks(self) -> list[str]:
        """See :meth:`ImageData.remarks`; also files and folders that are not used, and images in two splits."""
        return [*super().remarks(), *self._index.remarks, *self._shared_images()]

    def sizes(self) -> list[tuple[int, int]]:
        files = self._files("train")
        folder = self._index.root / self._index.folders["train"]
        found = []
        for i in np.linspace(0, len(files) - 1, min(_HEADERS, len(files))).round().astype(int):
            try:
                found.append(image_size(folder / files[i].path))
            except Exception:  # reported when the image is read
                continue
        return found

    def _folder(self) -> Path:
        """The folder that holds the folders of the splits."""
        return self.root

    def _class_name(self, folder: str) -> str:
        return folder

    def _files(self, split: Split) -> tuple[ImageFile, ...]:
        check_split(split)
        return self._index.files[split]

    @cached_property
    def _digests(self) -> dict[str, list[str]]:
        """For each split, the digest of each of its files."""
        paths = {
            split: [f"{self._index.folders[split]}/{file.path}" for file in files]
            for split, files in self._index.files.items()
        }
        digests = iter(file_digests(self._index.root, list(chain.from_iterable(paths.values()))))
        return {split: [next(digests) for _ in own] for split, own in paths.items()}

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.classes, self.outputs, self.white]).encode())
        for split, digests in self._digests.items():
            for file, own in zip(self._index.files[split], digests, strict=True):
                digest.update(json.dumps([split, file.path, own]).encode())
        return digest.hexdigest()

    def _shared_images(self) -> list[str]:
        digests = self._digests
        return [
            f"{count} of the {len(digests[there])} images of {there} are also in {here}, byte for byte."
            for here, there in (("train", "select"), ("train", "test"), ("select", "test"))
            if (count := sum(map(set(digests[here]).__contains__, digests[there])))
        ]

    @cached_property
    def _index(self) -> "_Index":
        layout = read_layout(self._folder(), self.splits, self._chosen, self._mapping, self._class_name)
        root, folders, classes, names, outputs = layout
        apart = list(dict.fromkeys(folders.values()))
        found = {folder: find_images(root / folder, classes) for folder in apart}
        files = {folder: _labelled(root / folder, classes, found[folder]) for folder in apart}
        own = {split: files[folder] for split, folder in folders.items()}
        if folders["select"] == folders["test"]:
            held_out = files[folders["test"]]
            labels = np.asarray([file.label for file in held_out])
            try:
                select, test = divide(labels, names, self.select_share, self.split_seed)
            except UserError as error:
                raise UserError(f"{root / folders['test']} cannot be divided into select and test. {error}") from error
            own |= {"select": [held_out[i] for i in select], "test": [held_out[i] for i in test]}
        limited = {split: _first_of_each(own[split], self.limit_per_class) for split in get_args(Split)}
        remarks = tuple(chain.from_iterable(_found_besides(root, folder, found[folder]) for folder in apart))
        return _Index(root, folders, names, outputs, limited, remarks)


@dataclass(frozen=True)
class _Index:
    """What the disk holds.

    Attributes:
        root: the folder that holds the folders of the splits.
        folders: the name of each split's folder.
        names: of the classes.
        outputs: of the network, for each class; or None.
        files: of each split.
        remarks: sentences about what is there and not used.
    """

    root: Path
    folders: dict[str, str]
    names: tuple[str, ...]
    outputs: tuple[int, ...] | None
    files: dict[str, tuple[ImageFile, ...]]
    remarks: tuple[str, ...]


def check_limit(limit_per_class: int | None) -> None:
    """Check the setting ``data.limit_per_class``.

    Raises:
        UserError: it is below 1.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise UserError(f"data.limit_per_class={limit_per_class} must be at least 1, or null for all images.")


def _labelled(folder: Path, classes: list[str], found: Found) -> list[ImageFile]:
    files: list[ImageFile] = []
    for label, (name, paths) in enumerate(zip(classes, found.images, strict=True)):
        if not paths:
            raise UserError(f"The class {name!r} has no image in {folder / name}.")
        files += [ImageFile(path, label) for path in paths]
    empty = []
    for file in files:
        try:
            if os.stat(folder / file.path).st_size == 0:
                empty.append(file.path)
        except OSError as error:  # a link to nowhere
            raise UserError(f"The image {folder / file.path} cannot be opened ({error.strerror}).") from error
    if empty:
        raise UserError(f"{folder} holds empty image files (0 bytes): {listing(empty)}; replace or remove them.")
    return files


def _first_of_each(files: list[ImageFile], limit: int | None) -> tuple[ImageFile, ...]:
    """The first so many files of each class, in their order."""
    taken: dict[int, int] = {}
    kept = []
    for file in files:
        taken[file.label] = taken.get(file.label, 0) + 1
        if limit is None or taken[file.label] <= limit:
            kept.append(file)
    return tuple(kept)


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
