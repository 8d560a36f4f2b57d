"""All variants by name."""

from typing import Any

import torch

from salve.sae.base import SAE, SAEOutput
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
    "ReluL1",
    "SAEOutput",
    "TopK",
    "make_sae",
]

VARIANTS: dict[str, type[SAE]] = {
    kind.variant: kind for kind in (LinearL1, ReluL1, TopK, BatchTopK, JumpReLU, Gated, Matryoshka)
}


def make_sae(
    variant: str, width: int, dictionary_size: int, generator: torch.Generator | None = None, **settings: Any
) -> SAE:
    """Make an untrained SAE.

    Args:
        variant: one of :data:`VARIANTS`.
        width: ``M``. dictionary_size: ``d``.
        generator: draws the initial decoder.
        settings: of the variant, such as ``k``.

    Raises:
        UserError: the variant is unknown, does not have a setting, or a setting is out of range.
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
