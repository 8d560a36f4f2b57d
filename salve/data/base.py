# SPDX-License-Identifier: MIT
"""The base class of all data sources: what the stages need of labelled images."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Protocol, get_args

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from salve.data.boxes import Boxes
from salve.data.groups import Groups
from salve.data.pairs import Pairs
from salve.data.transforms import Preprocess, RawImage
from salve.distributed import DrawnBatches, DrawnItems, RankBatches
from salve.types import Labels, Split, UserError

#: Below so many images of a class in a split, :meth:`ImageData.remarks` warns: a rate may be off by 14 points.
FEW_IMAGES = 50


class RawImages(Protocol):
    """Decoded images with their labels, before any transform."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[RawImage, int]: ...


class TransformedImages(Dataset):
    """Pairs ``(transform(image), label)``, in the order of the raw images.

    Args:
        raw: decoded images with labels.
        transform: from a decoded image to a tensor.
    """

    def __init__(self, raw: RawImages, transform: Callable[[RawImage], Tensor]) -> None:
        self.raw = raw
        self.transform = transform

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.raw[index]
        return self.transform(image), label


class _WithTargets(Dataset):
    """Images with other numbers than their labels."""

    def __init__(self, images: Dataset, targets: Sequence[int]) -> None:
        self._images, self._targets = images, targets

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index][0], self._targets[index]


@dataclass(frozen=True)
class ConceptTruth:
    """Which concepts each image of a split shows, and where.

    Attributes:
        concepts: names of the K concepts.
        class_concept: for each of the C classes, the index of the concept that defines it.
        presence: ``[N, K]``, True where the image shows the concept.
        masks: ``masks(indices, concept)`` → bool ``[n, H, W]`` at native resolution: the pixels in which the concept is
            visible. Pixels that other objects cover are False, and all are where the concept is absent.

    Raises:
        ValueError: shapes, dtype or indices that do not agree.
    """

    concepts: tuple[str, ...]
    class_concept: tuple[int, ...]
    presence: Bool[Tensor, "N K"]
    masks: Callable[[Sequence[int], int], Bool[Tensor, "n H W"]]

    def __post_init__(self) -> None:
        if self.presence.ndim != 2 or self.presence.shape[1] != len(self.concepts):
            raise ValueError(f"presence {list(self.presence.shape)} must be [N, {len(self.concepts)}].")
        if self.presence.dtype != torch.bool:
            raise ValueError(f"presence must be bool, not {self.presence.dtype}.")
        if not all(0 <= concept < len(self.concepts) for concept in self.class_concept):
            raise ValueError(f"class_concept {self.class_concept} must lie in 0 to {len(self.concepts) - 1}.")


class ImageData(pl.LightningDataModule):
    """Labelled images in three splits: "train" fits, "select" chooses, "test" reports.

    No image is in two splits, and every split has every class.

    Call :meth:`bind` with the preprocessing of a backbone before asking for datasets or loaders. Labels, class names,
    fingerprint and check need no backbone.

    Args:
        batch_size: images per batch; :meth:`loader` can take another.
        num_workers: loader processes; 0 loads in the calling process.

    Attributes:
        name: what messages call the data.
        native_size: side in pixels that a backbone without a preset of its own reads.
        min_crop_scale: smallest share of the area that a training crop keeps.

    Raises:
        UserError: batch_size below 1 or num_workers below 0.
    """

    name: str = "images"
    native_size: int = 224
    min_crop_scale: float = 0.35

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size} must be at least 1.")
        if num_workers < 0:
            raise UserError(f"data.num_workers={num_workers} must be at least 0.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.preprocess: Preprocess | None = None

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the C classes, for people; a label is an index into them."""

    @property
    def outputs(self) -> tuple[int, ...] | None:
        """The output of the network for each class; None if output k is class k.

        Raises:
            UserError: as :meth:`check`.
        """
        return None

    @abstractmethod
    def raw(self, split: Split) -> RawImages:
        """Decoded images and labels of a split, in a fixed order."""

    @abstractmethod
    def labels(self, split: Split) -> Labels:
        """Labels ``[N]`` (int64) of a split, in the order of :meth:`raw`; decodes no image."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 of the images and labels; independent of the folder they lie in and of how they are loaded."""

    def check(self) -> None:
        """Check quickly whether the data can be used.

        Raises:
            UserError: they cannot; the message says why.
        """

    def remarks(self) -> list[str]:
        """Sentences about the data that a reader should know before trusting results.

        Here: that a class has few images; and, once bound, that images are enlarged.
        """
        return [*self._few_images(), *self._enlarged()]

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height in pixels of some images as stored; empty if unknown."""
        return []

    def _few_images(self) -> list[str]:
        splits: tuple[Split, ...] = ("train", "select")  # the report says it of test images
        fewest = {split: int(self.labels(split).bincount().min()) for split in splits}
        few = [f"{split} {count}" for split, count in fewest.items() if count < FEW_IMAGES]
        if not few:
            return []
        return [
            f"The smallest class has few images ({', '.join(few)}): with fewer than {FEW_IMAGES}, what is trained or "
            "chosen on them is uncertain."
        ]

    def _enlarged(self) -> list[str]:
        sizes = self.sizes()
        if self.preprocess is None or not sizes:
            return []
        width, height = (round(median(side)) for side in zip(*sizes, strict=True))
        size, shorter = self.preprocess.size, self.preprocess.resize
        if min(width, height) >= (size if shorter is None else shorter):
            return []
        one = "" if len(set(sizes)) == 1 else "median "
        to = f"to {size} × {size}"
        if shorter not in (None, size):
            to = f"to {shorter} pixels at the shorter side, of which the middle {size} × {size} are kept"
        return [f"The images ({one}{width} × {height}) are enlarged {to}."]

    def files(self, split: Split) -> list[str] | None:
        """The path of each image of a split, from the root of the data; None if they are no files."""
        check_split(split)
        return None

    def truth(self, split: Split) -> ConceptTruth | None:
        """Ground truth about the concepts in a split; None if the data have none."""
        check_split(split)
        return None

    def groups(self, split: Split) -> Groups | None:
        """An attribute of the images of a split beside their class; None if none is known."""
        check_split(split)
        return None

    def objects(self, split: Split) -> Int[Tensor, " N"] | None:
        """Which object, patient or video each image of a split shows, by number; None if every image has its own."""
        check_split(split)
        return None

    def boxes(self, split: Split) -> Boxes | None:
        """Boxes around the objects of some images of a split; None if none are known."""
        check_split(split)
        return None

    def pairs(self, split: Split) -> Pairs | None:
        """Every image of a split with and without a shortcut; None if they cannot be had."""
        check_split(split)
        return None

    def without_shortcut(self) -> "ImageData | None":
        """The same data, but that the shortcut goes with no class; None if they cannot be had. Not bound."""
        return None

    def first(self, split: Split, count: int) -> list[tuple[RawImage, int]]:
        """The first ``count`` decoded images of a split, or all if there are fewer, with labels.

        Override it where :meth:`raw` prepares a whole split at once.
        """
        images = self.raw(split)
        return [images[number] for number in range(min(count, len(images)))]

    def bind(self, preprocess: Preprocess) -> None:
        """Use the preprocessing of a backbone from now on."""
        self.preprocess = preprocess

    def dataset(self, split: Split, augment: bool = False) -> Dataset:
        """Items ``(image, label)``: float32 ``[3, S, S]`` with ``S = preprocess.size``, and an int.

        Args:
            split: which split.
            augment: crop and flip at random; otherwise the items are always the same, in the order of :meth:`labels`.

        Raises:
            UserError: no preprocessing is bound, or there is no such split.
        """
        check_split(split)
        if self.preprocess is None:
            raise UserError(
                f"The {self.name} data have no preprocessing yet: call bind(preprocess) before asking for images."
            )
        if augment:
            return TransformedImages(self.raw(split), self.preprocess.train_transform(self.min_crop_scale))
        return TransformedImages(self.raw(split), self.preprocess.eval_transform())

    def loader(
        self,
        split: Split,
        *,
        augment: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> DataLoader:
        """Batches ``(images [n, 3, S, S], labels [n])`` of a split.

        Shuffling and augmentation depend on torch's global seed, not on the number of workers. Within a process group
        each rank gets its part of each batch, which may be empty.

        Args:
            split: which split.
            augment: crop and flip at random.
            shuffle: in a new random order every epoch.
            drop_last: leave out an incomplete last batch.
            batch_size: instead of the data's own.
            indices: use only these images of the split, in this order; one may be named several times.
            targets: of all images of the split, in place of their labels.
            weights: of these images, by which a shuffled epoch draws as many of them with replacement.
        """
        dataset = self.dataset(split, augment)
        if targets is not None:
            dataset = _WithTargets(dataset, targets)
        assert self.preprocess is not None
        if indices is not None:
            dataset = Subset(dataset, list(indices))
        rows = len(self.labels(split) if indices is None else indices)
        size = self.batch_size if batch_size is None else batch_size
        batches = RankBatches(rows, size, shuffle, drop_last, weights)
        return DataLoader(
            DrawnItems(dataset) if augment else dataset,
            batch_sampler=DrawnBatches(batches) if augment else batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_collate, self.preprocess.size),
            # The workers' seed is drawn from this generator. Drawn from the global one, it would be drawn every epoch
            # without workers but once with them, and the order of the images would depend on their number.
            generator=torch.Generator(),
        )

    def train_dataloader(self) -> DataLoader:
        """The train split, augmented and shuffled; an incomplete last batch is dropped unless it is the only one."""
        more_than_one = len(self.labels("train")) > self.batch_size
        return self.loader("train", augment=True, shuffle=True, drop_last=more_than_one)

    def val_dataloader(self) -> DataLoader:
        """The select split in its fixed order: Lightning's validation chooses the epoch."""
        return self.loader("select")

    def test_dataloader(self) -> DataLoader:
        """The test split in its fixed order."""
        return self.loader("test")


def _collate(size: int, items: list[tuple[Tensor, int]]) -> Any:
    """A batch; empty if a rank has no items."""
    return default_collate(items) if items else (torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.long))


def check_split(split: Any) -> None:
    """Check the name of a split.

    Raises:
        UserError: it is none of the three.
    """
    if split not in get_args(Split):
        raise UserError(f"There is no split {split!r}; the splits are {', '.join(get_args(Split))}.")
