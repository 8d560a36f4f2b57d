"""The SAE variants by name: the settings that each takes, their ranges, and how its dead latents can be revived.

The classes are in :mod:`salve.sae`. This table does without torch, so that a wrong setting is refused at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from salve.types import UserError


@dataclass(frozen=True)
class Traits:
    """The properties of a variant that settings are checked against.

    Attributes:
        takes: names of the settings that its constructor takes besides the sizes.
        revived_by: how dead latents can be revived: ``resample``, ``auxk`` or None (salve.sae.revival).
        checks: functions of the variant's name, the dictionary's size and the settings that raise UserError.
        signed: whether latents take both signs.
    """

    takes: tuple[str, ...] = ()
    revived_by: str | None = None
    checks: tuple[Callable[..., None], ...] = ()
    signed: bool = False


def check_variant(variant: str, dictionary_size: int, **settings: Any) -> None:
    """Check a dictionary's size and the settings that a variant takes.

    Raises:
        UserError: one is missing or outside its range.
    """
    if dictionary_size < 1:
        raise UserError(f"sae.dictionary_size={dictionary_size} must be at least 1.")
    for check in TRAITS[variant].checks:
        check(variant, dictionary_size, **settings)


def _check_bandwidth(variant: str, dictionary_size: int, bandwidth: float | None = None, **_: Any) -> None:
    if bandwidth is None or not 0 < bandwidth < math.inf:
        raise UserError(f"sae.variant={variant} needs sae.bandwidth above 0, not {bandwidth}.")


def _check_k(variant: str, dictionary_size: int, k: int | None = None, **_: Any) -> None:
    if not 1 <= (k or 0) <= dictionary_size:
        raise UserError(
            f"sae.variant={variant} needs sae.k between 1 and sae.dictionary_size={dictionary_size}, not {k}."
        )


def _check_nested(
    variant: str, dictionary_size: int, prefixes: Sequence[float] = (1,), base: str | None = "batch_topk", **_: Any
) -> None:
    if not prefixes or prefixes[-1] != 1 or not all(a < b for a, b in pairwise((0, *prefixes))):
        raise UserError(
            f"sae.variant={variant} needs sae.prefixes that increase from above 0 to 1, not {list(prefixes)}."
        )
    if base not in ("topk", "batch_topk"):
        raise UserError(f"sae.base={base} must be batch_topk or topk.")


TRAITS = {
    "linear_l1": Traits(revived_by="resample", signed=True),
    "relu_l1": Traits(revived_by="resample"),
    "topk": Traits(("k",), "auxk", (_check_k,)),
    "batch_topk": Traits(("k",), "auxk", (_check_k,)),
    "jumprelu": Traits(("bandwidth",), checks=(_check_bandwidth,)),
    "gated": Traits(revived_by="resample"),
    "matryoshka": Traits(("k", "prefixes", "base"), "auxk", (_check_k, _check_nested)),
}
