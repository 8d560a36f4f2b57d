# SPDX-License-Identifier: MIT
"""Find the images below class folders, among links, odd names and locked folders."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from salve.types import UserError

#: Formats that Pillow decodes itself. HEIF and, in some builds, AVIF need a plugin.
FORMATS = {
    *("AVIF", "BMP", "DIB", "FITS", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
}

_NOT_COUNTED = ("thumbs.db", "desktop.ini")  # Windows leaves them behind

Inode = tuple[int, int]


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that the installed Pillow reads, in lower case, with their dot."""
    registered = Image.registered_extensions()  # loads the plugins
    readable = FORMATS & (set(Image.OPEN) | {"MPO"})  # JPEG's plugin opens MPO
    return frozenset(suffix for suffix, kind in registered.items() if kind in readable)


@dataclass
class Found:
    """What lies in the class folders of a split.

    Attributes:
        images: for each class, the sorted paths of its images, relative to the split's folder, in POSIX form.
        left_out: suffix ("" for none) → number of files that are no images; hidden ones are not counted.
        not_followed: links and folders, relative like the images, to folders that are read anyway.
    """

    images: list[list[str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    not_followed: list[str] = field(default_factory=list)


def subfolders(folder: Path, hidden: bool = False) -> list[str]:
    """Sorted names of the folders in a folder.

    Args:
        folder: where to look.
        hidden: list only hidden folders (with a leading dot); otherwise only the others.

    Raises:
        UserError: the folder cannot be read, or a name is not UTF-8.
    """
    return [name for name, is_folder in _entries(folder) if is_folder and name.startswith(".") == hidden]


def find_images(folder: Path, classes: Sequence[str]) -> Found:
    """Find every image in or below ``folder / name``, for each class ``name``.

    A file is an image by its suffix or, if it has none, by its first bytes. Hidden files and folders are skipped. Links
    are followed, but each real folder is read once; links to folders in or above ``folder`` are skipped.

    Raises:
        UserError: a folder cannot be read, a name is not UTF-8, or two classes are the same folder.
    """
    found, claimed = Found(), dict[Inode, str]()
    root = Path(os.path.realpath(folder))
    for name in classes:
        own = _inode(folder / name)
        if own in claimed:
            raise UserError(f"{folder / claimed[own]} and {folder / name} are one folder; each class needs its own.")
        if root.is_relative_to(os.path.realpath(folder / name)):
            raise UserError(f"The class folder {folder / name} is a link to a folder that holds it; remove the link.")
        claimed[own] = name
    for name in classes:
        images = []
        for path in _files(folder, name, root, claimed, found.not_followed):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in image_suffixes() or (not suffix and _begins_as_image(folder / path)):
                images.append(path)
            elif os.path.basename(path).lower() not in _NOT_COUNTED:
                found.left_out[suffix] += 1
        found.images.append(sorted(images))
    return found


def loose_images(folder: Path) -> int:
    """The number of images in the folder itself, which belong to no class."""
    return sum(
        not is_folder and not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()
        for name, is_folder in _entries(folder)
    )


def _files(folder: Path, below: str, root: Path, claimed: dict[Inode, str], not_followed: list[str]) -> Iterator[str]:
    """Paths of the files in or below ``folder / below`` that are not hidden, relative to ``folder``.

    Args:
        folder: the split's folder. below: a folder in it. root: the real path of ``folder``.
        claimed: folders that are read already; extended here. not_followed: what is skipped; extended here.
    """
    for name, is_folder in _entries(folder / below):
        path = f"{below}/{name}"
        if name.startswith("."):
            continue
        if not is_folder:
            yield path
            continue
        inode = _inode(folder / path)
        is_link = os.path.islink(folder / path)
        if inode in claimed or (is_link and _overlap(root, Path(os.path.realpath(folder / path)))):
            not_followed.append(path)
            continue
        claimed[inode] = path
        yield from _files(folder, path, root, claimed, not_followed)


def _overlap(root: Path, target: Path) -> bool:
    """Whether one of two real folders holds the other."""
    return root.is_relative_to(target) or target.is_relative_to(root)


def _inode(path: Path) -> Inode:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"The folder {path} cannot be read ({error.strerror}).") from error
    return stat.st_dev, stat.st_ino


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """The names in a folder, sorted, and whether each is a folder."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}).") from error
    for name, _ in found:
        try:
            name.encode()
        except UnicodeEncodeError:  # Python represents bytes that are not UTF-8 by surrogates
            shown = os.fsencode(name).decode(errors="backslashreplace")
            raise UserError(f"The name '{shown}' in {folder} is not UTF-8; rename it.") from None
    return found


def _begins_as_image(path: Path) -> bool:
    try:
        if not path.is_file():  # reading a pipe may wait for ever, and a device has no end
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked when it is read
            with Image.open(path) as image:
                return image.format in FORMATS
    except Image.DecompressionBombError:
        return True
    except Exception:  # the file may be anything, and Pillow may fail in any way
        return False
