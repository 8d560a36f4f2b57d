# SPDX-License-Identifier: MIT
"""What settings may name, whoever wrote them: UTF-8 texts, paths, and classes of data, callbacks and networks."""

import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from salve.settings import TRAINING_STAGES, BackboneSettings
from salve.types import UserError
from salve.values import OWN, PUBLISHED

#: Constructor arguments of timm and torchvision that load weights. They are refused: only ``backbone.weights`` says
#: where weights come from, and what it names is never unpickled.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")


def below(key: str, name: str) -> str:
    """Check a name that becomes a path below ``output_dir``, and return it.

    Args:
        key: the setting, for the message.
        name: its value.

    Raises:
        UserError: an absolute path, or one with a part ``..``.
    """
    parts = str(name).replace("\\", "/").split("/")
    if Path(str(name)).is_absolute() or not parts[0] or ".." in parts:
        raise UserError(f"{key}={name} must be a name, or a path below output_dir: neither absolute nor with .. in it.")
    return decodable(key, str(name))


def decodable(key: str, text: str) -> str:
    """Check that a text is UTF-8, and return it. Other texts can be computed with, but not written into results.

    Args:
        key: the setting, for the message.
        text: its value.

    Raises:
        UserError: the text is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # a name on disk that is not UTF-8
        shown = text.encode(errors="backslashreplace").decode()
        raise UserError(f"{key}='{shown}' is not UTF-8, and results could not be written: rename it.") from None
    return text


def refuse_undecodable(value: Any, key: str = "") -> None:
    """Apply :func:`decodable` to all settings below ``key``."""
    if isinstance(value, dict):
        for name, part in value.items():
            refuse_undecodable(part, f"{key}.{name}".lstrip("."))
            decodable(key, str(name))
    elif isinstance(value, list):
        for part in value:
            refuse_undecodable(part, key)
    elif isinstance(value, str):
        decodable(key, value)


def check_data(data: Any) -> None:
    """Check that the data's settings name one class, and that its arguments are plain values.

    Raises:
        UserError: ``data._target_`` is missing, or an argument names a class.
    """
    settings = asdict(data) if is_dataclass(data) else data  # type: ignore[arg-type]
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise UserError("data._target_, the class that reads the images, is not set.")
    for name, value in settings.items():
        _refuse_class_in(value, f"data.{name}")


def check_evaluate(entries: list[Any]) -> None:
    """Check that each evaluation set is a text, or a mapping of plain values.

    Raises:
        UserError: one is not.
    """
    for entry in entries:
        if isinstance(entry, dict):
            _refuse_class_in(entry, "evaluate")
        elif not isinstance(entry, str) or not entry:
            raise UserError(
                f"evaluate has {entry}; an evaluation set is a text, such as test, pairs, fog-3 or a folder, or a "
                "mapping such as {data: folder, root: …}."
            )


def _refuse_class_in(value: Any, key: str) -> None:
    for name, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if name == "_target_":
            raise UserError(
                f"{key}._target_={part}: only data, callbacks and backbone name a class, and its arguments are plain "
                "values."
            )
        _refuse_class_in(part, f"{key}.{name}")


def check_callbacks(callbacks: dict[str, Any]) -> None:
    """Check that each callback names a class, stages that train, and plain arguments; null leaves a callback out.

    Raises:
        UserError: one does not.
    """
    for name, settings in callbacks.items():
        key = f"callbacks.{name}"
        if settings is None:
            continue
        if not isinstance(settings, dict) or "_target_" not in settings:
            raise UserError(
                f"{key} names no class; set {key}._target_=package.module.Class, and its arguments beside it."
            )
        stages = settings.get("_stages_", list(TRAINING_STAGES))
        if not isinstance(stages, list) or not stages or not {*map(str, stages)} <= {*TRAINING_STAGES}:
            raise UserError(f"{key}._stages_={stages} must be a list of {' and '.join(TRAINING_STAGES)}.")
        for argument, value in settings.items():
            _refuse_class_in(value, f"{key}.{argument}")


def check_measures(measures: dict[str, Any]) -> None:
    """Check that each measure of the user's own has a name for a table, and names a function; null leaves one out.

    Raises:
        UserError: one does not.
    """
    for name, settings in measures.items():
        if not str(name).isidentifier():
            raise UserError(f"measures.{name}: a measure's name may hold letters, digits and _ alone.")
        if settings is not None and (not isinstance(settings, dict) or "_target_" not in settings):
            raise UserError(
                f"measures.{name} names no function; set measures.{name}._target_=package.module.function, and its "
                "arguments beside it."
            )
        for argument, value in (settings or {}).items():
            _refuse_class_in(value, f"measures.{name}.{argument}")


def of_stage(callbacks: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """The settings, by name, of the callbacks that apply to the training of a stage: ``_target_`` and arguments."""
    return {
        name: {argument: value for argument, value in settings.items() if argument != "_stages_"}
        for name, settings in callbacks.items()
        if settings is not None and stage in settings.get("_stages_", TRAINING_STAGES)
    }


def check_backbone(backbone: BackboneSettings) -> None:
    """Check that a network of one's own is named, and the arguments of any network.

    Raises:
        UserError: it is not; or an argument is no plain value, or names a file to load.
    """
    args = backbone.args
    if backbone.library == OWN and backbone._target_ is None:
        raise UserError(
            "backbone.library=own needs backbone._target_=package.module.name, the class or function that makes the "
            "network."
        )
    for name in SOURCES:
        if name in args:
            raise UserError(
                f"backbone.args.{name} cannot be set: backbone.weights says where the weights come from (random, "
                f"{PUBLISHED[backbone.library]} or a file), and backbone.args how the network is built."
            )
    _refuse_class_in(args, "backbone.args")


def _at_home(path: str) -> str:
    """Expand ``~``: a shell leaves it in ``output_dir=~/x``, and not every library expands it."""
    return os.path.expanduser(path)


def results_folder(path: str) -> str:
    """Expand ``~`` in ``output_dir``.

    Raises:
        UserError: its absolute path is not UTF-8.
    """
    decodable("output_dir", os.path.abspath(_at_home(path)))
    return _at_home(path)


def input_path(key: str, path: str) -> str:
    """Expand ``~`` in a path to read.

    Args:
        key: the setting, for the message.
        path: its value.

    Raises:
        UserError: its absolute path, which is stored with a run's settings, is not UTF-8.
    """
    path = _at_home(path)
    if path and os.path.exists(path):
        decodable(key, os.path.realpath(path))
    return path
