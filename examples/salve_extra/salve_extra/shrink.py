"""An SAE variant: signed latents that shrink by a fixed amount, and are exactly zero below it."""

from typing import ClassVar

import torch
from torch import Tensor

from salve.sae import SAE
from salve.types import UserError


class Shrink(SAE):
    """``z = sign(π) max(0, |π| − θ)``, the soft threshold, with the L1 penalty of the base class.

    Args:
        threshold: ``θ ≥ 0``, in the unit of the training activations, whose mean square is one.
    """

    takes = ("threshold",)  # further arguments of the constructor: sae.args
    signed = True
    revived_by: ClassVar[str | None] = "resample"

    def __init__(
        self, width: int, dictionary_size: int, generator: torch.Generator | None = None, threshold: float = 0.1
    ) -> None:
        self.check(dictionary_size, threshold=threshold)
        super().__init__(width, dictionary_size, generator)
        self.threshold = float(threshold)

    @classmethod
    def check(cls, dictionary_size: int, threshold: float = 0.1, **others: object) -> None:
        """Called before any work."""
        super().check(dictionary_size, **others)
        if not threshold >= 0:
            raise UserError(f"sae.args.threshold={threshold} must not be negative.")

    def activate(self, pre: Tensor) -> Tensor:
        """``[N, d] → [N, d]``; no branch depends on values, so that several can be trained together."""
        return pre.sign() * (pre.abs() - self.threshold).relu()

    @torch.no_grad()
    def fold(self, scale: float) -> None:
        """After training, the SAE takes raw activations: all that has their unit grows, here the threshold."""
        super().fold(scale)
        self.threshold *= scale
