"""Finding the images below class folders, on disks as people have them: with links, odd names and locked folders."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from salve.types import UserError

FORMATS = {
    *("AVIF", "BMP", "DIB", "FITS", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
}
"""Pictures that Pillow decodes by itself. HEIF and, in some builds, AVIF need a plugin that registers itself."""

_NO_IMAGE_ANYWAY = ("thumbs.db", "desktop.ini")  # what systems leave behind; names with a leading dot are hidden

Inode = tuple[int, int]


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, with their dot, of the formats that this Pillow reads."""
    registered = Image.registered_extensions()  # loads the plugins
    readable = FORMATS & (set(Image.OPEN) | {"MPO"})  # JPEG's plugin opens MPO
    return frozenset(suffix for suffix, kind in registered.items() if kind in readable)


@dataclass
class Found:
    """What lies below the class folders of a split's folder.

    Attributes:
        images: for each class, the path of every image relative to the split's folder, in POSIX form, sorted.
        left_out: how many other files each suffix has ("" for none); hidden files are not counted.
        not_followed: links and folders, relative like the images, that lead to what is read elsewhere.
    """

    images: list[list[str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    not_followed: list[str] = field(default_factory=list)


def subfolders(folder: Path, hidden: bool = False) -> list[str]:
    """Sorted names of the folders in a folder: of those that are hidden (with a leading dot), or of the others.

    Raises:
        UserError: the folder cannot be read, or a name is not UTF-8.
    """
    return [name for name, is_folder in _entries(folder) if is_folder and name.startswith(".") == hidden]


def find_images(folder: Path, classes: Sequence[str]) -> Found:
    """Every image in or below `folder / name`, for each class.

    A file is an image by its suffix; one without a suffix, by its first bytes. Hidden files and folders are passed
    over. Links are followed, but every real folder is read once: a link to a folder in `folder`, or to one that holds
    it, adds nothing.

    Raises:
        UserError: a folder that cannot be read, a name that is not UTF-8, or one folder that is two classes.
    """
    found, claimed = Found(), dict[Inode, str]()
    root = Path(os.path.realpath(folder))
    for name in classes:
        own = _inode(folder / name)
        if own in claimed:
            raise UserError(f"{folder / claimed[own]} and {folder / name} are one folder: a class needs its own")
        if root.is_relative_to(os.path.realpath(folder / name)):
            raise UserError(f"the class folder {folder / name} leads back to a folder that holds it: remove the link")
        claimed[own] = name
    for name in classes:
        images = []
        for path in _files(folder, name, root, claimed, found.not_followed):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in image_suffixes() or (not suffix and _begins_as_image(folder / path)):
                images.append(path)
            elif os.path.basename(path).lower() not in _NO_IMAGE_ANYWAY:
                found.left_out[suffix] += 1
        found.images.append(sorted(images))
    return found


def loose_images(folder: Path) -> int:
    """How many images lie in the folder itself, where no class has them."""
    return sum(
        not is_folder and not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()
        for name, is_folder in _entries(folder)
    )


def _files(folder: Path, below: str, root: Path, claimed: dict[Inode, str], not_followed: list[str]) -> Iterator[str]:
    """Every file in or below `folder / below` that is not hidden, relative to `folder`, whose real path is `root`."""
    for name, is_folder in _entries(folder / below):
        path = f"{below}/{name}"
        if name.startswith("."):
            continue
        if not is_folder:
            yield path
            continue
        inode = _inode(folder / path)
        if inode in claimed or (os.path.islink(folder / path) and _shares(root, Path(os.path.realpath(folder / path)))):
            not_followed.append(path)
            continue
        claimed[inode] = path
        yield from _files(folder, path, root, claimed, not_followed)


def _shares(root: Path, target: Path) -> bool:
    """Whether one of two real folders holds the other."""
    return root.is_relative_to(target) or target.is_relative_to(root)


def _inode(path: Path) -> Inode:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"the folder {path} cannot be read ({error.strerror})") from error
    return stat.st_dev, stat.st_ino


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Sorted names in a folder, and whether each is a folder."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror})") from error
    for name, _ in found:
        try:
            name.encode()
        except UnicodeEncodeError:  # bytes that are no text, as the system hands them over
            shown = os.fsencode(name).decode(errors="backslashreplace")
            raise UserError(f"the name '{shown}' in {folder} is not UTF-8: rename it") from None
    return found


def _begins_as_image(path: Path) -> bool:
    try:
        if not path.is_file():  # nobody may ever write into a pipe, and a device has no end
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said when it is read
            with Image.open(path) as image:
                return image.format in FORMATS
    except Image.DecompressionBombError:
        return True
    except Exception:  # a file without a suffix may be anything, and its first bytes may break Pillow in any way
        return False
