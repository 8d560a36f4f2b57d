"""What settings may name, whoever wrote them: texts that can be written down, places, and one class."""

import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from salve.types import UserError

#: Arguments of the libraries' constructors that say where weights come from, which ``backbone.weights`` alone says:
#: what it names is never unpickled.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")


def below(key: str, name: str) -> str:
    """A name that is used as a path under ``output_dir``, which it must not lead out of.

    Args:
        key: of the setting, for the message. name: its value.

    Raises:
        UserError: an absolute path, or one with a part ``..``.
    """
    parts = str(name).replace("\\", "/").split("/")
    if Path(str(name)).is_absolute() or not parts[0] or ".." in parts:
        raise UserError(f"{key}={name} must be a name, or a path below output_dir: neither absolute nor with .. in it.")
    return decodable(key, str(name))


def decodable(key: str, text: str) -> str:
    """Raises UserError for a text that is not UTF-8: one can compute with it, but not write it into results."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no text, as the system hands them over
        shown = text.encode(errors="backslashreplace").decode()
        raise UserError(f"{key}='{shown}' is not UTF-8, and results could not be written: rename it.") from None
    return text


def refuse_undecodable(value: Any, key: str = "") -> None:
    """:func:`decodable` for all settings below ``key``."""
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
    """Raises UserError if data names no class, or anything below it does: that is passed on as plain values."""
    settings = asdict(data) if is_dataclass(data) else data  # type: ignore[arg-type]
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise UserError("data says nothing of data._target_, the class that reads the images.")
    for name, value in settings.items():
        _refuse_class_in(value, f"data.{name}")


def _refuse_class_in(value: Any, key: str) -> None:
    for name, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if name == "_target_":
            raise UserError(
                f"{key}._target_={part}: only data itself names a class, and its settings are plain values."
            )
        _refuse_class_in(part, f"{key}.{name}")


def check_args(args: dict[str, Any]) -> None:
    """Raises UserError for arguments of a network that are no plain values, or name files to load."""
    for name in SOURCES:
        if name in args:
            raise UserError(
                f"backbone.args.{name} cannot be set: backbone.weights says where the weights come from (random, "
                "imagenet or a file), and backbone.args how the network is built."
            )
    _refuse_class_in(args, "backbone.args")


def _at_home(path: str) -> str:
    """A path whose ``~`` is the user's home: a shell leaves it in ``output_dir=~/x``, and libraries differ in it."""
    return os.path.expanduser(path)


def results_folder(path: str) -> str:
    """``output_dir`` with ``~`` expanded.

    Raises:
        UserError: its whole path is not UTF-8, be it only the folder that it is relative to.
    """
    decodable("output_dir", os.path.abspath(_at_home(path)))
    return _at_home(path)


def input_path(key: str, path: str) -> str:
    """What is read, with ``~`` expanded; its whole path, which a run's settings are kept with, must be UTF-8.

    Raises:
        UserError: it is not.
    """
    path = _at_home(path)
    if path and os.path.exists(path):
        decodable(key, os.path.realpath(path))
    return path
