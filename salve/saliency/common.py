"""What Grad-FAM and activation maximisation share: leaving the model as it was found, and checking arguments."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from salve.backbones.sites import Site
from salve.sae.models import SAE
from salve.types import UserError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            # Not module.train(): that would recurse into children which may be in another mode.
            module.training = training


def checked_latents(latents: Tensor | Sequence[int], sae: SAE) -> Tensor:
    """The latents as an integer tensor ``[L]`` on the SAE's device.

    Raises:
        UserError: not a non-empty list of integers, or one outside ``0 ≤ l < d``.
    """
    index = torch.as_tensor(latents, device=sae.encoder.device)
    if index.ndim != 1 or index.numel() == 0:
        raise UserError(f"latents must be a list of at least one latent, not of shape {list(index.shape)}.")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise UserError(f"latents must be integers, not {index.dtype}.")
    outside = index[(index < 0) | (index >= sae.dictionary_size)]
    if outside.numel():
        raise UserError(f"latent {int(outside[0])} does not exist: the SAE has latents 0 to {sae.dictionary_size - 1}.")
    # A copy, here and below: one made in a caller's inference mode could not take part in a backward pass.
    return index.long().clone()


def checked_signs(signs: Tensor | None, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """The signs ``[L]`` as floats, all +1 when not given.

    Raises:
        UserError: not one sign for each latent, or a sign that is neither +1 nor −1.
    """
    if signs is None:
        return torch.ones(len(latents), dtype=dtype, device=latents.device)
    if signs.shape != latents.shape:
        raise UserError(f"signs must hold one sign for each of the {len(latents)} latents, not {list(signs.shape)}.")
    if not (signs.abs() == 1).all():
        raise UserError("signs must all be +1 or -1.")
    return signs.to(device=latents.device, dtype=dtype, copy=True)


def check_width(sae: SAE, site: Site) -> None:
    """Refuse an SAE of another site's activations.

    Raises:
        UserError: it reads another number of channels than the site has.
    """
    width = sae.encoder.shape[1]
    if width != site.width:
        raise UserError(f"The SAE reads {width} channels, but the site {site.name} has {site.width}.")


def check_images(images: Tensor, model: nn.Module, sae: SAE) -> None:
    """Refuse what is no batch of images for this model and SAE.

    Raises:
        UserError: not ``[N, 3, H, W]`` with N ≥ 1, not finite, or of another dtype than the model and the SAE.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise UserError(f"images must be [N, 3, H, W] with at least one image, not {list(images.shape)}.")
    weights = next((weight for weight in model.parameters() if weight.is_floating_point()), sae.encoder)
    if not images.dtype == weights.dtype == sae.encoder.dtype:
        raise UserError(
            "images, model and SAE must have the same floating dtype, "
            f"not {images.dtype}, {weights.dtype} and {sae.encoder.dtype}."
        )
    if not images.isfinite().all():
        raise UserError("images must be finite, but some of their values are NaN or infinite.")
