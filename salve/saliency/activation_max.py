# SPDX-License-Identifier: MIT
"""Activation maximisation: images, found by gradient ascent, that excite latents (Flovik 2025)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.probe import evaluating
from salve.backbones.sites import find_site
from salve.data.transforms import Preprocess
from salve.sae.models import SAE
from salve.sae.positions import at_positions, pooled
from salve.saliency.common import (
    activations_at,
    check_width,
    checked_latents,
    checked_signs,
)
from salve.types import UserError

_START_NOISE = 0.01


class ActivationMaximum(NamedTuple):
    """An image for each latent, and the latent's pre-activation before and after.

    Attributes:
        images: ``[L, 3, S, S]`` in 0..1, before normalisation.
        start_values: ``[L]``, the pre-activation ``(E (a − b_dec) + b)_l`` of the grey noise at the start.
        final_values: ``[L]``, that of ``images``.
    """

    images: Float[Tensor, "L 3 S S"]
    start_values: Float[Tensor, " L"]
    final_values: Float[Tensor, " L"]


def maximise(
    model: nn.Module,
    layer: str,
    sae: SAE,
    latents: Tensor | Sequence[int],
    preprocess: Preprocess,
    *,
    size: int,
    steps: int = 128,
    lr: float = 0.05,
    l2: float = 0.05,
    tv: float = 0.5,
    jitter: int = 4,
    signs: Tensor | None = None,
    pool: str = "mean",
    seed: int = 0,
) -> ActivationMaximum:
    """Find, for each latent, an image that excites it; the images of all latents form one batch.

        max_x  sign_l φ_l(x) / u_l  −  λ_L2 mean(x²)  −  λ_TV ( mean|∂_h x| + mean|∂_w x| )

    ``x`` is the normalised image that the model reads. ``φ_l`` is the latent's *pre-activation*, which has a gradient
    even where a ReLU or TopK latent is zero; at a site that is a map, it is pooled over positions. Dividing by
    ``u_l = ‖E_l‖ · mean‖a‖`` at the start makes φ a number of order one, and the penalties are means, so that one λ
    suits every SAE, backbone and image size.

    Two measures keep the images from becoming noise. Their spectrum is optimised, with each frequency scaled by its
    inverse (Olah et al. 2017), and squashed into 0..1 by a sigmoid. And every step shifts the images by a few pixels at
    random. Each step of Adam takes one forward and one backward pass of L images.

    Args:
        model: an image classifier; run in eval mode and left as it was.
        layer: name of the site, or ``"last"``.
        sae: an SAE of the site's activations.
        latents: ``[L]`` indices into the dictionary.
        preprocess: for its normalisation.
        size: ``S``, side of the images in pixels.
        steps: steps of Adam.
        lr: learning rate of Adam, on the spectrum.
        l2: λ_L2 ≥ 0.
        tv: λ_TV ≥ 0.
        jitter: largest shift in pixels, in both directions along each axis; images wrap around.
        signs: ``[L]``, +1 or −1; −1 makes the latent as negative as possible.
        pool: ``mean`` or ``max``: how the values at the positions of a site that is a map become the image's.
        seed: of the initial noise and the shifts; it determines the result.

    Raises:
        UserError: there is no such site or latent, the SAE has another width, signs are wrong, or a setting is out of
            range.

    Source: Flovik 2025 (arXiv 2512.15938) for the objective; Olah et al. 2017 (Feature Visualization) for the spectrum.
    """
    for name, setting, least in (
        ("size", size, 2),
        ("steps", steps, 1),
        ("l2", l2, 0),
        ("tv", tv, 0),
        ("jitter", jitter, 0),
    ):
        if not setting >= least:
            raise UserError(f"{name}={setting} must be at least {least}.")
    if not lr > 0:
        raise UserError(f"lr={lr} must be above 0.")
    dtype, device = sae.encoder.dtype, sae.encoder.device
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        site = find_site(model, layer, size)
        check_width(sae, site)
        index = checked_latents(latents, sae)
        sign = checked_signs(signs, index, dtype)
        mean, std = (
            torch.tensor(channels, dtype=dtype, device=device).view(1, 3, 1, 1)
            for channels in (preprocess.mean, preprocess.std)
        )

        def measure(x: Tensor) -> tuple[Tensor, Tensor]:
            activations = activations_at(model, site, x)  # [L, P, M]
            values = pooled(at_positions(sae.pre_activations, activations), pool)
            return values.gather(1, index[:, None]).squeeze(1), activations

        scale = _inverse_frequency(size).to(device, dtype)
        noise = torch.randn(len(index), 3, *scale.shape, 2, generator=generator, dtype=dtype)
        spectrum = (_START_NOISE * noise).to(device).requires_grad_()
        optimiser = torch.optim.Adam([spectrum], lr=lr)
        with torch.no_grad():
            start, activations = measure((_draw(spectrum, scale, size) - mean) / std)
            unit = sae.encoder[index].norm(dim=1) * activations.norm(dim=2).mean()
            unit.clamp_(min=torch.finfo(dtype).tiny)
        for _ in range(steps):
            x = (_draw(spectrum, scale, size) - mean) / std
            shift = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            value, _activations = measure(x.roll(shift, dims=(2, 3)))
            penalty = l2 * x.square().mean(dim=(1, 2, 3)) + tv * _total_variation(x)
            # Not .backward(), which would leave gradients in the model's weights.
            (spectrum.grad,) = torch.autograd.grad((penalty - sign * value / unit).sum(), spectrum)
            optimiser.step()
        with torch.no_grad():
            images = _draw(spectrum, scale, size)
            final, _ = measure((images - mean) / std)
    return ActivationMaximum(images, start, final)


def _inverse_frequency(size: int) -> Tensor:
    """Weight of each frequency of a real ``[size, size]`` image, ``[size, size // 2 + 1]``, with mean one."""
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]
    # The mean colour has frequency zero; it gets the weight of the lowest other frequency.
    scale = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / size)
    return scale / scale.mean()


def _draw(spectrum: Tensor, scale: Tensor, size: int) -> Tensor:
    """Images ``[L, 3, S, S]`` in 0..1 of spectra ``[L, 3, S, S // 2 + 1, 2]``; zero is mid-grey."""
    return torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(size, size), norm="ortho").sigmoid()


def _total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along each axis, summed over the axes: ``[N, 3, H, W] → [N]``."""
    return x.diff(dim=2).abs().mean(dim=(1, 2, 3)) + x.diff(dim=3).abs().mean(dim=(1, 2, 3))
