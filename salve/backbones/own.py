# SPDX-License-Identifier: MIT
"""Networks of the user's own: a class or function that ``backbone._target_`` names."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from salve.files import digest_of, digest_of_file
from salve.named import named, one_line, repr_of
from salve.types import UserError

KEY = "backbone._target_"
#: The argument that says how many outputs a network shall have.
CLASSES = "num_classes"


def takes_classes(target: str) -> bool:
    """Whether the class or function has an argument ``num_classes``."""
    return CLASSES in _parameters(_maker(target))


def build(target: str, classes: int | None, args: Mapping[str, Any]) -> nn.Module:
    """Make the network.

    Args:
        target: ``package.module.name`` of a class or function. args: its arguments.
        classes: passed as ``num_classes``, if it has such an argument and ``args`` do not set it.

    Raises:
        UserError: there is no such class or function, or it gives no network, or one that cannot be worked with.
    """
    make = _maker(target)
    given = dict(args)
    if classes is not None and CLASSES in _parameters(make):
        given.setdefault(CLASSES, classes)
    try:
        model = make(**given)
    except Exception as error:  # the user's own code may raise anything
        with_args = f" with backbone.args={given}" if given else ""
        raise UserError(f"{KEY}={target} cannot be made{with_args} ({one_line(repr_of(error))}).") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{KEY}={target} gives a {type(model).__name__}, not a torch.nn.Module.")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise UserError(
            f"{KEY}={target} gives a network whose {lazy[0]} has no shape yet; run it once on an image before you "
            "return it."
        )
    return model.cpu().float()


def code_of(model: nn.Module, target: str) -> str:
    """A digest of the files that hold the code of a network: of its modules, and of what makes it."""
    libraries = ("torch", "torchvision", "timm", "transformers")
    modules = {type(module).__module__ for module in model.modules()} | {_maker(target).__module__}
    own = sorted(name for name in modules if name.partition(".")[0] not in libraries)
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in own}
    return digest_of({name: digest_of_file(Path(file)) for name, file in files.items() if file})


def _maker(target: str) -> Any:
    found = named(KEY, target, "class or function")
    if not callable(found) or isinstance(found, nn.Module):
        raise UserError(f"{KEY}={target} is a {type(found).__name__}, not a class or function that makes a network.")
    return found


def _parameters(make: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # of what is written in C
        return {}
