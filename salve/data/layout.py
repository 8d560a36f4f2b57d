"""Where class folders lie and what they are called: found out without torch, so that a mistake is named at once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from salve.data.classes import check_class_names, class_folders, map_outputs
from salve.data.splits import split_folders
from salve.types import UserError

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


class Layout(NamedTuple):
    """What the folders say, before any image is looked at.

    Attributes:
        root: the folder that holds those of the splits.
        folders: the name of each split's folder in `root`; one that holds all held-out images stands there twice.
        classes: the names of the C class folders. names: of each class, for people.
        outputs: for each class the output of the network that stands for it; None where output k is class k.
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
    """Look at folders alone.

    Args:
        root: the folder that holds those of the splits. splits: their names, or None for the usual ones.
        chosen: class folder → the name it is given, or "", of those to use; None uses all.
        outputs: see `FolderData`. name_of: the name of a class that is given none.

    Raises:
        UserError: no root, a split without a folder, fewer than two classes, a class that is not in every folder,
            classes of one name, or outputs that do not fit the classes.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder: pass one that holds train/<class>/ and val/<class>/")
    folders = split_folders(root, splits)
    classes = class_folders(root, list(dict.fromkeys(folders.values())), chosen)
    units, named = map_outputs(outputs, classes)
    own_names = [name_of(folder) for folder in classes]
    given = chosen or {}
    names = tuple(given.get(f) or named.get(f) or own for f, own in zip(classes, own_names, strict=True))
    check_class_names(names, classes)
    return Layout(root, folders, classes, names, units)


def find_imagenette(root: Path, size: str, splits: Mapping[str, str] | None) -> Path | None:
    """The folder that holds the splits: `root` itself, the one of this size in it, or the only one of another size."""
    if (root / ("train" if splits is None else splits["train"])).is_dir():
        return root
    own = root / IMAGENETTE_FOLDERS[size]
    if own.is_dir():
        return own
    # A copy of a size of one's own; torchvision's other sizes are not what was asked for.
    others = [
        folder
        for folder in sorted(root.glob("imagenette2*"))
        if folder.is_dir() and folder.name not in IMAGENETTE_FOLDERS.values()
    ]
    return others[0] if len(others) == 1 else None


def no_imagenette(root: Path, size: str) -> UserError:
    """What is said where there is none."""
    return UserError(
        f"no Imagenette ({size}) in data.root={root}: pass data.download=true to fetch it, or as data.root a folder "
        f"that holds train/ and val/, or one that holds {IMAGENETTE_FOLDERS[size]}/"
    )


def imagenette_name(folder: str) -> str:
    """The name of a class folder.

    Raises:
        UserError: it is none of Imagenette's.
    """
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
