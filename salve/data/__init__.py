"""Images with labels: the embedded concepts, Imagenette, CIFAR-100, and one's own folders."""

from salve.data.base import ConceptTruth, ImageData
from salve.data.cifar100 import Cifar100Data
from salve.data.concepts import ConceptsData
from salve.data.folders import FolderData
from salve.data.imagenette import ImagenetteData
from salve.data.transforms import Preprocess

__all__ = [
    "Cifar100Data",
    "ConceptTruth",
    "ConceptsData",
    "FolderData",
    "ImageData",
    "ImagenetteData",
    "Preprocess",
]
