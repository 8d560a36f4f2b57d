"""Axis names and the one error class for bad input.

Axes (METHOD's symbols): ``N`` images, ``M`` activation width at the site, ``d`` latents, ``C`` classes,
``L`` chosen latents, ``K`` strengths, ``H W`` pixels.
"""

from typing import Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor


class UserError(ValueError):
    """Input that cannot be worked with; the message is one sentence for the person who gave it."""


Split = Literal["train", "select", "test"]
"""*train* fits; *select* chooses whatever is compared to be chosen; *test* reports, and chooses nothing."""

Images: TypeAlias = Float[Tensor, "N 3 H W"]
Maps: TypeAlias = Float[Tensor, "N L H W"]
Activations: TypeAlias = Float[Tensor, "N M"]
Latents: TypeAlias = Float[Tensor, "N d"]
Logits: TypeAlias = Float[Tensor, "N C"]
Labels: TypeAlias = Int[Tensor, " N"]
Contribution: TypeAlias = Float[Tensor, " M"]
