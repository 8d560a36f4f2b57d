# SPDX-License-Identifier: MIT
"""Labelled images: the drawn concepts data, Imagenette, CIFAR-100, and your own, in class folders or with a table.

Names are loaded when they are first used, so that a check of class folders need not wait seconds for torch and
Lightning.
"""

from typing import TYPE_CHECKING

from salve.lazy import lazy

if TYPE_CHECKING:
    from salve.data.base import ConceptTruth, ImageData
    from salve.data.boxes import Boxes
    from salve.data.cifar100 import Cifar100Data
    from salve.data.concepts import ConceptsData
    from salve.data.folders import FolderData
    from salve.data.groups import Groups
    from salve.data.imagenette import ImagenetteData
    from salve.data.pairs import Pairs
    from salve.data.table import TableData
    from salve.data.transforms import Preprocess

_MODULES = {
    "Boxes": "boxes",
    "Cifar100Data": "cifar100",
    "ConceptTruth": "base",
    "ConceptsData": "concepts",
    "FolderData": "folders",
    "Groups": "groups",
    "ImageData": "base",
    "ImagenetteData": "imagenette",
    "Pairs": "pairs",
    "Preprocess": "transforms",
    "TableData": "table",
}

__all__ = [
    "Boxes",
    "Cifar100Data",
    "ConceptTruth",
    "ConceptsData",
    "FolderData",
    "Groups",
    "ImageData",
    "ImagenetteData",
    "Pairs",
    "Preprocess",
    "TableData",
]

__getattr__, __dir__ = lazy(__name__, _MODULES)
