# SPDX-License-Identifier: MIT
"""Axis names and the one error class for bad input.

Axes (docs/method.md): ``N`` images, ``M`` activation width at the site, ``d`` latents, ``C`` classes,
``L`` chosen latents, ``K`` strengths, ``H W`` pixels.
"""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from salve.axes import Activations as Activations
    from salve.axes import Contribution as Contribution
    from salve.axes import Images as Images
    from salve.axes import Labels as Labels
    from salve.axes import Latents as Latents
    from salve.axes import Logits as Logits
    from salve.axes import Maps as Maps


class UserError(ValueError):
    """Bad input. The message is a full sentence for the person who gave it: what is wrong, where, and the choices."""


class Diverged(UserError):
    """A training diverged. A search counts it as a bad trial, not as one that could not be tried."""


#: *train* fits, *select* chooses, *test* reports.
Split = Literal["train", "select", "test"]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # Python itself looks up such names
        raise AttributeError(f"module 'salve.types' has no attribute {name!r}")
    # Imported only here, because torch takes seconds to load.
    from salve import axes

    if name not in axes.__all__:
        raise AttributeError(f"module 'salve.types' has no attribute {name!r}")
    return getattr(axes, name)
