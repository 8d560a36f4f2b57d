# SPDX-License-Identifier: MIT
"""Import what settings name as ``package.module.name``. Nothing is called here."""

from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from salve.types import UserError


def named(key: str, target: Any, kind: str = "class") -> Any:
    """Import what a ``_target_`` names.

    Args:
        key: the setting, for the message.
        target: its value, ``package.module.Class``.
        kind: what it should name, for the message.

    Raises:
        UserError: a module or what is in it is missing, or an import inside a module failed.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise UserError(
            f"{key}={target} names no {kind}; write package.module.{'Class' if kind == 'class' else 'name'}."
        )
    module, names = _deepest_module(key, target)
    found: Any = module
    for number, name in enumerate(names):
        if not hasattr(found, name):
            where = ".".join([module.__name__, *names[:number]])
            if number < len(names) - 1:
                raise UserError(f"{key}={target}: there is no module {where}.{name}.")
            close = get_close_matches(name, dir(found), 1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"{key}={target}: the module {where} is there, but has no {kind} {name}{hint}")
        found = getattr(found, name)
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
