# SPDX-License-Identifier: MIT
"""Import the classes that settings name, and check them. Nothing is called here."""

from typing import TYPE_CHECKING, Any

from salve.named import named
from salve.types import UserError

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback

    from salve.data.base import ImageData


def data_class(key: str, target: Any) -> "type[ImageData]":
    """The data class that a ``_target_`` names; see :func:`named_class`."""
    from salve.data.base import ImageData  # imports torch and Lightning

    found: type[ImageData] = named_class(key, target, ImageData, "salve.data.ImageData")
    return found


def callback_class(key: str, target: Any) -> "type[Callback]":
    """The class of callbacks that a ``_target_`` names; see :func:`named_class`.

    Raises:
        UserError: also for a class of checkpoints or progress bars, which salve makes itself.
    """
    from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar

    found: type[Callback] = named_class(key, target, Callback, "pytorch_lightning.callbacks.Callback")
    if issubclass(found, Checkpoint):
        raise UserError(f"{key}={target}: salve keeps the best and the last epoch itself, and resumes from them.")
    if issubclass(found, ProgressBar):
        raise UserError(f"{key}={target}: salve shows a bar on a terminal, and lines in a log, itself.")
    return found


def named_class(key: str, target: Any, base: Any, base_name: str) -> Any:
    """Import the class that a ``_target_`` names.

    Args:
        key: the setting, for the message.
        target: its value, ``package.module.Class``.
        base: what the class must derive from.
        base_name: where a user finds ``base``.

    Raises:
        UserError: a module or the class is missing, an import inside a module failed, or what is found does not derive
            from ``base``.
    """
    found = named(key, target)
    if not isinstance(found, type):
        raise UserError(f"{key}={target} is a {type(found).__name__}, not a class.")
    if not issubclass(found, base):
        raise UserError(f"{key}={target} is a class, but does not derive from {base_name}.")
    return found
