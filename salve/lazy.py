# SPDX-License-Identifier: MIT
"""Names of a package that are imported from its modules when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from sys import modules as loaded
from typing import Any


def lazy(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package whose modules take seconds to import.

    Args:
        package: its ``__name__``.
        modules: for each public name, the module of the package that defines it.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(loaded[package]), *modules})

    return find, names
