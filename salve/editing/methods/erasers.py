# SPDX-License-Identifier: MIT
"""Erasers: take what linear readers can tell of a class, or of latents, from every activation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Affine, Change
from salve.types import UserError


@dataclass(frozen=True)
class INLP(Method):
    """Iterative null-space projection, ``a' = a − α U Uᵀ a``, with an orthonormal basis ``U`` of classifiers.

    Each step fits a linear classifier of the target against the rest to what the earlier steps have left, and projects
    its direction out. The classifier is least squares on the labels (ridge regression, as good as a linear discriminant
    here), since it follows from moments that all targets share. Permanent as ``W (I − α U Uᵀ)``. At a map, rows are
    positions.

    Attributes:
        steps: how many classifiers at most; fewer where nothing is left to tell, or where the site has fewer channels.
        ridge: as a share of a channel's mean variance.
    """

    steps: int = 10
    ridge: float = 1e-4

    source: ClassVar[str] = "Ravfogel et al. 2020 (arXiv 2004.07667)"
    full_size: ClassVar[str] = "the directions of all classifiers are projected out"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps={self.steps} of inlp must be 1 or more.")
        if not self.ridge > 0:
            raise UserError(f"ridge={self.ridge:g} of inlp must be above 0.")

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        basis = self.basis(fitting, target)

        def at(alpha: float) -> Change:
            return Affine(left=alpha * basis, right=basis).change(fitting.cut.model, fitting.cut.site)

        return FittedEdit(at)

    def basis(self, fitting: Fitting, target: Target) -> Float[Tensor, "M r"]:
        """``U``, float64, one column for each step."""
        across, covariance = fitting.cross_covariance(target), fitting.covariance
        ridge = self.ridge * covariance.diagonal().mean() * torch.eye(len(across), dtype=torch.float64)
        found = torch.empty(len(across), 0, dtype=torch.float64)
        for _ in range(min(self.steps, len(across) - 1)):
            left = covariance - found @ (found.T @ covariance)
            left = left - (left @ found) @ found.T  # P Σ P
            told = across - found @ (found.T @ across)
            if told.norm() <= 1e-9 * across.norm():
                break
            direction = torch.cholesky_solve(told[:, None], torch.linalg.cholesky(left + ridge))[:, 0]
            direction = F.normalize(direction - found @ (found.T @ direction), dim=0)  # again, for rounding
            found = torch.cat([found, direction[:, None]], dim=1)
        return found


@dataclass(frozen=True)
class LEACE(Method):
    """The least change of the activations after which no linear classifier can tell the class from the rest.

    ``a' = a − α Σ^½ P Σ^(−½) (a − μ)``, where ``P`` projects on ``Σ^(−½) σ`` and ``σ`` is the covariance of the
    activations with the label. For one label this is ``a' = a − α σ rᵀ (a − μ)`` with ``r = Σ⁻¹σ / (σᵀ Σ⁻¹ σ)``: at
    α = 1 the covariance with the label is 0, with any ridge. No bound on the variance is added. Permanent as
    ``W (I − α σ rᵀ)`` and ``b + α W σ rᵀμ``; it has no permanent form at a convolution that pads, or without a bias.
    At a map, rows are positions.

    Attributes:
        ridge: ``ρ`` of ``Σ + ρ I`` in place of ``Σ``, as a share of a channel's mean variance; 0 is the authors' edit.
            Where rows are few for the width of the site, ``Σ⁻¹`` is mostly noise, and a ridge finds a direction that
            holds on other images, too. The change is then no longer the least one.
    """

    ridge: float = 0.0

    source: ClassVar[str] = "Belrose et al. 2023 (arXiv 2306.03819)"
    full_size: ClassVar[str] = "no linear classifier can tell the class on train activations"

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise UserError(f"ridge={self.ridge:g} of leace must be 0 or more.")

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        across = fitting.cross_covariance(target)
        solved = self._solved(fitting, across)
        explained = across @ solved
        if not float(explained) > 1e-12:
            raise UserError(
                f"The site {fitting.cut.site.name} tells nothing of {target.name}, so nothing can be erased."
            )
        row = solved / explained
        level = row @ fitting.mean

        def at(alpha: float) -> Change:
            affine = Affine(left=alpha * across[:, None], right=row[:, None], shift=alpha * level * across)
            return affine.change(fitting.cut.model, fitting.cut.site)

        return FittedEdit(at)

    def _solved(self, fitting: Fitting, across: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
        """``(Σ + ρ I)⁻¹ σ``, float64."""
        if not self.ridge:
            return fitting.inverse_covariance @ across
        return _solved(fitting.covariance, self.ridge, across[:, None])[:, 0]


@dataclass(frozen=True)
class LatentEraser(Method):
    """The least change of the activations after which none of the latents covaries with them within classes (ours).

    ``a' = a − α S (Sᵀ Σ⁻¹ S)⁻¹ Sᵀ Σ⁻¹ (a − μ)``: LEACE with latents in place of labels. ``S`` ``[M, L]`` is the
    covariance of activations with the target's latents, and ``Σ`` that of activations, both about the class's mean. A
    gate subtracts a latent where the encoder sees it; this takes away all that a linear reader could still tell of it.
    Within classes, since a class and its shortcut come together, and what makes the class must stay. It needs the SAE
    to be fitted, and no label but the class. Permanent as LEACE is. At a map, rows are positions.

    Attributes:
        ridge: as in :class:`LEACE`.
    """

    ridge: float = 0.1

    source: ClassVar[str] = "ours, after Belrose et al. 2023 (arXiv 2306.03819)"
    full_size: ClassVar[str] = "the latents covary with no channel within classes"

    @property
    def needs_sae(self) -> bool:
        """See :class:`Method`."""
        return True

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise UserError(f"ridge={self.ridge:g} of latent_eraser must be 0 or more.")

    @torch.no_grad()
    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        sae, chosen = fitting.known_sae("latent_eraser", target), list(target.latents)
        fitting.uses()
        shares = torch.bincount(fitting.labels, minlength=fitting.classes).double() / len(fitting.labels)
        means = fitting.class_means.nan_to_num(0.0)  # of a class without images, whose share is 0
        of_latents = torch.zeros(fitting.classes, len(chosen), dtype=torch.float64)
        together = torch.zeros(len(fitting.mean), len(chosen), dtype=torch.float64)
        for rows, labels in zip(fitting.rows.split(2**13), fitting.labels.split(2**13), strict=True):
            latents = sae.encode(rows)[:, chosen].double()
            together += rows.double().T @ latents
            of_latents.index_add_(0, labels, latents)
        # E[(a − m_k) (z − z_k)ᵀ] = E[a zᵀ] − Σ_k share_k m_k z_kᵀ, and so for Σ.
        across = (together - means.T @ of_latents) / len(fitting.rows)
        within = fitting.second_moment - means.T @ (shares[:, None] * means)
        solved = _solved(within, self.ridge, across)
        told = across.T @ solved
        if not float(told.diagonal().min()) > 1e-12:
            least = chosen[int(told.diagonal().argmin())]
            raise UserError(
                f"Within classes, latent {least} of {target.name} does not vary with the "
                f"site {fitting.cut.site.name}, so that nothing can be erased of it."
            )
        right = solved @ torch.linalg.pinv(told, rtol=1e-9, hermitian=True)
        level = across @ (right.T @ fitting.mean)

        def at(alpha: float) -> Change:
            affine = Affine(left=alpha * across, right=right, shift=alpha * level)
            return affine.change(fitting.cut.model, fitting.cut.site)

        return FittedEdit(at)


def _solved(covariance: Float[Tensor, "M M"], ridge: float, across: Float[Tensor, "M r"]) -> Float[Tensor, "M r"]:
    """``(Σ + ρ I)⁻¹ σ``, float64, with ``ρ`` the ridge times the mean variance; by the pseudo-inverse if it is 0."""
    if not ridge:
        return torch.linalg.pinv(covariance, rtol=1e-12, hermitian=True) @ across
    ridged = covariance.clone()
    ridged.diagonal().add_(ridge * covariance.diagonal().mean())
    return torch.linalg.pinv(ridged, rtol=1e-12, hermitian=True) @ across
