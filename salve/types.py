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
    """Input that cannot be worked with; the message is one sentence for the person who gave it."""


class Diverged(UserError):
    """A training whose result is nonsense: what a search should know as bad, rather than as not tried."""


Split = Literal["train", "select", "test"]
"""*train* fits; *select* chooses whatever is compared to be chosen; *test* reports, and chooses nothing."""


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # Python asks for such names by itself
        raise AttributeError(f"module 'salve.types' has no attribute {name!r}")
    # The axes' names need torch, which takes seconds to load; a refusal does not.
    from salve import axes

    if name not in axes.__all__:
        raise AttributeError(f"module 'salve.types' has no attribute {name!r}")
    return getattr(axes, name)
