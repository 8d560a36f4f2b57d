"""What every source of images offers to the stages."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Protocol, get_args

import pytorch_lightning as pl
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from salve.data.transforms import Preprocess, RawImage
from salve.distributed import DrawnBatches, DrawnItems, RankBatches
from salve.types import Labels, Split, UserError

FEW_IMAGES = 50
"""With fewer images of a class in a split, `ImageData.remarks` says so: a rate of theirs may be off by 14 points."""


class RawImages(Protocol):
    """Decoded images with their labels, before any transform."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[RawImage, int]: ...


class TransformedImages(Dataset):
    """`(transform(image), label)` of every raw image, in the raw order."""

    def __init__(self, raw: RawImages, transform: Callable[[RawImage], Tensor]) -> None:
        self.raw = raw
        self.transform = transform

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.raw[index]
        return self.transform(image), label


@dataclass(frozen=True)
class ConceptTruth:
    """Which concepts each image of a split shows, and where.

    Attributes:
        concepts: names of the K concepts.
        class_concept: for each of the C classes, the index of the concept that defines it.
        presence: `[N, K]`, True where the image shows the concept.
        masks: `masks(indices, concept)` → bool `[n, H, W]` at native resolution: the pixels of those images in which
            the concept is visible (what other objects cover is left out; all False where it is absent).
    """

    concepts: tuple[str, ...]
    class_concept: tuple[int, ...]
    presence: Bool[Tensor, "N K"]
    masks: Callable[[Sequence[int], int], Bool[Tensor, "n H W"]]

    def __post_init__(self) -> None:
        if self.presence.ndim != 2 or self.presence.shape[1] != len(self.concepts):
            raise ValueError(f"presence {list(self.presence.shape)} does not fit {len(self.concepts)} concepts")
        if self.presence.dtype != torch.bool:
            raise ValueError(f"presence must be bool, not {self.presence.dtype}")
        if not all(0 <= concept < len(self.concepts) for concept in self.class_concept):
            raise ValueError(f"class_concept {self.class_concept} points outside the {len(self.concepts)} concepts")


class ImageData(pl.LightningDataModule):
    """A labelled set of images in three splits: "train" fits, "select" chooses, "test" reports.

    No image is in two of them, and every class is in each.

    `bind` it to the preprocessing of a backbone before asking for datasets or loaders; labels, class names,
    fingerprint and check need no backbone.

    Args:
        batch_size: images per batch, unless a loader is asked for another.
        num_workers: loader processes; 0 loads in the calling process.

    Raises:
        UserError: batch_size below 1 or num_workers below 0.
    """

    name: str = "images"
    native_size: int = 224
    """Side in pixels that a backbone without a preset of its own should read."""
    min_crop_scale: float = 0.35
    """Smallest share of the area that a training crop keeps."""

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size must be at least 1, not {batch_size}")
        if num_workers < 0:
            raise UserError(f"data.num_workers must be 0 or more, not {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.preprocess: Preprocess | None = None

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Human names of the C classes; a label is an index into them."""

    @property
    def outputs(self) -> tuple[int, ...] | None:
        """For each class, the output of the network that stands for it; None where output k is class k.

        Raises:
            UserError: as `check`, once the data are looked at.
        """
        return None

    @abstractmethod
    def raw(self, split: Split) -> RawImages:
        """Decoded images and labels of a split, in their fixed order."""

    @abstractmethod
    def labels(self, split: Split) -> Labels:
        """Labels `[N]` (int64) of a split, in dataset order; decodes no image."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 of what the images are, whatever folder they lie in and however they are loaded."""

    def check(self) -> None:
        """Find out cheaply whether the data can be used.

        Raises:
            UserError: they cannot; the sentence says why.
        """

    def check_outputs(self, count: int) -> None:
        """Raises UserError if a network of `count` outputs lacks one of `outputs`."""
        for name, unit in zip(self.classes, self.outputs or (), strict=False):
            if unit >= count:
                raise UserError(
                    f"data.outputs has unit {unit} for {name!r}, but the network has the outputs 0 to {count - 1}"
                )

    def remarks(self) -> list[str]:
        """Sentences on what a reader should know of the data before trusting results; without full stops.

        Here: classes of which a split has few images; and, once bound, that images are enlarged.
        """
        return [*self._few_images(), *self._enlarged()]

    def sizes(self) -> list[tuple[int, int]]:
        """Width and height in pixels of some of the images as they are stored; empty where it is not known."""
        return []

    def _few_images(self) -> list[str]:
        splits: tuple[Split, ...] = ("train", "select")  # of test images the report speaks
        fewest = {split: int(self.labels(split).bincount().min()) for split in splits}
        few = [f"{split} {count}" for split, count in fewest.items() if count < FEW_IMAGES]
        if not few:
            return []
        return [
            f"images of the class that has fewest: {', '.join(few)}; below {FEW_IMAGES} what they teach or choose is "
            "uncertain"
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
        return [f"the images ({one}{width} × {height}) are enlarged to {size} × {size}"]

    def truth(self, split: Split) -> ConceptTruth | None:
        """Ground truth of a split's concepts, or None for data that have none."""
        check_split(split)
        return None

    def first(self, split: Split, count: int) -> list[tuple[RawImage, int]]:
        """The first decoded images of a split and their labels, at most ``count``; quick also where ``raw`` is not."""
        images = self.raw(split)
        return [images[number] for number in range(min(count, len(images)))]

    def bind(self, preprocess: Preprocess) -> None:
        """Use a backbone's preprocessing from now on."""
        self.preprocess = preprocess

    def dataset(self, split: Split, augment: bool = False) -> Dataset:
        """Items `(image, label)`: float32 `[3, S, S]` with `S = preprocess.size`, and an int.

        Without `augment` the items are always the same, in the same order as `labels`.

        Raises:
            UserError: no preprocessing bound yet, or an unknown split.
        """
        check_split(split)
        if self.preprocess is None:
            raise UserError(
                f"the {self.name} data do not know what the backbone reads: call bind(preprocess) before "
                "asking for images"
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
    ) -> DataLoader:
        """Batches `(images [n, 3, S, S], labels [n])` of a split, or of the given indices of it in the given order.

        Shuffling and augmentation follow torch's global seed, whatever the number of workers. Within a process group
        a rank gets its part of each batch, which may be empty.
        """
        dataset = self.dataset(split, augment)
        assert self.preprocess is not None
        if indices is not None:
            dataset = Subset(dataset, list(indices))
        rows = len(self.labels(split) if indices is None else indices)
        batches = RankBatches(rows, self.batch_size if batch_size is None else batch_size, shuffle, drop_last)
        return DataLoader(
            DrawnItems(dataset) if augment else dataset,
            batch_sampler=DrawnBatches(batches) if augment else batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_collate, self.preprocess.size),
            # The seed of the workers is drawn from it: from the global one it would be drawn every epoch without
            # workers but once with them, and the order of the rows would depend on their number.
            generator=torch.Generator(),
        )

    def train_dataloader(self) -> DataLoader:
        """Augmented and shuffled; an incomplete last batch is dropped unless it is the only one."""
        more_than_one = len(self.labels("train")) > self.batch_size
        return self.loader("train", augment=True, shuffle=True, drop_last=more_than_one)

    def val_dataloader(self) -> DataLoader:
        """The select split in its fixed order: what Lightning calls validation chooses the epoch."""
        return self.loader("select")

    def test_dataloader(self) -> DataLoader:
        """The test split in its fixed order."""
        return self.loader("test")


def _collate(size: int, items: list[tuple[Tensor, int]]) -> Any:
    """A batch; also of no item, which a rank may get."""
    return default_collate(items) if items else (torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.long))


def check_split(split: Any) -> None:
    """Raises UserError if `split` is none of the three."""
    if split not in get_args(Split):
        raise UserError(f"there is no split {split!r}: the splits are {', '.join(get_args(Split))}")
