"""Reports and sweeps without their drawings, which take most of their time."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import getmembers, isfunction
from pathlib import Path
from typing import Any, NoReturn

import pytest


class _NotDrawn(Exception):
    """Raised where a function that has found something to draw begins to draw it."""


def _without_drawing(draw: Callable[..., Any]) -> Callable[..., Any]:
    """A function that gives None where another does, and else something in the place of a figure."""

    @wraps(draw)
    def found(*args: Any, **kwargs: Any) -> Any:
        try:
            return draw(*args, **kwargs)
        except _NotDrawn:
            return "not drawn"

    return found


def _begin(*_: Any, **__: Any) -> NoReturn:
    raise _NotDrawn


def _dot(_: object, folder: Path, name: str) -> tuple[int, int]:
    from PIL import Image

    Image.new("L", (1, 1)).save(folder / f"{name}.png")
    (folder / f"{name}.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    return 1, 1


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """From now on, let reports and sweeps have a dot for every drawing."""
    for name in ("control", "diagnose", "discover", "training", "validate"):
        module = import_module(f"salve.report.figures.{name}")
        for function, draw in getmembers(module, isfunction):
            if "Figure" in str(draw.__annotations__.get("return")):
                patch.setattr(module, function, _without_drawing(draw))
        patch.setattr(module, "new_figure", _begin)
    patch.setattr("salve.report.blocks.save_figure", _dot)
    patch.setattr("salve.sweep.summary.save_figure", _dot)
