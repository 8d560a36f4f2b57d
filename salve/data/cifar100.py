# SPDX-License-Identifier: MIT
"""CIFAR-100 through torchvision."""

import hashlib
import json
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torchvision

from salve.data.base import ImageData, check_split
from salve.data.download import fetch
from salve.data.files import check_limit
from salve.data.layout import root_folder
from salve.data.splits import check_share, divide
from salve.data.transforms import RawImage
from salve.types import Labels, Split, UserError


class ArrayImages:
    """Images in memory.

    Args:
        images: ``[N, H, W, 3]`` (uint8).
        labels: ``[N]``.
        indices: ``[N]``, where each image stands in torchvision's file.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
        self.images = images
        self.labels = labels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[RawImage, int]:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1), int(self.labels[index])


class Cifar100Data(ImageData):
    """CIFAR-100 (Krizhevsky 2009): 100 classes of 32 × 32 photographs.

    The published test set is divided into *select* and *test*, class by class.

    Args:
        root: folder that holds torchvision's ``cifar-100-python``, or into which it is downloaded.
        batch_size, num_workers: see :class:`ImageData`.
        download: fetch the data into ``root`` if they are not there.
        limit_per_class: use only the first so many images of each class in each split; None uses all.
        select_share: share of each class of the published test set that goes to *select*, in (0, 1).
        split_seed: seed of that division.

    Raises:
        UserError: no root, or a value outside its range; once the disk is read, no data or a failed download.
    """

    name = "cifar100"
    native_size = 32

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        num_workers: int = 0,
        download: bool = False,
        limit_per_class: int | None = None,
        select_share: float = 0.5,
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        check_limit(limit_per_class)
        check_share(select_share, split_seed)
        self.root = root_folder(root)
        self.download = download
        self.limit_per_class = limit_per_class
        self.select_share = select_share
        self.split_seed = split_seed

    @property
    def classes(self) -> tuple[str, ...]:
        return self._loaded[0]

    @cached_property
    def superclasses(self) -> tuple[str, ...] | None:
        """For each class the name of its group, one of 20 ("coarse label"); None if the files have none."""
        _ = self._loaded  # torchvision compares checksums: only the published files are unpickled
        images, names = self._unpickled("train"), self._unpickled("meta")
        if "coarse_labels" not in images or "coarse_label_names" not in names:
            return None
        group = dict(zip(images["fine_labels"], images["coarse_labels"], strict=True))
        return tuple(names["coarse_label_names"][group[k]].replace("_", " ") for k in range(len(self.classes)))

    def _unpickled(self, name: str) -> dict[str, Any]:
        with (self.root / torchvision.datasets.CIFAR100.base_folder / name).open("rb") as file:
            return pickle.load(file, encoding="latin1")

    def raw(self, split: Split) -> ArrayImages:
        check_split(split)
        return self._loaded[1][split]

    def labels(self, split: Split) -> Labels:
        return torch.from_numpy(self.raw(split).labels)

    def sizes(self) -> list[tuple[int, int]]:
        return [(self.native_size, self.native_size)]

    def fingerprint(self) -> str:
        """SHA-256 of the published archive's MD5, which torchvision compares, and of the images in each split."""
        digest = hashlib.sha256(torchvision.datasets.CIFAR100.tgz_md5.encode())
        for split in get_args(Split):
            digest.update(json.dumps([split, self._loaded[1][split].indices.tolist()]).encode())
        return digest.hexdigest()

    def check(self) -> None:
        """Load everything (about 1 s).

        Raises:
            UserError: the data are missing, damaged, or cannot be downloaded.
        """
        _ = self._loaded

    def prepare_data(self) -> None:
        """Download if asked to and necessary; Lightning calls this in one process only."""
        if self.download and not self._is_there():
            fetch(
                self.name,
                self.root,
                is_there=self._is_there,
                download=lambda: torchvision.datasets.CIFAR100(self.root, download=True),
            )

    def _is_there(self) -> bool:
        try:
            torchvision.datasets.CIFAR100(self.root)
        except RuntimeError:  # torchvision: absent, or a checksum that does not match
            return False
        return True

    @cached_property
    def _loaded(self) -> tuple[tuple[str, ...], dict[str, ArrayImages]]:
        self.prepare_data()
        try:
            train, held_out = (torchvision.datasets.CIFAR100(self.root, train=train) for train in (True, False))
        except RuntimeError as error:
            raise UserError(
                f"data.root={self.root} holds no CIFAR-100, or a damaged one; set data.download=true to fetch it, or "
                "set data.root to the folder that holds cifar-100-python/."
            ) from error
        names = tuple(name.replace("_", " ") for name in train.classes)
        select, test = divide(np.asarray(held_out.targets), names, self.select_share, self.split_seed)
        return names, {
            "train": self._limited(train, np.arange(len(train.targets))),
            "select": self._limited(held_out, select),
            "test": self._limited(held_out, test),
        }

    def _limited(self, data: torchvision.datasets.CIFAR100, indices: np.ndarray) -> ArrayImages:
        labels = np.asarray(data.targets, dtype=np.int64)
        if self.limit_per_class is not None:
            own = [indices[labels[indices] == label] for label in range(len(data.classes))]
            indices = np.sort(np.concatenate([images[: self.limit_per_class] for images in own]))
        return ArrayImages(data.data[indices], labels[indices], indices)
