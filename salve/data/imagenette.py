# SPDX-License-Identifier: MIT
"""Imagenette, in the class folders in which it is published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torchvision

from salve.data.download import fetch
from salve.data.folders import FolderData
from salve.data.layout import IMAGENETTE_FOLDERS, find_imagenette, imagenette_name, no_imagenette
from salve.types import UserError

ImagenetteSize = Literal["full", "320px", "160px"]


class ImagenetteData(FolderData):
    """Imagenette: ten ImageNet classes that are easy to tell apart, by Jeremy Howard (fast.ai).

    It is published as ``train`` and ``val``; ``val`` is divided into *select* and *test*.

    Args:
        root: a folder that holds the folders of the splits, or torchvision's ``imagenette2*`` folder of this size, or
            exactly one such folder of another size; or the folder to download into.
        size: "full", "320px" (shorter side) or "160px".
        download: fetch the data into ``root`` through torchvision if they are not there.
        batch_size, num_workers, limit_per_class, splits, select_share, split_seed: see :class:`FolderData`.
        classes, outputs, white, groups, boxes: see :class:`FolderData`, too.

    Raises:
        UserError: unknown size; once the disk is read, no data, a failed download, a folder that is no Imagenette
            class, or whatever :meth:`FolderData.check` finds.
    """

    name = "imagenette"

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        num_workers: int = 0,
        size: ImagenetteSize = "160px",
        download: bool = False,
        limit_per_class: int | None = None,
        splits: Mapping[str, str] | None = None,
        select_share: float = 0.5,
        split_seed: int = 0,
        classes: Sequence[str] | Mapping[str, str] | None = None,
        outputs: str | Mapping[str, int] | None = None,
        white: float | None = None,
        groups: str | Path | None = None,
        boxes: str | Path | None = None,
    ) -> None:
        limits = (limit_per_class, splits, select_share, split_seed)
        super().__init__(root, batch_size, num_workers, *limits, classes, outputs, white, groups, boxes)
        if size not in IMAGENETTE_FOLDERS:
            raise UserError(f"data.size={size} is no size of Imagenette; choose from {', '.join(IMAGENETTE_FOLDERS)}.")
        self.size = size
        self.download = download

    def prepare_data(self) -> None:
        """Download if asked to and necessary; Lightning calls this in one process only."""
        if self.download and self._existing() is None:
            fetch(
                self.name,
                self.root,
                is_there=lambda: self._existing() is not None,
                download=lambda: torchvision.datasets.Imagenette(self.root, size=self.size, download=True),
            )

    def _folder(self) -> Path:
        self.prepare_data()
        folder = self._existing()
        if folder is None:
            raise no_imagenette(self.root, self.size)
        return folder

    def _existing(self) -> Path | None:
        return find_imagenette(self.root, self.size, self.splits)

    def _class_name(self, folder: str) -> str:
        return imagenette_name(folder)
