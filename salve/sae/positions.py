# SPDX-License-Identifier: MIT
"""Latents at the positions of a map, and of the whole image."""

from collections.abc import Callable
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from salve.settings import Pool
from salve.types import UserError


def at_positions(function: Callable[[Tensor], Tensor], rows: Float[Tensor, "N P K"]) -> Float[Tensor, "N P d"]:
    """Apply a function of rows, such as :meth:`salve.sae.SAE.encode`, at every position."""
    return function(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])


def pooled(latents: Float[Tensor, "N P d"], pool: str) -> Float[Tensor, "N d"]:
    """An image's latents from those at its positions: their ``mean``, or the ``max`` of each."""
    if pool not in get_args(Pool):
        raise UserError(f"pool={pool} must be one of {', '.join(get_args(Pool))}.")
    return latents.mean(dim=1) if pool == "mean" else latents.amax(dim=1)
