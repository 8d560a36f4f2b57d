# SPDX-License-Identifier: MIT
"""Tails: the part of a network behind a site, which turns activations into logits (docs/method.md, *Tail*)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Tail(Protocol):
    """What lies behind a site: activations to logits ``[N, C]``."""

    def __call__(self, activations: Tensor, /) -> Float[Tensor, "N C"]: ...


@dataclass(frozen=True, eq=False)
class LinearTail:
    """The tail of the last site, one linear layer: ``y = W a + b``.

    Attributes:
        weight: ``[C, M]``. bias: ``[C]``.
    """

    weight: Float[Tensor, "C M"]
    bias: Float[Tensor, " C"]

    def to(self, like: Tensor) -> "LinearTail":
        """The same tail on the device and in the dtype of a tensor."""
        return LinearTail(self.weight.to(like), self.bias.to(like))

    def __len__(self) -> int:
        """``C``, the number of outputs."""
        return len(self.weight)

    def __call__(self, activations: Tensor) -> Float[Tensor, "N C"]:
        """The logits of activations ``[N, M]``, or ``[N, 1, M]``."""
        return activations.reshape(-1, self.weight.shape[1]) @ self.weight.T + self.bias
