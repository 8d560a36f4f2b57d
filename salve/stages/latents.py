# SPDX-License-Identifier: MIT
"""Latents of whole images: encoded from what was captured at a vector, from the images themselves at a map."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from salve.activations import Captured
from salve.backbones.cut import Cut
from salve.sae import SAE
from salve.sae.positions import at_positions, pooled
from salve.stages.context import StageContext
from salve.stages.measure import AT_ONCE, blocks
from salve.types import Split, UserError


class ImageLatents(NamedTuple):
    """Latents of some images.

    Attributes:
        latents: ``[n, d]``, pooled over the positions of a map.
        scale: ``[n, 1]``, a vector of the length of the activations, as :func:`salve.metrics.firing` compares with.
        labels: ``[n]``.
    """

    latents: Tensor
    scale: Tensor
    labels: Tensor


@torch.no_grad()
def image_latents(
    context: StageContext, cut: Cut, sae: SAE, split: Split, pool: str, indices: Sequence[int] | None = None
) -> Iterator[ImageLatents]:
    """The latents of a split's images, batch by batch, in order.

    Args:
        context: of the run. cut: the network at a map. sae: of its activations, on the CPU.
        split: its name. pool: how positions become an image's latent. indices: of images; None for all.

    Raises:
        UserError: an activation is NaN or infinite.
    """
    at_once = max(1, AT_ONCE // (cut.site.count * max(sae.dictionary_size, sae.width)))
    for images, labels in context.data.loader(split, indices=indices):
        activations = cut.read(context.on_device(images)).float().cpu()  # [n, P, M]
        if not activations.isfinite().all():
            raise UserError(
                f"The activations at {cut.site.name} are NaN or infinite for some images of the {split} split; check "
                "the weights and the images."
            )
        parts = [pooled(at_positions(sae.encode, part), pool) for part in activations.split(at_once)]
        yield ImageLatents(torch.cat(parts), activations.norm(dim=2).mean(dim=1, keepdim=True), labels)


@torch.no_grad()
def latents_of(context: StageContext, cut: Cut, sae: SAE, captured: Captured, split: Split, pool: str) -> Tensor:
    """The latents ``[N, d]`` of all images of a split.

    Args:
        context, cut, sae, split, pool: see :func:`image_latents`. captured: the split's activations.
    """
    if cut.site.kind == "vector":
        return torch.cat([sae.encode(rows) for rows, _ in blocks(captured, sae.dictionary_size)])
    return torch.cat([part.latents for part in image_latents(context, cut, sae, split, pool)])
