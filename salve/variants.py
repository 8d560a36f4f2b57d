# SPDX-License-Identifier: MIT
"""The SAE variants by name: the settings that each takes, their ranges, and how its dead latents can be revived.

The classes are in :mod:`salve.sae`. This table does without torch, so that a wrong setting is refused at once. A class
of the user's own, named by its path, says the same of itself; looking at it imports the user's module, and so torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from salve.named import named
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

    def check(self, variant: str, dictionary_size: int, **settings: Any) -> None:
        """Raises UserError if the dictionary's size or a setting is outside its range."""
        if dictionary_size < 1:
            raise UserError(f"sae.dictionary_size={dictionary_size} must be at least 1.")
        for check in self.checks:
            check(variant, dictionary_size, **settings)


def traits_of(variant: str) -> Traits:
    """The traits of a variant: from the table, or of a class of the user's own.

    Raises:
        UserError: see :func:`own_variant`.
    """
    if variant in TRAITS:
        return TRAITS[variant]
    kind = own_variant(variant)
    return Traits(kind.takes, kind.revived_by, (lambda _, size, **given: kind.check(size, **given),), kind.signed)


def own_variant(variant: str) -> Any:
    """Import the user's own subclass of :class:`salve.sae.SAE`.

    Args:
        variant: ``package.module.Class``.

    Raises:
        UserError: it is neither the name of a variant nor the path of such a class.
    """
    if "." not in str(variant):
        raise UserError(
            f"sae.variant has {variant}, which is none of {', '.join(TRAITS)}, and no package.module.Class."
        )
    found = named("sae.variant", variant)
    base = ("salve.sae.base", "SAE")  # not imported: the module lies above this one
    if not isinstance(found, type) or base not in [(one.__module__, one.__qualname__) for one in found.__mro__[1:]]:
        raise UserError(f"sae.variant={variant} is no subclass of salve.sae.SAE.")
    return found


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
