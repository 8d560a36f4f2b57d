# SPDX-License-Identifier: MIT
"""Helpers of Grad-FAM and activation maximisation: activations, and checks of arguments."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.site import Site
from salve.backbones.sites import graph_of, site_activations
from salve.sae.models import SAE
from salve.types import Images, UserError


def activations_at(model: nn.Module, site: Site, images: Images) -> Float[Tensor, "N P M"]:
    """The activations at a site; at one inside the network, nothing behind it is computed."""
    if site.in_graph is None:
        return site_activations(model, site, images)[:, None]
    return graph_of(model, images.shape[-1]).activations(model, site, images)


class NoMap(UserError):
    """There is no map of the image where one is asked for; all else can be done."""


def checked_latents(latents: Tensor | Sequence[int], sae: SAE) -> Tensor:
    """The latents as an integer tensor ``[L]`` on the SAE's device.

    Raises:
        UserError: they are not a list of at least one integer in ``0 ≤ l < d``.
    """
    index = torch.as_tensor(latents, device=sae.encoder.device)
    if index.ndim != 1 or index.numel() == 0:
        raise UserError(f"latents must be a list of at least one latent, but has the shape {list(index.shape)}.")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise UserError(f"latents must be integers, not {index.dtype}.")
    outside = index[(index < 0) | (index >= sae.dictionary_size)]
    if outside.numel():
        raise UserError(
            f"Latent {int(outside[0])} does not exist; this SAE has latents 0 to {sae.dictionary_size - 1}."
        )
    # A copy, here and below, because a tensor made in inference mode cannot take part in a backward pass.
    return index.long().clone()


def checked_signs(signs: Tensor | None, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """The signs ``[L]`` as floats; all +1 by default.

    Raises:
        UserError: there is not one sign for each latent, or a sign is neither +1 nor −1.
    """
    if signs is None:
        return torch.ones(len(latents), dtype=dtype, device=latents.device)
    if signs.shape != latents.shape:
        raise UserError(
            f"signs must have one sign for each of the {len(latents)} latents, but has the shape {list(signs.shape)}."
        )
    if not (signs.abs() == 1).all():
        raise UserError("signs must all be +1 or -1.")
    return signs.to(device=latents.device, dtype=dtype, copy=True)


def check_width(sae: SAE, site: Site) -> None:
    """Check that an SAE fits a site.

    Raises:
        UserError: it reads another number of channels than the site has.
    """
    width = sae.encoder.shape[1]
    if width != site.width:
        raise UserError(f"The SAE reads {width} channels, but the site {site.name} has {site.width}.")


def check_images(images: Tensor, model: nn.Module, sae: SAE) -> None:
    """Check a batch of images for a model and an SAE.

    Raises:
        UserError: images are not ``[N, 3, H, W]`` with N ≥ 1, not finite, or of another dtype than model and SAE.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise UserError(f"images must be [N, 3, H, W] with at least one image, not {list(images.shape)}.")
    weights = next((weight for weight in model.parameters() if weight.is_floating_point()), sae.encoder)
    if not images.dtype == weights.dtype == sae.encoder.dtype:
        raise UserError(
            "images, model and SAE must have the same floating-point dtype, "
            f"not {images.dtype}, {weights.dtype} and {sae.encoder.dtype}."
        )
    if not images.isfinite().all():
        raise UserError("images must be finite, but some of their values are NaN or infinite.")


def check_square(images: Tensor, what: str) -> None:
    """Raise UserError unless images are square, which a network's graph is made for; ``what`` needs the graph."""
    if images.shape[2] != images.shape[3]:
        raise UserError(
            f"{what} is found in the network's graph, which is for square images, not {list(images.shape)}."
        )
