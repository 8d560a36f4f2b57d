# SPDX-License-Identifier: MIT
"""Tensor types with named axes; import them from :mod:`salve.types`."""

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Activations", "Contribution", "Images", "Labels", "Latents", "Logits", "Maps"]

Images: TypeAlias = Float[Tensor, "N 3 H W"]
Maps: TypeAlias = Float[Tensor, "N L H W"]
Activations: TypeAlias = Float[Tensor, "N M"]
Latents: TypeAlias = Float[Tensor, "N d"]
Logits: TypeAlias = Float[Tensor, "N C"]
Labels: TypeAlias = Int[Tensor, " N"]
Contribution: TypeAlias = Float[Tensor, " M"]
