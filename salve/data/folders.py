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

_HEADERS = 64  # images whose size is looked at, to tell how large they are


class UnreadableImage(UserError):
    """An image file that cannot be decoded."""

    def __init__(self, message: str) -> None:
        # A loader process hands its error over as text: a whole traceback, ending in this class's name and message.
        super().__init__(message.rsplit("UnreadableImage: ", 1)[-1].strip())


@dataclass(frozen=True)
class ImageFile:
    """One image: its path relative to the folder of its split, in POSIX form, and its label."""

    path: str
    label: int


class FileImages:
    """Decoded images of a split, with labels, in the order of the files, which lie in `root / folder`."""

    def __init__(self, root: Path, folder: str, files: tuple[ImageFile, ...], white: float | None = None) -> None:
        self.root = root
        self.folder = folder
        self.files = files
        self.white = white

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        """
        Raises:
            UnreadableImage: the file is damaged, no image, too large (see `read_rgb`), cannot be opened, or has values
                of which nobody can tell how bright they are.
        """
        file = self.files[index]
        name = f"{self.folder}/{file.path}"
        try:
            return read_rgb(self.root / self.folder / file.path, self.white), file.label
        except UnknownWhite as error:
            raise UnreadableImage(f"the image {name} would be wrong or all but black: {error}") from error
        except TooLarge as error:
            raise UnreadableImage(f"the image {name} is too large: {error}") from error
        # A damaged file makes Pillow's decoders raise almost anything: OSError, SyntaxError, ValueError, struct.error.
        except Exception as error:
            reason = " ".join(str(error).replace(str(self.root) + os.sep, "").split())
            raise UnreadableImage(f"the image {name} cannot be read ({reason}): replace or remove it") from error


class FolderData(ImageData):
    """Any images in class folders: `root/train/<class>/…`, and the held-out ones in another folder or two.

    Without `splits` these are looked for beside `train`: `select` and `test`; `val`, which selects, and `test`; `val`
    alone; or `test` alone. Where one folder holds all held-out images, a share of each class selects and the rest
    tests.

    Classes are the folders' names in sorted order, images are sorted by path; hidden files and folders are passed over,
    and so are files that are no images, of which `remarks` tells. The disk is read when something is first asked for,
    not by the constructor.

    Args:
        root: the folder that holds the folders of the splits.
        batch_size, num_workers: see `ImageData`.
        limit_per_class: use only the first so many images of each class in each split; None uses all.
        splits: the name of each split's folder, such as `{"train": "training", "test": "validation"}`. "train" and at
            least one of "select" and "test" must be in it; one folder for both, or for one of them only, is divided.
            None looks for the usual names.
        select_share: the share of each class that selects, in (0, 1), where one folder is divided.
        split_seed: of that division.
        classes: use only these class folders, in this order; a mapping gives each a name to be shown. None uses all.
        outputs: which output of the network stands for which class folder, where it has others as well: a mapping
            folder → unit, the path of a CSV file with the columns folder, output and perhaps name, or "imagenet",
            which knows folders that are named by WordNet id or by name. See `ImageData.outputs`.
        white: which value of grey images with more than 8 bits is white; None finds out (`salve.data.decode.to_rgb`).

    Raises:
        UserError: no root, a value outside its range; and, once the disk is read, anything `check` finds.
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
        """Of the class names, their outputs, the white, and of every used file's split, relative path and bytes.

        Files are read for it when they are new or may have changed, see `salve.data.digests`.
        """
        return self._fingerprint

    def check(self) -> None:
        """Look at folders, names and sizes, but into no file that has an image's suffix.

        Raises:
            UserError: no root, a split without a folder, fewer than two classes, a class that is empty or not in every
                folder, too few images to divide, an empty file, a folder that cannot be read, a name that is not UTF-8,
                or outputs that do not fit the classes.
        """
        _ = self._index

    def remarks(self) -> list[str]:
        """See `ImageData.remarks`; also what lies in the folders and is not used, and images that two splits share."""
        return [*super().remarks(), *self._index.remarks, *self._shared_images()]

    def sizes(self) -> list[tuple[int, int]]:
        files = self._files("train")
        folder = self._index.root / self._index.folders["train"]
        found = []
        for i in np.linspace(0, len(files) - 1, min(_HEADERS, len(files))).round().astype(int):
            try:
                found.append(image_size(folder / files[i].path))
            except Exception:  # it will be named when it is read
                continue
        return found

    def _folder(self) -> Path:
        """The folder that holds those of the splits."""
        return self.root

    def _class_name(self, folder: str) -> str:
        return folder

    def _files(self, split: Split) -> tuple[ImageFile, ...]:
        check_split(split)
        return self._index.files[split]

    @cached_property
    def _digests(self) -> dict[str, list[str]]:
        """For each split the digest of each of its files."""
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
            f"{count} of the {len(digests[there])} images of {there} are also in {here}, byte for byte"
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
                raise UserError(f"{root / folders['test']}: {error}") from error
            own |= {"select": [held_out[i] for i in select], "test": [held_out[i] for i in test]}
        limited = {split: _first_of_each(own[split], self.limit_per_class) for split in get_args(Split)}
        remarks = tuple(chain.from_iterable(_found_besides(root, folder, found[folder]) for folder in apart))
        return _Index(root, folders, names, outputs, limited, remarks)


@dataclass(frozen=True)
class _Index:
    """What the disk holds: for each split the name of its folder in `root`, and its files."""

    root: Path
    folders: dict[str, str]
    names: tuple[str, ...]
    outputs: tuple[int, ...] | None
    files: dict[str, tuple[ImageFile, ...]]
    remarks: tuple[str, ...]


def check_limit(limit_per_class: int | None) -> None:
    """Raises UserError for a limit below 1."""
    if limit_per_class is not None and limit_per_class < 1:
        raise UserError(f"data.limit_per_class must be at least 1, or null for all images, not {limit_per_class}")


def _labelled(folder: Path, classes: list[str], found: Found) -> list[ImageFile]:
    files: list[ImageFile] = []
    for label, (name, paths) in enumerate(zip(classes, found.images, strict=True)):
        if not paths:
            raise UserError(f"class {name!r} has no image in {folder / name}")
        files += [ImageFile(path, label) for path in paths]
    empty = []
    for file in files:
        try:
            if os.stat(folder / file.path).st_size == 0:
                empty.append(file.path)
        except OSError as error:  # a link to nowhere
            raise UserError(f"the image {file.path} of {folder} cannot be opened ({error.strerror})") from error
    if empty:
        raise UserError(f"empty image files (0 bytes) in {folder}: {listing(empty)}; replace or remove them")
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
        are = "1 file in {} is no image" if count == 1 else f"{count} files in {{}} are no images"
        remarks.append(f"{are.format(folder)} that can be read: {kinds}{more}")
    if loose := loose_images(root / folder):
        remarks.append(f"{loose} {'image lies' if loose == 1 else 'images lie'} in {folder} itself, in no class folder")
    if hidden := subfolders(root / folder, hidden=True):
        remarks.append(f"hidden folders in {folder} are no classes: {listing(hidden)}")
    if found.not_followed:
        remarks.append(f"read once only, though links in {folder} lead there again: {listing(found.not_followed)}")
    return remarks
