"""Whether what the settings name is there, before anything is loaded that takes seconds."""

import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from salve.data.classes import IMAGENET, chosen_classes
from salve.data.layout import (
    IMAGENETTE_FOLDERS,
    find_imagenette,
    imagenette_name,
    no_imagenette,
    read_layout,
    root_folder,
)
from salve.data.splits import named_splits
from salve.run.schema import Config
from salve.types import UserError


def check_inputs(config: Config) -> None:
    """Look for the file of weights and, for images in folders, at the folders' names.

    Raises:
        UserError: what is not there, as those say it who read it later.
    """
    settings: dict[str, Any] = asdict(config.data) if is_dataclass(config.data) else dict(config.data)  # type: ignore[arg-type]
    target = settings.get("_target_")
    if target in ("salve.data.FolderData", "salve.data.ImagenetteData"):
        _check_folders(settings, imagenette=target == "salve.data.ImagenetteData")
    weights = config.backbone.weights
    if weights not in ("random", "imagenet") and not Path(os.path.expanduser(weights)).is_file():
        raise no_weights(weights)


def no_weights(weights: str) -> UserError:
    """What is said where there is no such file."""
    return UserError(f"backbone.weights={weights} is neither random, imagenet nor a file.")


def _check_folders(settings: dict[str, Any], imagenette: bool) -> None:
    root = root_folder(settings.get("root"))
    splits = None if settings.get("splits") is None else named_splits(settings["splits"])
    chosen = None if settings.get("classes") is None else chosen_classes(settings["classes"])
    outputs = settings.get("outputs")
    if outputs == IMAGENET:  # to know ImageNet's classes takes a second and a half
        outputs = None
    if not imagenette:
        read_layout(root, splits, chosen, outputs)
        return
    size = settings.get("size")
    if size not in IMAGENETTE_FOLDERS:
        raise UserError(f"data.size={size!r} is no size of Imagenette: choose from {', '.join(IMAGENETTE_FOLDERS)}")
    folder = find_imagenette(root, size, splits)
    if folder is None and not settings.get("download"):
        raise no_imagenette(root, size)
    if folder is not None:
        read_layout(folder, splits, chosen, outputs, imagenette_name)
