"""Images in class folders: one's own, and Imagenette."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
import torchvision
from PIL import Image

from salve.data.base import ImageData, check_split
from salve.data.download import fetch
from salve.data.transforms import RawImage, to_rgb
from salve.types import Labels, Split, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

ImagenetteSize = Literal["full", "320px", "160px"]

IMAGENETTE_FOLDERS: dict[str, str] = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}

IMAGENETTE_CLASSES: dict[str, str] = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""WordNet id → name, of Imagenette's ten classes."""


class UnreadableImage(UserError):
    """An image file that cannot be decoded."""

    def __init__(self, message: str) -> None:
        # A loader process hands its error over as text: a whole traceback, ending in this class's name and message.
        super().__init__(message.rsplit("UnreadableImage: ", 1)[-1].strip())


@dataclass(frozen=True)
class ImageFile:
    """One image of a split: its path relative to the split's folder, in POSIX form, its size in bytes, its label."""

    path: str
    size: int
    label: int


class FileImages:
    """Decoded images of a split, with labels, in the order of the files."""

    def __init__(self, root: Path, split: str, files: tuple[ImageFile, ...]) -> None:
        self.root = root
        self.split = split
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        """
        Raises:
            UnreadableImage: the file is damaged, no image, or cannot be opened.
        """
        file = self.files[index]
        try:
            with Image.open(self.root / self.split / file.path) as image:
                image.load()  # Pillow decodes when asked to, and a damaged file must be found out here
                return to_rgb(image), file.label
        # A damaged file makes Pillow's decoders raise almost anything: OSError, SyntaxError, ValueError, struct.error.
        except Exception as error:
            name = f"{self.split}/{file.path}"
            reason = " ".join(str(error).replace(str(self.root) + os.sep, "").split())
            raise UnreadableImage(f"the image {name} cannot be read ({reason}): replace or remove it") from error


class FolderData(ImageData):
    """Any images in `root/train/<class>/…` and `root/val/<class>/…`.

    Classes are the folders' names in sorted order, images are sorted by path, hidden files and files without an
    image's suffix are ignored. The disk is read when something is first asked for, not by the constructor.

    Args:
        root: the folder that holds `train` and `val`.
        batch_size, num_workers: see `ImageData`.
        limit_per_class: use only the first so many images of each class in each split; None uses all.

    Raises:
        UserError: no root, limit_per_class below 1; and, once the disk is read, anything `check` finds.
    """

    name = "folder"

    def __init__(
        self, root: str | Path, batch_size: int, num_workers: int = 0, limit_per_class: int | None = None
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_limit(limit_per_class)
        self.root = root_folder(root)
        self.limit_per_class = limit_per_class

    @property
    def classes(self) -> tuple[str, ...]:
        return self._index[0]

    def raw(self, split: Split) -> FileImages:
        return FileImages(self._folder(), split, self._files(split))

    def labels(self, split: Split) -> Labels:
        return torch.tensor([file.label for file in self._files(split)])

    def fingerprint(self) -> str:
        """Of the class names and of every used file's split, relative path and size in bytes."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in get_args(Split):
            for file in self._files(split):
                digest.update(json.dumps([split, file.path, file.size]).encode())
        return digest.hexdigest()

    def check(self) -> None:
        """Look at folders, names and sizes, but into no file.

        Raises:
            UserError: no root, no train or val folder, fewer than two classes, a class that is empty or in one split
                only, or an empty file.
        """
        _ = self._index

    def _folder(self) -> Path:
        """The folder that holds `train` and `val`."""
        return self.root

    def _class_name(self, folder: str) -> str:
        return folder

    def _files(self, split: Split) -> tuple[ImageFile, ...]:
        check_split(split)
        return self._index[1][split]

    @cached_property
    def _index(self) -> tuple[tuple[str, ...], dict[str, tuple[ImageFile, ...]]]:
        folder = self._folder()
        if not folder.is_dir():
            raise UserError(f"data.root={folder} is no folder: pass one that holds train/<class>/ and val/<class>/")
        for split in get_args(Split):
            if not (folder / split).is_dir():
                raise UserError(f"{folder} has no folder {split!r}: it must hold train/<class>/ and val/<class>/")
        names = {split: _subfolders(folder / split) for split in get_args(Split)}
        for here, there in (("train", "val"), ("val", "train")):
            only_here = [name for name in names[here] if name not in names[there]]
            if only_here:
                raise UserError(
                    f"{folder / there} lacks {_listing(only_here)}: every class folder of {here} must be in {there} too"
                )
        classes = names["train"]
        if len(classes) < 2:
            raise UserError(f"{folder / 'train'} has {len(classes)} class folders: a classifier needs at least two")
        files = {split: self._scan(folder / split, classes) for split in get_args(Split)}
        return tuple(map(self._class_name, classes)), files

    def _scan(self, folder: Path, classes: list[str]) -> tuple[ImageFile, ...]:
        files: list[ImageFile] = []
        for label, name in enumerate(classes):
            found = sorted(_image_files(folder, name))
            if not found:
                raise UserError(f"class {name!r} has no image in {folder / name} ({', '.join(IMAGE_SUFFIXES)})")
            files += [ImageFile(path, size, label) for path, size in found[: self.limit_per_class]]
        empty = [file.path for file in files if file.size == 0]
        if empty:
            raise UserError(f"empty image files (0 bytes) in {folder}: {_listing(empty)}; replace or remove them")
        return tuple(files)


class ImagenetteData(FolderData):
    """Imagenette: ten easily told-apart ImageNet classes, by Jeremy Howard (fast.ai).

    Args:
        root: where torchvision keeps or puts its `imagenette2*` folders; or a folder that holds exactly one such folder
            of another size; or a folder that holds `train` and `val` itself.
        size: "full", "320px" (shorter side) or "160px".
        download: fetch it into `root` through torchvision if it is not there.
        batch_size, num_workers, limit_per_class: see `FolderData`.

    Raises:
        UserError: unknown size; and, once the disk is read, nothing found, a failed download, a folder that is no
            Imagenette class, or anything `FolderData.check` finds.
    """

    name = "imagenette"

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        num_workers: int = 0,
        size: ImagenetteSize = "160px",
        download: bool = False,
        limit_per_class: int | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, limit_per_class)
        if size not in IMAGENETTE_FOLDERS:
            raise UserError(f"data.size={size!r} is no size of Imagenette: choose from {', '.join(IMAGENETTE_FOLDERS)}")
        self.size = size
        self.download = download

    def prepare_data(self) -> None:
        """Download if asked to and needed; Lightning calls this in one process only."""
        if self.download and self._existing() is None:
            fetch(
                self.name,
                self.root,
                is_there=lambda: self._existing() is not None,
                download=lambda: torchvision.datasets.Imagenette(self.root, size=self.size, download=True),
            )

    def _folder(self) -> Path:
        self.prepare_data()
        folder = self._existing()
        if folder is None:
            raise UserError(
                f"no Imagenette ({self.size}) in data.root={self.root}: pass data.download=true to fetch it, or as "
                f"data.root a folder that holds train/ and val/, or one that holds {IMAGENETTE_FOLDERS[self.size]}/"
            )
        return folder

    def _existing(self) -> Path | None:
        if (self.root / "train").is_dir() and (self.root / "val").is_dir():
            return self.root
        own = self.root / IMAGENETTE_FOLDERS[self.size]
        if own.is_dir():
            return own
        # A copy of a size of one's own; torchvision's other sizes are not what was asked for.
        others = [
            folder
            for folder in sorted(self.root.glob("imagenette2*"))
            if folder.is_dir() and folder.name not in IMAGENETTE_FOLDERS.values()
        ]
        return others[0] if len(others) == 1 else None

    def _class_name(self, folder: str) -> str:
        if folder not in IMAGENETTE_CLASSES:
            raise UserError(
                f"class folder {folder!r} is none of Imagenette's ({', '.join(IMAGENETTE_CLASSES)}): "
                "use data=folder for other images"
            )
        return IMAGENETTE_CLASSES[folder]


def root_folder(root: str | Path | None) -> Path:
    """`root` as a path with `~` expanded; raises UserError if there is none."""
    if not root:
        raise UserError("data.root is not set: pass the folder that holds the images, or is to hold them")
    return Path(root).expanduser()


def check_limit(limit_per_class: int | None) -> None:
    """Raises UserError for a limit below 1."""
    if limit_per_class is not None and limit_per_class < 1:
        raise UserError(f"data.limit_per_class must be at least 1, or null for all images, not {limit_per_class}")


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    """Path relative to `folder`, and size in bytes, of every image below `folder / name`."""
    for parent, subfolders, names in os.walk(folder / name, followlinks=True):
        subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
        for file in names:
            if file.startswith(".") or not file.lower().endswith(IMAGE_SUFFIXES):
                continue
            path = Path(parent, file)
            relative = path.relative_to(folder).as_posix()
            try:
                yield relative, path.stat().st_size
            except OSError as error:  # a link to nowhere
                raise UserError(f"the image {relative} of {folder} cannot be opened ({error.strerror})") from error


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
