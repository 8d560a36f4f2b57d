"""Imagenette, in the class folders that it is published in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torchvision

from salve.data.download import fetch
from salve.data.folders import FolderData
from salve.types import UserError

ImagenetteSize = Literal["full", "320px", "160px"]

IMAGENETTE_FOLDERS: dict[str, str] = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}

IMAGENETTE_CLASSES: dict[str, str] = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""WordNet id → name, of Imagenette's ten classes."""


class ImagenetteData(FolderData):
    """Imagenette: ten easily told-apart ImageNet classes, by Jeremy Howard (fast.ai).

    Args:
        root: where torchvision keeps or puts its `imagenette2*` folders; or a folder that holds exactly one such folder
            of another size; or a folder that holds the folders of the splits itself.
        size: "full", "320px" (shorter side) or "160px".
        download: fetch it into `root` through torchvision if it is not there.
        batch_size, num_workers, limit_per_class, splits, select_share, split_seed, classes, outputs, white: see
            `FolderData`. As published it has `train` and `val`, of which val is divided.

    Raises:
        UserError: unknown size; and, once the disk is read, nothing found, a failed download, a folder that is no
            Imagenette class, or anything `FolderData.check` finds.
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
    ) -> None:
        limits = (limit_per_class, splits, select_share, split_seed)
        super().__init__(root, batch_size, num_workers, *limits, classes, outputs, white)
        if size not in IMAGENETTE_FOLDERS:
            raise UserError(f"data.size={size!r} is no size of Imagenette: choose from {', '.join(IMAGENETTE_FOLDERS)}")
        self.size = size
        self.download = download

    def prepare_data(self) -> None:
        """Download if asked to and needed; Lightning calls this in one process only."""
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
            raise UserError(
                f"no Imagenette ({self.size}) in data.root={self.root}: pass data.download=true to fetch it, or as "
                f"data.root a folder that holds train/ and val/, or one that holds {IMAGENETTE_FOLDERS[self.size]}/"
            )
        return folder

    def _existing(self) -> Path | None:
        if (self.root / ("train" if self.splits is None else self.splits["train"])).is_dir():
            return self.root
        own = self.root / IMAGENETTE_FOLDERS[self.size]
        if own.is_dir():
            return own
        # A copy of a size of one's own; torchvision's other sizes are not what was asked for.
        others = [
            folder
            for folder in sorted(self.root.glob("imagenette2*"))
            if folder.is_dir() and folder.name not in IMAGENETTE_FOLDERS.values()
        ]
        return others[0] if len(others) == 1 else None

    def _class_name(self, folder: str) -> str:
        if folder not in IMAGENETTE_CLASSES:
            raise UserError(
                f"class folder {folder!r} is none of Imagenette's ({', '.join(IMAGENETTE_CLASSES)}): "
                "use data=folder for other images"
            )
        return IMAGENETTE_CLASSES[folder]
