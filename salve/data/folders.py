"""Images in class folders: one's own, and Imagenette."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torchvision
from PIL import Image

from salve.data.base import ImageData, check_split
from salve.data.download import fetch
from salve.data.splits import check_share, divide
from salve.data.transforms import RawImage, to_rgb
from salve.types import Labels, Split, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

ImagenetteSize = Literal["full", "320px", "160px"]

IMAGENETTE_FOLDERS: dict[str, str] = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}

HELD_OUT = ("select", "val", "test")
LAYOUTS: dict[tuple[str, ...], dict[str, str]] = {
    ("select", "test"): {"select": "select", "test": "test"},
    ("val", "test"): {"select": "val", "test": "test"},
    ("val",): {"select": "val", "test": "val"},
    ("test",): {"select": "test", "test": "test"},
}
"""Which of `HELD_OUT` lie beside `train` → the folder of each held-out split; one for both is divided."""

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
    """One image: its path relative to the folder of its split, in POSIX form, its size in bytes, its label."""

    path: str
    size: int
    label: int


class FileImages:
    """Decoded images of a split, with labels, in the order of the files, which lie in `root / folder`."""

    def __init__(self, root: Path, folder: str, files: tuple[ImageFile, ...]) -> None:
        self.root = root
        self.folder = folder
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
            with Image.open(self.root / self.folder / file.path) as image:
                image.load()  # Pillow decodes when asked to, and a damaged file must be found out here
                return to_rgb(image), file.label
        # A damaged file makes Pillow's decoders raise almost anything: OSError, SyntaxError, ValueError, struct.error.
        except Exception as error:
            name = f"{self.folder}/{file.path}"
            reason = " ".join(str(error).replace(str(self.root) + os.sep, "").split())
            raise UnreadableImage(f"the image {name} cannot be read ({reason}): replace or remove it") from error


class FolderData(ImageData):
    """Any images in class folders: `root/train/<class>/…`, and the held-out ones in another folder or two.

    Without `splits` these are looked for beside `train`: `select` and `test`; `val`, which selects, and `test`; `val`
    alone; or `test` alone. Where one folder holds all held-out images, a share of each class selects and the rest
    tests.

    Classes are the folders' names in sorted order, images are sorted by path, hidden files and files without an
    image's suffix are ignored. The disk is read when something is first asked for, not by the constructor.

    Args:
        root: the folder that holds the folders of the splits.
        batch_size, num_workers: see `ImageData`.
        limit_per_class: use only the first so many images of each class in each split; None uses all.
        splits: the name of each split's folder, such as `{"train": "training", "test": "validation"}`. "train" and at
            least one of "select" and "test" must be in it; one folder for both, or for one of them only, is divided.
            None looks for the usual names.
        select_share: the share of each class that selects, in (0, 1), where one folder is divided.
        split_seed: of that division.

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
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_limit(limit_per_class)
        check_share(select_share, split_seed)
        self.root = root_folder(root)
        self.limit_per_class = limit_per_class
        self.splits = None if splits is None else _named_splits(splits)
        self.select_share = select_share
        self.split_seed = split_seed

    @property
    def classes(self) -> tuple[str, ...]:
        return self._index.classes

    def raw(self, split: Split) -> FileImages:
        files = self._files(split)
        return FileImages(self._index.root, self._index.folders[split], files)

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
            UserError: no root, a split without a folder, fewer than two classes, a class that is empty or not in every
                folder, too few images to divide, or an empty file.
        """
        _ = self._index

    def _folder(self) -> Path:
        """The folder that holds those of the splits."""
        return self.root

    def _class_name(self, folder: str) -> str:
        return folder

    def _files(self, split: Split) -> tuple[ImageFile, ...]:
        check_split(split)
        return self._index.files[split]

    @cached_property
    def _index(self) -> "_Index":
        root = self._folder()
        if not root.is_dir():
            raise UserError(f"data.root={root} is no folder: pass one that holds train/<class>/ and val/<class>/")
        folders = self._split_folders(root)
        classes = self._class_folders(root, list(dict.fromkeys(folders.values())))
        names = tuple(map(self._class_name, classes))
        found = {folder: self._scan(root / folder, classes) for folder in dict.fromkeys(folders.values())}
        files = {split: found[folder] for split, folder in folders.items()}
        if folders["select"] == folders["test"]:
            held_out = found[folders["test"]]
            labels = np.asarray([file.label for file in held_out])
            try:
                select, test = divide(labels, names, self.select_share, self.split_seed)
            except UserError as error:
                raise UserError(f"{root / folders['test']}: {error}") from error
            files["select"], files["test"] = ([held_out[i] for i in part] for part in (select, test))
        return _Index(root, folders, names, {split: self._limited(own, len(names)) for split, own in files.items()})

    def _split_folders(self, root: Path) -> dict[str, str]:
        """The name of each split's folder."""
        there = _subfolders(root)
        if self.splits is not None:
            for split, folder in self.splits.items():
                if not (root / folder).is_dir():
                    raise UserError(
                        f"data.splits names {folder!r} for {split}, which is no folder of {root}: {_choice(there)}"
                    )
            return self._apart(root, self.splits)
        held_out = tuple(name for name in HELD_OUT if name in there)
        if "train" not in there or held_out not in LAYOUTS:
            wrong = (
                "no folder 'train'" if "train" not in there else f"{_listing(list(held_out)) or 'no val'} beside train"
            )
            raise UserError(
                f"{root} has {wrong}: it must hold train/<class>/ with val/ or test/, val/ and test/, or select/ and "
                f"test/ beside it, or data.splits={{train: …, test: …}} must name the folders; {_choice(there)}"
            )
        return self._apart(root, {"train": "train"} | LAYOUTS[held_out])

    def _apart(self, root: Path, folders: dict[str, str]) -> dict[str, str]:
        """The same folders, by one name each; refused where what fits would report, be it through a link."""
        train, select, test = (root / folders[split] for split in get_args(Split))
        for held_out in (select, test):
            if train.samefile(held_out):
                raise UserError(f"{train} and {held_out} are one folder: what fits must not select or test")
        return folders | ({"select": folders["test"]} if select.samefile(test) else {})

    def _class_folders(self, root: Path, folders: list[str]) -> list[str]:
        """Names of the class folders, which are the same in every folder of a split."""
        names = {folder: _subfolders(root / folder) for folder in folders}
        train, *others = folders
        for here, there in [pair for other in others for pair in ((train, other), (other, train))]:
            only_here = [name for name in names[here] if name not in names[there]]
            if only_here:
                raise UserError(
                    f"{root / there} lacks {_listing(only_here)}: every class folder of {here} must be in {there} too"
                )
        if len(names[train]) < 2:
            raise UserError(f"{root / train} has {len(names[train])} class folders: a classifier needs at least two")
        return names[train]

    def _scan(self, folder: Path, classes: list[str]) -> list[ImageFile]:
        files: list[ImageFile] = []
        for label, name in enumerate(classes):
            found = sorted(_image_files(folder, name))
            if not found:
                raise UserError(f"class {name!r} has no image in {folder / name} ({', '.join(IMAGE_SUFFIXES)})")
            files += [ImageFile(path, size, label) for path, size in found]
        empty = [file.path for file in files if file.size == 0]
        if empty:
            raise UserError(f"empty image files (0 bytes) in {folder}: {_listing(empty)}; replace or remove them")
        return files

    def _limited(self, files: list[ImageFile], classes: int) -> tuple[ImageFile, ...]:
        if self.limit_per_class is None:
            return tuple(files)
        own = ([file for file in files if file.label == label] for label in range(classes))
        return tuple(file for images in own for file in images[: self.limit_per_class])


@dataclass(frozen=True)
class _Index:
    """What the disk holds: for each split the name of its folder in `root`, and its files."""

    root: Path
    folders: dict[str, str]
    classes: tuple[str, ...]
    files: dict[str, tuple[ImageFile, ...]]


class ImagenetteData(FolderData):
    """Imagenette: ten easily told-apart ImageNet classes, by Jeremy Howard (fast.ai).

    Args:
        root: where torchvision keeps or puts its `imagenette2*` folders; or a folder that holds exactly one such folder
            of another size; or a folder that holds the folders of the splits itself.
        size: "full", "320px" (shorter side) or "160px".
        download: fetch it into `root` through torchvision if it is not there.
        batch_size, num_workers, limit_per_class, splits, select_share, split_seed: see `FolderData`. As published it
            has `train` and `val`, of which val is divided.

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
        splits: Mapping[str, str] | None = None,
        select_share: float = 0.5,
        split_seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, num_workers, limit_per_class, splits, select_share, split_seed)
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
        if (self.root / ("train" if self.splits is None else self.splits["train"])).is_dir():
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


def _named_splits(splits: Mapping[str, str]) -> dict[str, str]:
    """The folder of each of the three splits; raises UserError where they are not named well."""
    wrong = [name for name in splits if name not in get_args(Split)]
    held_out = [splits[name] for name in ("select", "test") if splits.get(name)]
    if wrong or not splits.get("train") or not held_out:
        raise UserError(
            f"data.splits={dict(splits)} must name a folder for train and for select, test or both, "
            "such as {train: training, test: validation}"
        )
    return {"train": splits["train"], "select": held_out[0], "test": held_out[-1]}


def _choice(folders: list[str]) -> str:
    return f"the folders there are {_listing(folders, 10)}" if folders else "it holds no folders"


def _listing(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
