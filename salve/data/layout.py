# SPDX-License-Identifier: MIT
"""Where class folders lie and what they are called. Imports no torch, so that mistakes are reported at once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from salve.data.classes import check_class_names, class_folders, map_outputs
from salve.data.splits import split_folders
from salve.types import UserError

IMAGENETTE_FOLDERS: dict[str, str] = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}

#: WordNet id → name of Imagenette's ten classes.
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


class Layout(NamedTuple):
    """The folders of a data set.

    Attributes:
        root: the folder that holds the folders of the splits.
        folders: the name of each split's folder in ``root``; *select* and *test* have the same one if it is divided.
        classes: names of the C class folders. names: of the classes, for people.
        outputs: the output of the network for each class; None if output k is class k.
    """

    root: Path
    folders: dict[str, str]
    classes: list[str]
    names: tuple[str, ...]
    outputs: tuple[int, ...] | None


def read_layout(
    root: Path,
    splits: Mapping[str, str] | None = None,
    chosen: Mapping[str, str] | None = None,
    outputs: str | Mapping[str, int] | None = None,
    name_of: Callable[[str], str] = str,
) -> Layout:
    """Find the folders of splits and classes, without looking at images.

    Args:
        root: the folder that holds the folders of the splits. splits: their names, or None for the usual ones.
        chosen: class folder → its name for people, or "", of the classes to use; None uses all.
        outputs: see :class:`FolderData`. name_of: from a class folder to the name of a class that is given none.

    Raises:
        UserError: no root, a split without a folder, fewer than two classes, a class that is missing in a split, two
            classes of the same name, or outputs that do not fit the classes.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder; choose one that holds train/<class>/ and val/<class>/.")
    folders = split_folders(root, splits)
    classes = class_folders(root, list(dict.fromkeys(folders.values())), chosen)
    units, named = map_outputs(outputs, classes)
    own_names = [name_of(folder) for folder in classes]
    given = chosen or {}
    names = tuple(given.get(f) or named.get(f) or own for f, own in zip(classes, own_names, strict=True))
    check_class_names(names, classes)
    return Layout(root, folders, classes, names, units)


def find_imagenette(root: Path, size: str, splits: Mapping[str, str] | None) -> Path | None:
    """The folder that holds the splits, or None: ``root``, Imagenette of this size in it, or the only one in it."""
    if (root / ("train" if splits is None else splits["train"])).is_dir():
        return root
    own = root / IMAGENETTE_FOLDERS[size]
    if own.is_dir():
        return own
    # Perhaps a copy in a size of the user's own; torchvision's other sizes are not what was asked for.
    others = [
        folder
        for folder in sorted(root.glob("imagenette2*"))
        if folder.is_dir() and folder.name not in IMAGENETTE_FOLDERS.values()
    ]
    return others[0] if len(others) == 1 else None


def no_imagenette(root: Path, size: str) -> UserError:
    """The error for a missing Imagenette."""
    return UserError(
        f"data.root={root} holds no Imagenette ({size}); set data.download=true to fetch it, or set data.root to a "
        f"folder that holds train/ and val/, or {IMAGENETTE_FOLDERS[size]}/."
    )


def imagenette_name(folder: str) -> str:
    """The name of a class folder's class.

    Raises:
        UserError: it is not a class of Imagenette.
    """
    if folder not in IMAGENETTE_CLASSES:
        raise UserError(
            f"The class folder {folder!r} is not one of Imagenette's ({', '.join(IMAGENETTE_CLASSES)}); use "
            "data=folder for other images."
        )
    return IMAGENETTE_CLASSES[folder]


def root_folder(root: str | Path | None) -> Path:
    """``root`` as a path, with ``~`` expanded.

    Raises:
        UserError: it is empty.
    """
    if not root:
        raise UserError("data.root is not set; give the folder that holds the images, or into which to download them.")
    return Path(root).expanduser()
