"""A data source: gratings, level or upright, wide or narrow, drawn when they are asked for."""

import hashlib
import json
import math

import torch
from torch import Tensor

from salve.data import ImageData
from salve.types import Split, UserError

#: Half periods in an image, by class; the first two vary from top to bottom, the others from left to right.
PERIODS = {"wide level": 4, "narrow level": 9, "wide upright": 4, "narrow upright": 9}


class _Drawn:
    """The images of a split; image ``i`` depends on the seed, the split and ``i`` alone."""

    def __init__(self, split: Split, count: int, size: int, seed: int) -> None:
        self.split, self.count, self.size, self.seed = split, count, size, seed

    def __len__(self) -> int:
        return self.count * len(PERIODS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index // self.count
        name = list(PERIODS)[label]
        drawn = torch.Generator().manual_seed(_number(self.seed, self.split, index))
        phase = 2 * math.pi * torch.rand(1, generator=drawn)
        wave = torch.sin(torch.linspace(0, math.pi * PERIODS[name], self.size) + phase)
        grating = wave[:, None].expand(-1, self.size) if name.endswith("level") else wave.expand(self.size, -1)
        image = 0.5 + 0.3 * grating + 0.1 * torch.randn(3, self.size, self.size, generator=drawn)
        return (255 * image.clamp(0, 1)).to(torch.uint8), label


class Gratings(ImageData):
    """Four classes of gratings under noise.

    Args:
        train_per_class, select_per_class, test_per_class: images of each class. image_size: side in pixels.
        seed: of phases and noise. batch_size, num_workers: see :class:`salve.data.ImageData`.

    Raises:
        UserError: a split would have no images.
    """

    name = "gratings"
    min_crop_scale = 1.0  # a crop would widen the gratings

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        train_per_class: int = 100,
        select_per_class: int = 25,
        test_per_class: int = 25,
        image_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.counts: dict[str, int] = {"train": train_per_class, "select": select_per_class, "test": test_per_class}
        for split, count in self.counts.items():
            if count < 1:
                raise UserError(f"data.{split}_per_class={count} must be at least 1.")
        self.native_size, self.seed = image_size, seed

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(PERIODS)

    def raw(self, split: Split) -> _Drawn:
        return _Drawn(split, self.counts[split], self.native_size, self.seed)

    def labels(self, split: Split) -> Tensor:
        return torch.arange(len(PERIODS)).repeat_interleave(self.counts[split])

    def fingerprint(self) -> str:
        """Everything that the images depend on, and the version of the drawing: raise it when the code changes."""
        facts = {"drawing": 1, "periods": PERIODS, "counts": self.counts, "size": self.native_size, "seed": self.seed}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], "big")
