"""Labelled images: the drawn concepts data, Imagenette, CIFAR-100, and your own class folders.

Names are loaded when they are first used, so that a check of class folders need not wait seconds for torch and
Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salve.data.base import ConceptTruth, ImageData
    from salve.data.cifar100 import Cifar100Data
    from salve.data.concepts import ConceptsData
    from salve.data.folders import FolderData
    from salve.data.imagenette import ImagenetteData
    from salve.data.transforms import Preprocess

_MODULES = {
    "Cifar100Data": "cifar100",
    "ConceptTruth": "base",
    "ConceptsData": "concepts",
    "FolderData": "folders",
    "ImageData": "base",
    "ImagenetteData": "imagenette",
    "Preprocess": "transforms",
}

__all__ = [
    "Cifar100Data",
    "ConceptTruth",
    "ConceptsData",
    "FolderData",
    "ImageData",
    "ImagenetteData",
    "Preprocess",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
