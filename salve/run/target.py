"""Import the classes that settings name, and check them. Nothing is called here."""

from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise UserError(f"{key}={target} names no class; write package.module.Class.")
    module, names = _deepest_module(key, target)
    found: Any = module
    for number, name in enumerate(names):
        if not hasattr(found, name):
            where = ".".join([module.__name__, *names[:number]])
            if number < len(names) - 1:
                raise UserError(f"{key}={target}: there is no module {where}.{name}.")
            close = get_close_matches(name, dir(found), 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"{key}={target}: the module {where} is there, but has no class {name}{hint}")
        found = getattr(found, name)
    if not isinstance(found, type):
        raise UserError(f"{key}={target} is a {type(found).__name__}, not a class.")
    if not issubclass(found, base):
        raise UserError(f"{key}={target} is a class, but does not derive from {base_name}.")
    return found


def _deepest_module(key: str, target: str) -> tuple[ModuleType, list[str]]:
    """Import the longest part of the path that is a module; return it with the rest of the path."""
    parts = target.split(".")
    module: ModuleType | None = None
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):  # this module, or its package
                if module is None:
                    raise UserError(
                        f"{key}={target}: there is no module {name}; is the folder that holds it on PYTHONPATH?"
                    ) from error
                return module, parts[depth - 1 :]
            raise _failed_inside(key, target, name, error) from error
        except Exception as error:  # an import runs the module's code, which may raise anything
            raise _failed_inside(key, target, name, error) from error
    assert module is not None
    return module, parts[-1:]


def _failed_inside(key: str, target: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"{key}={target}: the module {name} is there, but cannot be imported ({one_line(repr_of(error))})."
    )


def repr_of(error: BaseException) -> str:
    """An error's type and message: ``ModuleNotFoundError: No module named 'cv2'``."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def one_line(text: str) -> str:
    """Replace the line breaks in a library's error message, and drop its full stop."""
    return " ".join(text.split()).rstrip(".")
