# SPDX-License-Identifier: MIT
"""Images in files, of which the data sources differ in how they find them."""

import hashlib
import json
import os
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from salve.data.base import ImageData, check_split
from salve.data.decode import TooLarge, UnknownWhite, check_white, image_size, read_rgb
from salve.data.digests import file_digests
from salve.data.layout import root_folder
from salve.data.naming import listing
from salve.data.transforms import RawImage
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
        name = f"{self.folder}/{file.path}".removeprefix("./")
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


@dataclass(frozen=True)
class Index:
    """What the disk holds.

    Attributes:
        root: the folder that holds the folders of the splits.
        folders: the name of each split's folder.
        values: what stands for each class on the disk: the name of its folder, or its value in a table.
        names: of the classes.
        outputs: of the network, for each class; or None.
        files: of each split.
        remarks: sentences about what is there and not used.
    """

    root: Path
    folders: dict[str, str]
    values: tuple[str, ...]
    names: tuple[str, ...]
    outputs: tuple[int, ...] | None
    files: dict[Split, tuple[ImageFile, ...]]
    remarks: tuple[str, ...]


class FileData(ImageData):
    """Images in files below one folder. Subclasses say which, in :attr:`_index`.

    The constructor does not read the disk; the first use does.

    Args:
        root: the folder that holds all images.
        batch_size, num_workers: see :class:`ImageData`.
        limit_per_class: use only the first so many images of each class in each split; None uses all.
        white: which value is white in grey images of more than 8 bits; see :func:`salve.data.decode.to_rgb`.

    Raises:
        UserError: no root, or a value outside its range; once the disk is read, whatever :meth:`check` finds.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        num_workers: int = 0,
        limit_per_class: int | None = None,
        white: float | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_limit(limit_per_class)
        check_white(white)
        self.root = root_folder(root)
        self.limit_per_class = limit_per_class
        self.white = white

    @cached_property
    @abstractmethod
    def _index(self) -> Index:
        """What the disk holds."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self._index.names

    @property
    def class_values(self) -> tuple[str, ...]:
        """What stands for each class on the disk: the name of its folder, or its value in a table."""
        return self._index.values

    @property
    def outputs(self) -> tuple[int, ...] | None:
        return self._index.outputs

    def raw(self, split: Split) -> FileImages:
        files = self._files(split)
        return FileImages(self._index.root, self._index.folders[split], files, self.white)

    def labels(self, split: Split) -> Labels:
        return torch.tensor([file.label for file in self._files(split)])

    def files(self, split: Split) -> list[str]:
        """See :meth:`ImageData.files`."""
        return [f"{self._index.folders[split]}/{file.path}".removeprefix("./") for file in self._files(split)]

    def fingerprint(self) -> str:
        """SHA-256 of class names, outputs, white, and of the split, relative path and bytes of every file in use.

        Reads files that are new or may have changed; see :mod:`salve.data.digests`.
        """
        return self._fingerprint

    def check(self) -> None:
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

    @cached_property
    def native_size(self) -> int:  # type: ignore[override]
        """The shorter side of images that are all of one size; of other images, and larger ones, 224."""
        sizes = set(self.sizes())
        return min(*sizes.pop(), ImageData.native_size) if len(sizes) == 1 else ImageData.native_size

    def _files(self, split: Split) -> tuple[ImageFile, ...]:
        check_split(split)
        return self._index.files[split]

    @cached_property
    def _digests(self) -> dict[Split, list[str]]:
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
                digest.update(json.dumps([split, *self._identity(file), own]).encode())
        return digest.hexdigest()

    def _identity(self, file: ImageFile) -> list[str | int]:
        """What the fingerprint holds of a file beside its split and bytes."""
        return [file.path]

    def _shared_images(self) -> list[str]:
        digests = self._digests
        two: tuple[tuple[Split, Split], ...] = (("train", "select"), ("train", "test"), ("select", "test"))
        return [
            f"{count} of the {len(digests[there])} images of {there} are also in {here}, byte for byte."
            for here, there in two
            if (count := sum(map(set(digests[here]).__contains__, digests[there])))
        ]


def check_limit(limit_per_class: int | None) -> None:
    """Check the setting ``data.limit_per_class``.

    Raises:
        UserError: it is below 1.
    """
    if limit_per_class is not None and limit_per_class < 1:
        raise UserError(f"data.limit_per_class={limit_per_class} must be at least 1, or null for all images.")


def refuse_empty(folder: Path, files: list[ImageFile]) -> None:
    """Refuse files of 0 bytes, and links to nowhere.

    Raises:
        UserError: there are some.
    """
    empty = []
    for file in files:
        try:
            if os.stat(folder / file.path).st_size == 0:
                empty.append(file.path)
        except OSError as error:  # a link to nowhere
            raise UserError(f"The image {folder / file.path} cannot be opened ({error.strerror}).") from error
    if empty:
        raise UserError(f"{folder} holds empty image files (0 bytes): {listing(empty)}; replace or remove them.")


def first_of_each(files: list[ImageFile], limit: int | None) -> tuple[ImageFile, ...]:
    """The first so many files of each class, in their order."""
    taken: dict[int, int] = {}
    kept = []
    for file in files:
        taken[file.label] = taken.get(file.label, 0) + 1
        if limit is None or taken[file.label] <= limit:
            kept.append(file)
    return tuple(kept)
