"""Which folders are the classes, what they are called, and which output of a network stands for each."""

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
    "choose from imagenet, a CSV file with the columns folder,output or folder,output,name, or a mapping such as "
    "{n01440764: 0}"
)


def chosen_classes(classes: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Folder → the name it is given, or "", of a setting that lists or names class folders.

    Raises:
        UserError: a folder twice, or no list.
    """
    if isinstance(classes, str) or not isinstance(classes, Mapping | Sequence):
        raise UserError(f"data.classes={classes} must be a list of class folders, such as [{classes}, …]")
    folders = [str(folder) for folder in classes]
    if twice := [folder for i, folder in enumerate(folders) if folder in folders[:i]]:
        raise UserError(f"data.classes has {listing(twice)} more than once")
    if not isinstance(classes, Mapping):
        return dict.fromkeys(folders, "")
    return {str(folder): "" if name is None else str(name) for folder, name in classes.items()}


def class_folders(root: Path, folders: list[str], chosen: Mapping[str, str] | None) -> list[str]:
    """Names of the class folders, which are the same in every folder of a split; or the chosen ones, which all have.

    Raises:
        UserError: a class that is not in all of them, or fewer than two.
    """
    there = {folder: subfolders(root / folder) for folder in folders}
    train, *others = folders
    if chosen is not None:
        for folder in folders:
            if missing := [name for name in chosen if name not in there[folder]]:
                raise UserError(
                    f"data.classes names {listing(missing)}, which {root / folder} has not: "
                    f"its class folders are {listing(there[folder], 10) or 'none'}"
                )
        classes = list(chosen)
    else:
        for here, other in [pair for name in others for pair in ((train, name), (name, train))]:
            if only_here := [name for name in there[here] if name not in there[other]]:
                raise UserError(
                    f"{root / other} lacks {listing(only_here)}: every class folder of {here} must be in {other} too, "
                    "or data.classes must name those to use"
                )
        classes = there[train]
    if len(classes) < 2:
        source = root / train if chosen is None else "data.classes"
        raise UserError(f"{source} has {len(classes)} class folders: a classifier needs at least two")
    return classes


def check_class_names(names: Sequence[str], folders: Sequence[str]) -> None:
    """Raises UserError if two classes have one name, or a name is empty or holds what cannot be printed."""
    seen: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        if not name.strip() or not name.isprintable():
            raise UserError(f"the class folder {folder!r} has the name {name!r}, which cannot be printed: name it anew")
        if name in seen:
            raise UserError(f"the class folders {seen[name]!r} and {folder!r} are both named {name!r}: name them apart")
        seen[name] = folder


def map_outputs(
    outputs: str | Mapping[str, int] | None, folders: Sequence[str]
) -> tuple[tuple[int, ...] | None, dict[str, str]]:
    """The output unit of every class folder, and a readable name of those that `outputs` has one for.

    Args:
        outputs: "imagenet"; the path of a CSV file; folder → unit; or None. Entries of other folders do not matter.
        folders: names of the class folders.

    Raises:
        UserError: a folder without a unit, two folders with one unit, a unit that is no whole number from 0 on, or
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
        raise UserError(f"data.outputs={outputs} says of no folder which output it is: {_CHOICE}")
    if missing := [folder for folder in folders if folder not in units]:
        hint = (
            "the folders must be named by WordNet id (n01440764) or by name (tench)"
            if outputs == IMAGENET
            else "every class folder needs a unit"
        )
        raise UserError(f"data.outputs has no unit for the class {listing(missing)}: {hint}, or {_CHOICE}")
    used: dict[int, str] = {}
    for folder in folders:
        unit = _whole(units[folder], folder)
        if unit in used:
            raise UserError(f"data.outputs has unit {unit} for both {used[unit]!r} and {folder!r}: a unit is one class")
        used[unit] = folder
    return tuple(used), {folder: names[folder] for folder in folders if names.get(folder)}


def _whole(unit: object, folder: str) -> int:
    try:
        if isinstance(unit, bool) or (whole := int(str(unit))) < 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"data.outputs has {shown(repr(unit))} for {folder!r}: an output is a whole number, counted from 0"
        ) from None
    return whole


def _read(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    try:
        text = read_text(path, "No such file or directory").removeprefix("\ufeff")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (ValueError, csv.Error) as error:
        where = shown(str(path), 300)
        raise UserError(f"data.outputs={where} cannot be read as a CSV file ({reason(error)}): {_CHOICE}") from error
    if not rows or not set(_COLUMNS) <= rows[0].keys():
        there = some(rows[0], 5) if rows else "nothing"
        raise UserError(f"data.outputs={path} needs a row of headings with folder and output, but has {there}")
    if twice := [str(folder) for folder, count in Counter(row["folder"] for row in rows).items() if count > 1]:
        raise UserError(f"data.outputs={path} has more than one row for {listing(twice)}")
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
    """Of ImageNet's 1,000 classes: wnid → unit, name → unit, name without case and separators → unit; and the names."""
    # Only who asks for them waits the second that these take.
    from torchvision.models._meta import _IMAGENET_CATEGORIES as NAMES

    from salve.timm_alone import timm

    info = timm.data.ImageNetInfo()
    wnids = {str(info.index_to_label_name(unit)): unit for unit in range(len(NAMES))}
    exact = {name: unit for unit, name in enumerate(NAMES)}
    # Synonyms: "tench, Tinca tinca". A name that several classes have is none of them.
    meant: dict[str, set[int]] = {}
    for unit, name in enumerate(NAMES):
        for synonym in (name, *info.index_to_description(unit, detailed=False).split(", ")):
            meant.setdefault(_plain(synonym), set()).add(unit)
    loose = {name: units.pop() for name, units in meant.items() if len(units) == 1}
    return wnids, exact, loose, tuple(NAMES)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
