# SPDX-License-Identifier: MIT
"""All variants by name, and the user's own by their paths."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from salve.files import digest_of_file
from salve.sae.base import SAE, SAEOutput
from salve.sae.penalised import Gated, JumpReLU, LinearL1, ReluL1
from salve.sae.topk import BatchTopK, Matryoshka, TopK
from salve.types import UserError
from salve.variants import own_variant

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
        variant: one of :data:`VARIANTS`, or ``package.module.Class`` of the user's own, which is imported.
        width: ``M``. dictionary_size: ``d``.
        generator: draws the initial decoder.
        settings: of the variant, such as ``k``.

    Raises:
        UserError: the variant is unknown, does not have a setting, or a setting is out of range.
    """
    kind: type[SAE] = VARIANTS[variant] if variant in VARIANTS else own_variant(variant)
    if unknown := sorted(settings.keys() - set(kind.takes)):
        has = ", ".join(kind.takes) or "none"
        raise UserError(f"sae.variant={variant} has no setting {', '.join(unknown)}; its settings are: {has}.")
    if dictionary_size < 1:
        raise UserError(f"sae.dictionary_size={dictionary_size} must be at least 1.")
    return kind(width, dictionary_size, generator, **settings)


def code_of(variant: str) -> dict[str, str]:
    """For the key of an SAE: a digest of the file with the code of the user's own variant; empty for salve's own."""
    if variant in VARIANTS:
        return {}
    file = getattr(sys.modules.get(own_variant(variant).__module__), "__file__", None)
    return {"code": digest_of_file(Path(file))} if file else {}


def is_imported(variant: str) -> bool:
    """Whether a variant is one of salve's, or a class that this process has imported: a file alone imports none."""
    return variant in VARIANTS or any(kind.variant == variant for kind in _below(SAE))


def _below(kind: type[SAE]) -> Iterator[type[SAE]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)
