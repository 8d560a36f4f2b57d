# SPDX-License-Identifier: MIT
"""Edits that need the SAE whenever the network runs, so that no weights can hold them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Change
from salve.sae import SAE
from salve.sae.positions import at_positions

_WHY = "it needs the SAE whenever the network runs"


class _AtInference(Method):
    source: ClassVar[str]
    permanent: ClassVar[bool] = False

    @property
    def needs_sae(self) -> bool:
        """See :class:`Method`."""
        return True


def _latents(sae: SAE, activations: Tensor, chosen: list[int]) -> Tensor:
    """The chosen latents ``[N, P, S]`` of activations ``[N, P, M]``."""
    return at_positions(lambda rows: sae.encode(rows)[:, chosen], activations)


def _changed(sae: SAE, chosen: list[int], of: Callable[[Tensor], Tensor]) -> Change:
    """A change of latents ``z → z + of(z)``; what the SAE does not explain of an activation stays."""

    @torch.no_grad()
    def activations(rows: Tensor) -> Tensor:
        here = sae.to(rows.device)
        return rows + of(_latents(here, rows, chosen)) @ here.decoder[:, chosen].T.to(rows)

    return Change(activations, None, _WHY)


@dataclass(frozen=True)
class Mute(_AtInference):
    """Weaken the target's latents, ``a' = a − α Σ_l z_l(a) D_l``; at α = 1 they are zero-ablated."""

    source: ClassVar[str] = "Cunningham et al. 2023 (arXiv 2309.08600), zero-ablation of latents"
    full_size: ClassVar[str] = "the latents are zero"

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        sae, chosen = fitting.known_sae("mute", target), list(target.latents)
        return FittedEdit(lambda alpha: _changed(sae, chosen, lambda latents: -alpha * latents))


@dataclass(frozen=True)
class Clamp(_AtInference):
    """Hold the target's latents at ``−α z̄`` wherever they fire, with ``z̄`` their mean where they fire for the class.

    Below α = 1 a part of each image's own latent is left: ``z' = −α z̄ + (1 − α) z``.
    """

    source: ClassVar[str] = "Templeton et al. 2024, Scaling Monosemanticity"
    full_size: ClassVar[str] = "the latents are held at the negative of their class mean"

    @torch.no_grad()
    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        sae, chosen = fitting.known_sae("clamp", target), list(target.latents)
        own = torch.isin(fitting.labels, torch.tensor(target.classes))
        total, fired = torch.zeros(len(chosen)), torch.zeros(len(chosen))
        for block in fitting.rows[own].split(2**13):
            latents = sae.encode(block)[:, chosen]
            total, fired = total + latents.sum(dim=0), fired + (latents != 0).sum(dim=0)
        level = total / fired.clamp_min(1)

        def at(alpha: float) -> Change:
            def step(latents: Tensor) -> Tensor:
                held = -alpha * level.to(latents) - min(1.0, alpha) * latents
                return torch.where(latents != 0, held, 0)

            return _changed(sae, chosen, step)

        return FittedEdit(at)


@dataclass(frozen=True)
class Reconstruction(_AtInference):
    """A control: ``a' = a + min(1, α) (â − a)``, the SAE's reconstruction, with all latents as they are."""

    source: ClassVar[str] = "control: what the SAE alone costs"
    full_size: ClassVar[str] = "activations are the SAE's reconstructions"

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        sae = fitting.known_sae("reconstruction")

        def at(alpha: float) -> Change:
            @torch.no_grad()
            def activations(rows: Tensor) -> Tensor:
                here = sae.to(rows.device)
                return rows + min(1.0, alpha) * (at_positions(lambda one: here(one)[0], rows) - rows)

            return Change(activations, None, _WHY)

        return FittedEdit(at, strongest=1.0)
