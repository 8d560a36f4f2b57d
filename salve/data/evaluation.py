# SPDX-License-Identifier: MIT
"""Evaluation sets: images on which the original and every edited network are measured, besides what stages need."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from salve.data.base import ImageData, RawImages, check_split
from salve.data.corruptions import KINDS, SEVERITIES, corrupted
from salve.data.digests import file_digests
from salve.data.files import FileData, FileImages, ImageFile, refuse_empty
from salve.data.groups import ABSENT_PRESENT, Groups
from salve.data.marked import MarkedData
from salve.data.naming import listing, nearest
from salve.data.transforms import RawImage
from salve.data.walk import find_images, subfolders
from salve.types import Labels, Split, UserError

PAIRS = "pairs"
#: Names of sets of the run's own images, which no other set may have.
RESERVED = (*get_args(Split), PAIRS)
#: What stands before a setting of the run's data, such as ``data.root=``.
_OF_DATA = re.compile(r"(?<![\w./=])data\.(?=\w+=)")
#: Seed of corruptions: the same for all runs, so that their numbers can be compared.
CORRUPTION_SEED = 0


@dataclass(frozen=True)
class EvaluationSet:
    """Images with the run's classes, by which the run decides nothing.

    Attributes:
        name: what tables call it.
        raw: the decoded images with their labels. labels: ``[N]``, indices into the run's classes.
        groups: an attribute of the images; None if none is known.
        digest: gives the hex SHA-256 of images, labels and groups.
        paired: whether image ``i`` and image ``i + N/2`` are one without a shortcut and with it.
        remark: a caution about these images; "" for none.
    """

    name: str
    raw: RawImages
    labels: Labels
    groups: Groups | None
    digest: Callable[[], str]
    paired: bool = False
    remark: str = ""


def evaluation_sets(
    entries: Sequence[str | Mapping[str, Any]], data: ImageData, source: Callable[[Mapping[str, Any]], ImageData]
) -> tuple[EvaluationSet, ...]:
    """Make the sets that the setting ``evaluate`` names. Opens no image.

    Args:
        entries: each a split of the data, such as ``test``; ``pairs``, the test images without and with the shortcut
            of the data; a corruption of the test images, such as ``fog-3``; the path of a folder with a folder for each
            class; or a mapping with ``data``, the name of a data source, its settings, and if wanted
            ``take``, the split whose images are taken ("test"), and ``name``. A folder or source may lack classes.
        data: of the run. source: makes a data source from the mapping's other entries.

    Raises:
        UserError: an entry is none of these, is there twice, or has no class of the run; or corruptions are not
            installed.
    """
    sets = [
        _of_mapping(entry, data, source) if isinstance(entry, Mapping) else _of_text(str(entry), data)
        for entry in entries
    ]
    names = [one.name for one in sets]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(
            f"evaluate has two sets called {listing(twice)}; give one of them a name of its own: "
            "{data: folder, root: …, name: …}."
        )
    return tuple(sets)


def _of_text(entry: str, data: ImageData) -> EvaluationSet:
    if entry in get_args(Split):
        return _of_split(entry, data, entry)  # type: ignore[arg-type]
    if entry == PAIRS:
        return _pairs(data)
    folder = Path(entry).expanduser()
    if folder.is_dir():
        return _of_folder(folder, data)
    kind, _, severity = entry.rpartition("-")
    if kind in KINDS and severity.isdigit() and int(severity) in SEVERITIES:
        raw = corrupted(data.raw("test"), kind, int(severity), CORRUPTION_SEED)
        labels, groups = torch.as_tensor(data.labels("test")), data.groups("test")
        what = ["corrupted", kind, int(severity), CORRUPTION_SEED]
        return EvaluationSet(entry, raw, labels, groups, partial(_digest, data, what, groups))
    if kind in KINDS:
        raise UserError(
            f"evaluate has {entry!r}; the severities of {kind} are 1 (mild) to 5 (harsh), such as {kind}-3."
        )
    if re.fullmatch(r"[a-z_]+-\d+", entry):
        raise UserError(
            f"evaluate has {entry!r}, which is neither a folder nor a corruption: it names {kind!r}, "
            f"{nearest(kind, KINDS)}."
        )
    raise UserError(
        f"evaluate has {entry!r}, which is no folder; choose a folder with a folder for each class, test, pairs, a "
        "corruption such as fog-3, or a mapping such as {data: folder, root: …}."
    )


def _of_split(name: str, data: ImageData, split: Split) -> EvaluationSet:
    groups = data.groups(split)
    digest = partial(_digest, data, ["split", split], groups)
    return EvaluationSet(name, data.raw(split), torch.as_tensor(data.labels(split)), groups, digest)


def _pairs(data: ImageData) -> EvaluationSet:
    pairs = data.pairs("test")
    if pairs is None:
        raise UserError(
            f"evaluate has pairs, but the {data.name} data cannot show an image with and without a shortcut; put "
            "a mark on them (mark=text), or use the drawn scenes (data=concepts)."
        )
    labels = torch.as_tensor(data.labels("test"))
    shown = torch.arange(2).repeat_interleave(len(labels))
    groups = Groups(pairs.name, ABSENT_PRESENT, shown)
    digest = partial(_digest, data, [PAIRS, pairs.name], groups)
    return EvaluationSet(
        PAIRS, _Joined((pairs.without, pairs.with_mark)), labels.repeat(2), groups, digest, paired=True
    )


class _Joined:
    """Two sources of images, one behind the other."""

    def __init__(self, sources: tuple[RawImages, RawImages]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        first = len(self.sources[0])
        return self.sources[index >= first][index % first]


def _of_folder(folder: Path, data: ImageData) -> EvaluationSet:
    """Images in class folders, which are named like the classes of the run or like their folders."""
    there = set(subfolders(folder))
    values = getattr(_unmarked(data), "class_values", data.classes)
    own = [next((name for name in names if name in there), None) for names in zip(values, data.classes, strict=True)]
    labels = {name: label for label, name in enumerate(own) if name is not None}
    if not labels:
        raise UserError(
            f"evaluate names the folder {folder}, which has a folder for none of the classes {listing(data.classes)}; "
            f"its folders are {listing(sorted(there), 10) or 'none'}."
        )
    found = find_images(folder, list(labels))
    images = dict(zip(labels.values(), found.images, strict=True))
    files = tuple(ImageFile(path, label) for label, paths in images.items() for path in paths)
    if not files:
        raise UserError(f"evaluate names the folder {folder}, which has no image of {listing(list(labels))}.")
    refuse_empty(folder, list(files))
    source = _unmarked(data)
    white = source.white if isinstance(source, FileData) else None

    def digest() -> str:
        digests = file_digests(folder, [file.path for file in files])
        rows = [[file.path, file.label, own] for file, own in zip(files, digests, strict=True)]
        return hashlib.sha256(json.dumps([white, rows]).encode()).hexdigest()

    raw, name = FileImages(folder.parent, folder.name, files, white), os.path.basename(folder.resolve())
    if name in RESERVED:
        name = f"{folder.resolve().parent.name}-{name}"
    numbers = torch.tensor([file.label for file in files])
    idle = [one for one in sorted(there) if one not in labels]
    return EvaluationSet(name, raw, numbers, None, digest, remark=_lacking(name, numbers, data.classes, idle))


def _lacking(name: str, labels: Labels, classes: Sequence[str], idle: Sequence[str] = ()) -> str:
    """A caution that classes have no image in a set; ``idle`` are folders in which they may be after all."""
    present = set(labels.tolist())
    if not (lacking := [one for number, one in enumerate(classes) if number not in present]):
        return ""
    unread = f"; its folders {listing(idle)} are named like no class and were not read" if idle else ""
    return f"The evaluation set {name} has no image of {listing(lacking)}, of which it says nothing{unread}."


def _unmarked(data: ImageData) -> ImageData:
    """The source below a mark."""
    return data.data if isinstance(data, MarkedData) else data


def _of_mapping(
    entry: Mapping[str, Any], data: ImageData, source: Callable[[Mapping[str, Any]], ImageData]
) -> EvaluationSet:
    settings = {str(name): value for name, value in entry.items()}
    split, name = settings.pop("take", "test"), str(settings.pop("name", "") or settings.get("data"))
    if name in RESERVED:
        raise UserError(f"evaluate has a set called {name}, the name of images of the run's own data; give it another.")
    try:
        check_split(split)
        other = source(settings)
    except UserError as error:
        # Of its own settings, which the message names as those of the run's data.
        raise UserError(f"The evaluation set {name}: {_OF_DATA.sub('', str(error))}") from error
    if not set(data.classes) & set(other.classes):
        raise UserError(
            f"The evaluation set {name} has none of the classes {listing(data.classes)}; its classes are "
            f"{listing(other.classes, 10)}."
        )
    number = torch.tensor([data.classes.index(c) if c in data.classes else -1 for c in other.classes])
    labels, groups = number[torch.as_tensor(other.labels(split))], other.groups(split)
    kept = (labels >= 0).nonzero()[:, 0]
    mine = None if groups is None else Groups(groups.name, groups.values, groups.of_image[kept])
    digest = partial(_digest, other, ["take", split, labels.tolist()], mine)
    labels = labels[kept]
    raw = _Some(other.raw(split), kept.tolist(), labels.tolist())
    return EvaluationSet(name, raw, labels, mine, digest, remark=_lacking(name, labels, data.classes))


class _Some:
    """Some of the images of a source, with the run's labels, which may not be the source's."""

    def __init__(self, raw: RawImages, indices: list[int], labels: list[int]) -> None:
        self.raw, self.indices, self.labels = raw, indices, labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        return self.raw[self.indices[index]][0], self.labels[index]


def _digest(data: ImageData, what: list[Any], groups: Groups | None) -> str:
    attribute = None if groups is None else [groups.name, groups.values, groups.of_image.tolist()]
    return hashlib.sha256(json.dumps([data.fingerprint(), what, attribute]).encode()).hexdigest()
