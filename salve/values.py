# SPDX-License-Identifier: MIT
"""The values that a setting may have, said in the annotation of its field: ``epochs: Annotated[int, ABOVE_ZERO]``."""

import math
from dataclasses import dataclass, is_dataclass
from typing import Any, get_type_hints

from salve.types import UserError

TRANSFORMERS, OWN = "transformers", "own"
#: Where networks come from, with the value of ``backbone.weights`` that stands for the weights that they come with.
PUBLISHED = {"torchvision": "imagenet", "timm": "imagenet", TRANSFORMERS: "pretrained", OWN: "pretrained"}
LIBRARIES = tuple(PUBLISHED)
#: The largest float32. Everything is computed in it, and a larger setting would be infinite.
LARGEST = 3.4028234663852886e38


class OneOf:
    """The values that a setting may have; for a list, those that each entry may have.

    Args:
        values: the choices. or_none: whether a list may be empty.
        own: whether ``package.module.Class``, a class of the user's own, is a choice, too.
    """

    def __init__(self, *values: Any, or_none: bool = False, own: bool = False) -> None:
        self.values, self.or_none, self.own = values, or_none, own


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    Attributes:
        above: the number must be larger than this. least, most: it must lie between these, both included.
    """

    above: float = -math.inf
    least: float = -math.inf
    most: float = LARGEST

    def refusal(self, value: Any) -> str:
        """What is wrong with a value, as the end of a sentence; empty if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return "must be a number"
        if not value > self.above:
            return f"must be above {self.above:g}"
        if not value >= self.least:
            return "must not be negative" if self.least == 0 else f"must be at least {self.least:g}"
        if not value <= self.most:
            float32 = self.most == LARGEST
            return f"must be at most {f'{LARGEST:.2g}, the largest float32' if float32 else f'{self.most:.10g}'}"
        return ""


@dataclass(frozen=True)
class Unit:
    """What a number counts or measures, for the list of settings (docs/settings.md).

    Attributes:
        name: such as ``pixels`` or ``images of a class``; of a share, what it is a share of: ``of the steps``.
    """

    name: str


@dataclass(frozen=True)
class Takes:
    """The forms that a setting may have whose type does not tell, for the list of settings.

    Attributes:
        form: such as ``a path, or a list of paths``.
    """

    form: str


ABOVE_ZERO = Range(above=0)
NOT_NEGATIVE = Range(least=0)
SHARE = Range(least=0, most=1)
SEED = Range(least=0, most=2**32 - 1)


def check_values(settings: Any, path: str = "") -> None:
    """Check every setting of a dataclass, and of the dataclasses in it, against the annotation of its field.

    Args:
        settings: the dataclass. path: where it stands, such as ``sae.``, for the message.

    Raises:
        UserError: a value is none of the choices, or outside the range.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        key, value = f"{path}{name}", getattr(settings, name)
        if is_dataclass(value):
            check_values(value, f"{key}.")
        for rule in getattr(hint, "__metadata__", ()):
            if isinstance(rule, OneOf):
                if (value != [] or not rule.or_none) and not (rule.own and "." in str(value)):
                    names = [*map(_written, rule.values), *(["package.module.Class"] if rule.own else [])]
                    _check_choice(key, value, names, rule.values)
            elif isinstance(rule, Range) and value is not None and (why := rule.refusal(value)):
                raise UserError(f"{key}={value} {why}.")


def _written(choice: Any) -> str:
    """A choice as one writes it in YAML."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _check_choice(key: str, value: Any, names: list[str], choices: tuple[Any, ...]) -> None:
    if value == []:
        raise UserError(f"{key} is empty; choose from {', '.join(names)}.")
    for one in value if isinstance(value, list) else [value]:
        if one is not None and one not in choices:
            raise UserError(f"{key} has {one}, which is none of {', '.join(names)}.")
