# SPDX-License-Identifier: MIT
"""Check that the files, folders and models that the settings name exist, before torch is imported."""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
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
from salve.data.tables import table_files
from salve.run.schema import Config
from salve.types import UserError
from salve.values import OWN, PUBLISHED, TRANSFORMERS


def check_inputs(config: Config) -> None:
    """Check the model's name, the file of weights and, for images in files, the names of folders and tables.

    Raises:
        UserError: something is not there. The message is that of the code which would read it later.
    """
    settings: dict[str, Any] = asdict(config.data) if is_dataclass(config.data) else dict(config.data)  # type: ignore[arg-type]
    target = settings.get("_target_")
    if target in ("salve.data.FolderData", "salve.data.ImagenetteData"):
        _check_folders(settings, imagenette=target == "salve.data.ImagenetteData")
    if target == "salve.data.TableData":
        table_files(root_folder(settings.get("root")), settings.get("table") or ())
    library, weights = config.backbone.library, config.backbone.weights
    _check_name(library, config.backbone.name)
    if weights not in ("random", *PUBLISHED.values()) and not Path(os.path.expanduser(weights)).is_file():
        raise no_weights(library, weights)


def _check_name(library: str, name: str) -> None:
    """Refuse a name that is nowhere in the library's sources. Importing the library to ask it would take seconds.

    A name that the sources mention in any way, such as a deprecated one, is left to the library, and so is where timm
    shall load a network from: ``hf-hub:USER/MODEL``, ``local-dir:FOLDER``. What makes a network of one's own is looked
    for when it is made: that runs the user's code.
    """
    if library == TRANSFORMERS:
        _check_folder_or_hub(name)
    if library in (TRANSFORMERS, OWN) or (library == "timm" and ":" in name):
        return
    spec = find_spec(library)
    folders = [Path(folder) / "models" for folder in (spec and spec.submodule_search_locations) or []]
    text = "".join(file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.rglob("*.py")))
    plain = name.split(".")[0]
    known = set(re.findall(r"^@register_model(?:\(.*\))?\n(?:@.*\n)*def (\w+)\(", text, re.MULTILINE))
    if not known or plain in known or not plain or re.search(rf"""["']{re.escape(plain)}["'.]""", text):
        return
    raise no_model(library, name, known)


def _check_folder_or_hub(name: str) -> None:
    """Refuse a name of a transformers' network that is neither a folder with its configuration nor could be on the hub.

    Raises:
        UserError: also if transformers is not installed.
    """
    if find_spec(TRANSFORMERS) is None:
        raise UserError(
            "backbone.library=transformers needs the package transformers: pip install 'salve[transformers]'."
        )
    if os.path.isdir(name):
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"backbone.name={name} is a folder without config.json, so it holds no network.")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"backbone.name={name} is neither a folder nor a name on the hub (USER/MODEL).")


def no_model(library: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that a library does not know."""
    near = get_close_matches(name, sorted(known), 5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return UserError(f"backbone.name={name} is no model of {library}{hint}.")


def no_weights(library: str, weights: str) -> UserError:
    """The error for weights that are no file."""
    return UserError(f"backbone.weights={weights} is neither random, {PUBLISHED[library]} nor a file.")


def _check_folders(settings: dict[str, Any], imagenette: bool) -> None:
    root = root_folder(settings.get("root"))
    splits = None if settings.get("splits") is None else named_splits(settings["splits"])
    chosen = None if settings.get("classes") is None else chosen_classes(settings["classes"])
    outputs = settings.get("outputs")
    if outputs == IMAGENET:  # loading ImageNet's classes takes a second and a half
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
