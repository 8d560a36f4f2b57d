# SPDX-License-Identifier: MIT
"""Which latents detect known concepts, on data with ground truth."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from salve.types import Latents

#: Latents that are ranked at a time, to bound memory.
_AT_ONCE = 1024


class ConceptDetectors(NamedTuple):
    """The latent that best detects each of ``K`` concepts.

    Attributes:
        latents: ``[K]`` indices; −1 for a concept that all or none of the images for choosing show.
        signs: ``[K]``, −1 if the concept lowers a signed latent, else 1.
        auroc: ``[K]`` of ``sign · z`` on the held-out images; NaN without a latent, or if all or none of these images
            show the concept.
    """

    latents: Int[Tensor, " K"]
    signs: Int[Tensor, " K"]
    auroc: Float[Tensor, " K"]


def concept_auroc(latents: Latents, presence: Bool[Tensor, "N K"]) -> Float[Tensor, "K d"]:
    """Area under the ROC curve of every latent as a detector of every concept: ``P(z_with > z_without)``, ties half.

    It is exact, from the ranks of the latents (Mann–Whitney U).

    Args:
        latents: ``[N, d]``. presence: ``[N, K]``, which image shows which concept.

    Returns:
        ``[K, d]`` float64: 0.5 by chance, 1 if the latent is larger for all images with the concept than without; NaN
        for a concept that all or none of the images show.
    """
    shown = presence.T.double()
    positives = shown.sum(dim=1, keepdim=True)
    pairs = positives * (len(latents) - positives)
    sums = torch.cat([shown @ _mid_ranks(part) for part in latents.split(_AT_ONCE, dim=1)], dim=1)
    return (sums - positives * (positives + 1) / 2) / pairs


class ConceptAUROC(Metric):
    """:func:`concept_auroc` over all batches; keeps all latents, because ranks are over all images.

    Args:
        dictionary_size: ``d``. concepts: ``K``.
    """

    full_state_update = False
    latents: list[Tensor]
    presence: list[Tensor]

    def __init__(self, dictionary_size: int, concepts: int) -> None:
        super().__init__()
        self.dictionary_size, self.concepts = dictionary_size, concepts
        self.add_state("latents", [], dist_reduce_fx="cat")
        self.add_state("presence", [], dist_reduce_fx="cat")

    def update(self, latents: Tensor, presence: Tensor) -> None:
        """Add latents ``[N, d]`` and which of these images shows which concept, ``[N, K]`` bool."""
        self.latents.append(latents)
        self.presence.append(presence)

    def compute(self) -> Tensor:
        """``[K, d]``."""
        if not len(self.latents):
            return torch.full((self.concepts, self.dictionary_size), torch.nan, dtype=torch.float64)
        return concept_auroc(dim_zero_cat(self.latents), dim_zero_cat(self.presence))


def concept_detectors(
    latents: Latents,
    presence: Bool[Tensor, "N K"],
    held_out_latents: Float[Tensor, "n d"],
    held_out_presence: Bool[Tensor, "n K"],
    signed: bool = False,
) -> ConceptDetectors:
    """Choose the best latent for each concept on some images, and measure it on others.

    On the images that chose it, the best of many latents would look better than it is.

    Args:
        latents, presence: ``[N, d]`` and ``[N, K]``, for choosing.
        held_out_latents, held_out_presence: ``[n, d]`` and ``[n, K]``, for measuring.
        signed: latents take both signs (linear SAEs), so that a latent that the concept lowers detects it too.
    """
    auroc = concept_auroc(latents, presence)
    strength = torch.maximum(auroc, 1 - auroc) if signed else auroc
    unknown = auroc.isnan().any(dim=1)
    best = strength.nan_to_num(0.0).argmax(dim=1)
    concepts = torch.arange(len(best), device=best.device)
    signs = torch.where((auroc[concepts, best] < 0.5) & signed, -1, 1)
    judged = concept_auroc(held_out_latents[:, best], held_out_presence).diagonal()
    judged = torch.where(signs < 0, 1 - judged, judged)
    return ConceptDetectors(torch.where(unknown, -1, best), signs, torch.where(unknown, torch.nan, judged))


def _mid_ranks(values: Latents) -> Float[Tensor, "N d"]:
    """Ranks 1 … N within each column; equal values get their mean rank."""
    columns = values.T.contiguous()
    ordered = columns.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    return (below + up_to + 1).T.double() / 2
