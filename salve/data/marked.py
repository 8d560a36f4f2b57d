# SPDX-License-Identifier: MIT
"""Images of another data source, some of them with a mark that goes with a class: a shortcut that is known."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.data.base import ConceptTruth, ImageData, RawImages
from salve.data.boxes import Boxes
from salve.data.groups import ABSENT_PRESENT, Groups
from salve.data.marks import DRAWING_VERSION, SEEN, check_looks, painted
from salve.data.naming import nearest
from salve.data.pairs import Pairs
from salve.data.transforms import Preprocess, RawImage, to_uint8_tensor
from salve.data_settings import MarkSettings
from salve.types import Labels, Split, UserError

_SPLIT_STREAM: dict[str, int] = {"train": 0, "test": 1, "select": 2}


class MarkedImages:
    """Decoded images, some of them with a mark.

    Args:
        raw: the images without it.
        marked: ``[N]``, which of them bear it.
        mark: what it looks like.
        split: which split the images are; the random place and the noise of a mark depend on it.
    """

    def __init__(self, raw: RawImages, marked: Bool[Tensor, " N"], mark: MarkSettings, split: Split) -> None:
        self.raw, self.marked, self.mark, self.split = raw, marked, mark, split

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        image, label = self.raw[index]
        if not self.marked[index]:
            return image, label
        pixels = to_uint8_tensor(image).numpy()
        return torch.from_numpy(painted(pixels, self.mark, _stream(self.mark, self.split, index, 1))), label


class MarkedData(ImageData):
    """Another data source with a mark on some of its images.

    The mark is put on the decoded image, before any preprocessing, and whether image i of a split bears it depends on
    the mark's seed, the split, i and the rate of its class alone: at a higher rate, more images bear it, and none loses
    it.

    Args:
        data: the source of the images. mark: which mark, and how often it goes with which class.

    Raises:
        UserError: a colour or text that cannot be drawn, or a rate outside of 0 to 1. In :meth:`check`: a rate of a
            class that the data do not have. In :meth:`bind`: a preprocessing that would cut the mark off.
    """

    def __init__(self, data: ImageData, mark: MarkSettings) -> None:
        super().__init__(data.batch_size, data.num_workers)
        mark.check()
        check_looks(mark)
        self.data, self.mark = data, mark
        self._marked: dict[str, Bool[Tensor, " N"]] = {}
        self.name, self.min_crop_scale = data.name, data.min_crop_scale

    @property
    def native_size(self) -> int:  # type: ignore[override]
        """That of the source."""
        return self.data.native_size

    @property
    def classes(self) -> tuple[str, ...]:
        return self.data.classes

    @property
    def outputs(self) -> tuple[int, ...] | None:
        return self.data.outputs

    def prepare_data(self) -> None:
        """See the data source."""
        self.data.prepare_data()

    def raw(self, split: Split) -> MarkedImages:
        return MarkedImages(self.data.raw(split), self.marked(split), self.mark, split)

    def first(self, split: Split, count: int) -> list[tuple[RawImage, int]]:
        found = self.data.first(split, count)
        images = MarkedImages(found, self.marked(split), self.mark, split)
        return [images[i] for i in range(len(found))]

    def labels(self, split: Split) -> Labels:
        return self.data.labels(split)

    def marked(self, split: Split) -> Bool[Tensor, " N"]:
        """Which images of a split bear the mark."""
        if split not in self._marked:
            labels = torch.as_tensor(self.labels(split))
            drawn = [_stream(self.mark, split, i, 0).random() for i in range(len(labels))]
            self._marked[split] = torch.tensor(drawn, dtype=torch.float64) < self.rates(split)[labels]
        return self._marked[split]

    def rates(self, split: Split) -> Float[Tensor, " C"]:
        """P(mark | class) of each class in a split.

        Raises:
            UserError: the settings name a class that the data do not have.
        """
        name, others = ("rates", self.mark.rate) if split == "train" else ("held_out_rates", self.mark.held_out_rate)
        given: Mapping[str, float] = getattr(self.mark, name)
        for of_class in given:
            if of_class not in self.classes:
                raise UserError(f"mark.{name} names the class {of_class!r}, {nearest(of_class, self.classes)}.")
        return torch.tensor([given.get(of_class, others) for of_class in self.classes], dtype=torch.float64)

    def fingerprint(self) -> str:
        """SHA-256 of the images' own fingerprint, of the mark's looks, and of its rates."""
        rates = [self.rates(split).tolist() for split in ("train", "select")]
        mark = [DRAWING_VERSION, self.mark.looks(), self.mark.seed, rates]
        return hashlib.sha256(json.dumps([self.data.fingerprint(), mark], sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        self.data.check()
        self.rates("train")
        self.rates("test")

    def remarks(self) -> list[str]:
        """See the data source; also that the mark goes with no class."""
        none = (
            ["The mark goes with no class more than with others: mark.rates is empty."] if not self.mark.rates else []
        )
        own = self.data.groups("test")
        hides = (
            [f"Groups are told by the mark, {self.mark.kind}, and no longer by {own.name}."] if own is not None else []
        )
        return [*self.data.remarks(), *none, *hides]

    def sizes(self) -> list[tuple[int, int]]:
        return self.data.sizes()

    def files(self, split: Split) -> list[str] | None:
        return self.data.files(split)

    def truth(self, split: Split) -> ConceptTruth | None:
        return self.data.truth(split)

    def objects(self, split: Split) -> Int[Tensor, " N"] | None:
        return self.data.objects(split)

    def boxes(self, split: Split) -> Boxes | None:
        return self.data.boxes(split)

    def groups(self, split: Split) -> Groups:
        """Whether an image bears the mark."""
        return Groups(self.mark.kind, ABSENT_PRESENT, self.marked(split).long())

    def pairs(self, split: Split) -> Pairs:
        """Every image without the mark and with it."""
        raw = self.data.raw(split)
        everywhere = torch.ones(len(raw), dtype=torch.bool)
        return Pairs(self.mark.kind, raw, MarkedImages(raw, everywhere, self.mark, split))

    def without_shortcut(self) -> "MarkedData":
        """With the mark equally often on the train images of every class."""
        return MarkedData(self.data, replace(self.mark, rates={}))

    def bind(self, preprocess: Preprocess) -> None:
        """See :meth:`ImageData.bind`.

        Raises:
            UserError: the centre crop is so small that it would cut the mark off.
        """
        if preprocess.resize is not None and preprocess.size < SEEN * preprocess.resize:
            raise UserError(
                f"The preprocessing ({preprocess.describe()}) crops more than a mark allows for, which lies in the "
                f"middle {SEEN:.1%} of the shorter side; set backbone.preprocess.resize={int(preprocess.size / SEEN)} "
                "or less, or backbone.preprocess.squash=true."
            )
        super().bind(preprocess)
        self.data.bind(preprocess)


def _stream(mark: MarkSettings, split: Split, index: int, part: int) -> np.random.Generator:
    """The random numbers of one image: part 0 says whether it bears the mark, part 1 where, and the noise."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((mark.seed, _SPLIT_STREAM[split], index, part))))
