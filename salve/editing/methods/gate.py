# SPDX-License-Identifier: MIT
"""The gate (SALVE): scale the site's channels down by how much a latent's decoder column uses them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from salve.backbones.cut import Cut
from salve.edit_settings import Channels, Mode, Scale
from salve.editing.gating import gate, logits_by_strength
from salve.editing.methods.base import FittedEdit, Fitting, Target
from salve.editing.methods.change import Affine
from salve.editing.methods.directions import AlongDirection, directions


@dataclass(frozen=True, eq=False)
class GateEdit(FittedEdit):
    """Gates of a set of latents, ``a' = a ⊙ Π max(0, 1 − α |c|)``, or with ``1 + α |c|`` for ``enhance``.

    Attributes:
        contributions: ``[S, M]``. mode: ``suppress`` or ``enhance``.
    """

    contributions: Float[Tensor, "S M"] = field(default_factory=lambda: torch.empty(0, 0))
    mode: Mode = "suppress"

    @classmethod
    def of(cls, cut: Cut, contributions: Float[Tensor, "S M"], mode: Mode = "suppress") -> "GateEdit":
        """The edit of a network."""
        return cls(
            lambda alpha: Affine(gate=gate(contributions, alpha, mode)).change(cut.model, cut.site),
            contributions=contributions,
            mode=mode,
        )

    def logits_by_strength(
        self, cut: Cut, rows: Float[Tensor, "N M"], alphas: Sequence[float]
    ) -> Iterator[tuple[int, Float[Tensor, "N C"]]]:
        """See the base class; all strengths share two products (docs/method.md, Law 2)."""
        assert cut.linear is not None, "only the last site has a linear tail"
        strengths = torch.tensor(list(alphas), dtype=cut.linear.weight.dtype)
        yield from logits_by_strength(cut.linear, rows, self.contributions, strengths, self.mode)


@dataclass(frozen=True)
class Gate(AlongDirection):
    """The permanent gate of Flovik 2025 (docs/method.md, *Control*).

    Attributes:
        scale, channels: see :func:`salve.editing.contribution`. direction: see :data:`.directions.Direction`.
    """

    scale: Scale = "unit"
    channels: Channels = "all"

    source: ClassVar[str] = "Flovik 2025 (arXiv 2512.15938)"
    full_size: ClassVar[str] = "a channel that the latent alone makes up is closed"

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        rows = directions(fitting, target, self.direction, "gate")  # [S, M], with signs
        if self.channels == "aligned":
            rows = rows.clamp_min(0)
        if self.scale == "max":
            rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        return GateEdit.of(fitting.cut, rows)
