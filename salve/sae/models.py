"""The variants by name."""

from typing import Any

import torch

from salve.sae.base import SAE, Pass, normalise_columns
from salve.sae.penalised import Gated, JumpReLU, LinearL1, ReluL1
from salve.sae.topk import BatchTopK, Matryoshka, TopK
from salve.types import UserError

__all__ = [
    "SAE",
    "VARIANTS",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "LinearL1",
    "Matryoshka",
    "Pass",
    "ReluL1",
    "TopK",
    "make_sae",
    "normalise_columns",
]

VARIANTS: dict[str, type[SAE]] = {
    kind.variant: kind for kind in (LinearL1, ReluL1, TopK, BatchTopK, JumpReLU, Gated, Matryoshka)
}


def make_sae(
    variant: str, width: int, dictionary_size: int, generator: torch.Generator | None = None, **settings: Any
) -> SAE:
    """An untrained SAE of a variant by name.

    Raises:
        UserError: unknown variant, settings that it does not have, or settings outside their range.
    """
    if variant not in VARIANTS:
        raise UserError(f"sae.variant={variant} is unknown; the variants are {', '.join(VARIANTS)}.")
    kind = VARIANTS[variant]
    if unknown := sorted(settings.keys() - set(kind.takes)):
        has = ", ".join(kind.takes) or "none"
        raise UserError(f"sae.variant={variant} has no setting {', '.join(unknown)}; its settings are: {has}.")
    if dictionary_size < 1:
        raise UserError(f"sae.dictionary_size={dictionary_size} must be at least 1.")
    return kind(width, dictionary_size, generator, **settings)
