# SPDX-License-Identifier: MIT
"""Class folders: which are used, what they are called, and which output of the network each has."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from salve.data.naming import listing
from salve.data.walk import subfolders
from salve.types import UserError
from salve.untrusted import read_text, reason, shown, some

IMAGENET = "imagenet"
_COLUMNS = ("folder", "output")
_CHOICE = (
    "choose imagenet, a CSV file with the columns folder,output or folder,output,name, or a mapping such as "
    "{n01440764: 0}"
)


def chosen_classes(classes: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Read the setting ``data.classes``.

    Args:
        classes: a list of class folders, or a mapping folder → name for people.

    Returns:
        Folder → its name, or "" if it is given none.

    Raises:
        UserError: it is neither, or has a folder twice.
    """
    if isinstance(classes, str) or not isinstance(classes, Mapping | Sequence):
        raise UserError(f"data.classes={classes} must be a list of class folders, such as [{classes}, …].")
    folders = [str(folder) for folder in classes]
    if twice := [folder for i, folder in enumerate(folders) if folder in folders[:i]]:
        raise UserError(f"data.classes has {listing(twice)} more than once.")
    if not isinstance(classes, Mapping):
        return dict.fromkeys(folders, "")
    return {str(folder): "" if name is None else str(name) for folder, name in classes.items()}


def class_folders(root: Path, folders: list[str], chosen: Mapping[str, str] | None) -> list[str]:
    """Find the class folders; every split must have all of them.

    Args:
        root: the folder that holds the folders of the splits.
        folders: names of the folders of the splits, *train* first.
        chosen: the class folders to use, as :func:`chosen_classes` gives them; None uses all.

    Returns:
        Names of the class folders, in the order of the labels.

    Raises:
        UserError: a split lacks a class folder, or there are fewer than two.
    """
    there = {folder: subfolders(root / folder) for folder in folders}
    train, *others = folders
    if chosen is not None:
        for folder in folders:
            if missing := [name for name in chosen if name not in there[folder]]:
                raise UserError(
                    f"data.classes names {listing(missing)}, but {root / folder} has no such folder; its class folders "
                    f"are {listing(there[folder], 10) or 'none'}."
                )
        classes = list(chosen)
    else:
        for here, other in [pair for name in others for pair in ((train, name), (name, train))]:
            if only_here := [name for name in there[here] if name not in there[other]]:
                raise UserError(
                    f"{root / other} lacks {listing(only_here)}; every class folder of {here} must be in {other} too, "
                    "or data.classes must name the class folders to use."
                )
        classes = there[train]
    if len(classes) < 2:
        source = root / train if chosen is None else "data.classes"
        count = "1 class folder" if len(classes) == 1 else f"{len(classes)} class folders"
        raise UserError(f"{source} has {count}; a classifier needs at least two.")
    return classes


def check_class_names(names: Sequence[str], folders: Sequence[str]) -> None:
    """Check the names of the classes.

    Args:
        names: of the classes, for people.
        folders: the class folder of each.

    Raises:
        UserError: two classes have the same name, or a name is blank or cannot be printed.
    """
    seen: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        if not name.strip() or not name.isprintable():
            raise UserError(
                f"The class folder {folder!r} has the name {name!r}, which cannot be printed; give it another one with "
                "data.classes."
            )
        if name in seen:
            raise UserError(
                f"The class folders {seen[name]!r} and {folder!r} are both named {name!r}; give them different names "
                "with data.classes."
            )
        seen[name] = folder


def map_outputs(
    outputs: str | Mapping[str, int] | None, folders: Sequence[str]
) -> tuple[tuple[int, ...] | None, dict[str, str]]:
    """Read the setting ``data.outputs``.

    Args:
        outputs: "imagenet", the path of a CSV file, a mapping folder → unit, or None. Entries of folders that are not
            used do not matter.
        folders: names of the class folders.

    Returns:
        The output unit of each class folder, or None; and folder → name for people, where ``outputs`` has one.

    Raises:
        UserError: a folder without a unit, two folders with the same unit, a unit that is not a whole number from 0, or
            a file that cannot be read or has other columns.
    """
    if outputs is None:
        return None, {}
    units: Mapping[str, object]
    names: dict[str, str] = {}
    if isinstance(outputs, Mapping):
        units = {str(folder): unit for folder, unit in outputs.items()}
    elif outputs == IMAGENET:
        units, names = _imagenet(folders)
    elif isinstance(outputs, str):
        units, names = _read(Path(outputs).expanduser())
    else:
        raise UserError(f"data.outputs={outputs} does not map class folders to output units; {_CHOICE}.")
    if missing := [folder for folder in folders if folder not in units]:
        hint = (
            "the folders must be named by WordNet id (n01440764) or by name (tench)"
            if outputs == IMAGENET
            else "every class folder needs a unit"
        )
        raise UserError(f"data.outputs has no unit for the class {listing(missing)}; {hint}, or {_CHOICE}.")
    used: dict[int, str] = {}
    for folder in folders:
        unit = _whole(units[folder], folder)
        if unit in used:
            raise UserError(
                f"data.outputs gives unit {unit} to both {used[unit]!r} and {folder!r}; each class needs its own."
            )
        used[unit] = folder
    return tuple(used), {folder: names[folder] for folder in folders if names.get(folder)}


def _whole(unit: object, folder: str) -> int:
    try:
        if isinstance(unit, bool) or (whole := int(str(unit))) < 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"data.outputs gives {shown(repr(unit))} to {folder!r}; a unit is a whole number, counted from 0."
        ) from None
    return whole


def _read(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    try:
        text = read_text(path, "No such file or directory").removeprefix("\ufeff")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (ValueError, csv.Error) as error:
        where = shown(str(path), 300)
        raise UserError(f"data.outputs={where} cannot be read as a CSV file ({reason(error)}); {_CHOICE}.") from error
    if not rows or not set(_COLUMNS) <= rows[0].keys():
        there = some(rows[0], 5) if rows else "nothing"
        raise UserError(
            f"data.outputs={path} must have the columns folder and output in its first row, but has {there}."
        )
    if twice := [str(folder) for folder, count in Counter(row["folder"] for row in rows).items() if count > 1]:
        raise UserError(f"data.outputs={path} has more than one row for {listing(twice)}.")
    return {row["folder"]: row["output"] for row in rows}, {row["folder"]: row.get("name") or "" for row in rows}


def _imagenet(folders: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    wnids, exact, loose, names = _imagenet_classes()
    units = {}
    for folder in folders:
        unit = wnids.get(folder, exact.get(folder, loose.get(_plain(folder))))
        if unit is not None:
            units[folder] = unit
    return units, {folder: names[unit] for folder, unit in units.items() if folder in wnids}


@cache
def _imagenet_classes() -> tuple[dict[str, int], dict[str, int], dict[str, int], tuple[str, ...]]:
    """ImageNet's 1,000 classes: WordNet id → unit, name → unit, simplified name or synonym → unit, and the names.

    A simplified name has neither capitals nor separators.
    """
    # These imports take a second.
    from torchvision.models._meta import _IMAGENET_CATEGORIES as NAMES

    from salve.timm_alone import timm

    info = timm.data.ImageNetInfo()
    wnids = {str(info.index_to_label_name(unit)): unit for unit in range(len(NAMES))}
    exact = {name: unit for unit, name in enumerate(NAMES)}
    # Synonyms: "tench, Tinca tinca". A name that several classes share stands for none of them.
    meant: dict[str, set[int]] = {}
    for unit, name in enumerate(NAMES):
        for synonym in (name, *info.index_to_description(unit, detailed=False).split(", ")):
            meant.setdefault(_plain(synonym), set()).add(unit)
    loose = {name: units.pop() for name, units in meant.items() if len(units) == 1}
    return wnids, exact, loose, tuple(NAMES)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
