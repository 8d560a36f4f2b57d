# SPDX-License-Identifier: MIT
"""Measures of the user's own: functions of what a run's stages wrote, whose numbers join its ``metrics.json``."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from salve.named import named, one_line, repr_of
from salve.report.metrics import Metric, plain
from salve.results import Artifacts
from salve.types import UserError

#: What stands before the name of such a measure, which none of salve's own begins with.
OWN = "own_"

Measure = Callable[[Artifacts], Metric]


def own_measures(settings: Mapping[str, Any]) -> dict[str, Measure]:
    """Import the functions that ``measures`` names.

    Args:
        settings: by name, ``_target_``, the path of a function, and its arguments; None leaves one out.

    Raises:
        UserError: there is no such function, or it does not take an :class:`Artifacts` and these arguments.
    """
    found: dict[str, Measure] = {}
    for name, given in settings.items():
        if given is None:
            continue
        key, target = f"measures.{name}._target_", given["_target_"]
        function = named(key, target, "function")
        arguments = {argument: value for argument, value in given.items() if argument != "_target_"}
        if not callable(function):
            raise UserError(f"{key}={target} is a {type(function).__name__}, not a function.")
        try:
            inspect.signature(function).bind(Artifacts({}), **arguments)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{key}={target} cannot be called with a run's artifacts and the arguments in measures.{name} "
                f"({one_line(str(error))})."
            ) from error
        found[name] = partial(function, **arguments)
    return found


def own_metrics(settings: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, Metric]:
    """Measure a run.

    Args:
        settings: see :func:`own_measures`. folders: of the run's artifacts, by kind.

    Returns:
        By ``own_NAME``, a number; None for one that is not finite or that the function does not give.

    Raises:
        UserError: a function fails, or gives no number. What the stages made is kept.
    """
    artifacts, values = Artifacts(folders), dict[str, Metric]()
    for name, measure in own_measures(settings).items():
        key = f"measures.{name}._target_={settings[name]['_target_']}"
        try:
            value: Any = measure(artifacts)
        except Exception as error:  # the user's own code may raise anything
            raise UserError(
                f"{key} failed ({one_line(repr_of(error))}); the same command goes on from what the stages made."
            ) from error
        if hasattr(value, "item"):  # of NumPy or torch
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"{key} gave a {type(value).__name__}, not a number.")
        values[f"{OWN}{name}"] = plain(value)
    return values
