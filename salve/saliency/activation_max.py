"""Activation maximisation: an image, drawn by gradient ascent, that excites one latent (Flovik 2025)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.sites import find_site, recorded
from salve.data.transforms import Preprocess
from salve.sae.models import SAE
from salve.saliency.common import check_width, checked_latents, checked_signs, evaluating
from salve.types import UserError

_START_NOISE = 0.01


class ActivationMaximum(NamedTuple):
    """Image l was drawn for latent l; the values are its pre-activation before and after.

    Attributes:
        images: ``[L, 3, S, S]`` in 0..1, as the model's normalisation expects them.
        start_values: ``[L]`` pre-activation ``(E (a − s) + b)_l`` of the grey noise that the drawing started from.
        final_values: ``[L]`` that of ``images``.
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
    seed: int = 0,
) -> ActivationMaximum:
    """Draw, for each latent, an image that excites it. All are drawn together, each in its own row of one batch.

        max_x  sign_l φ_l(x) / u_l  −  λ_L2 mean(x²)  −  λ_TV ( mean|∂_h x| + mean|∂_w x| )

    ``x`` is the normalised image that the model reads and ``φ_l`` the latent's *pre-activation*, which has a gradient
    even where a ReLU or TopK latent is silent. ``u_l = ‖E_l‖ · mean‖a‖`` at the start makes φ a number of order one,
    and the norms are means, so that one λ serves every SAE, backbone and image size.

    What is known to keep such images from being noise, and no more: the image is drawn through its spectrum, each
    frequency scaled by its inverse (Olah et al. 2017), squashed into 0..1 by a sigmoid; and every step sees it moved
    by a few pixels at random. Adam; one forward and one backward pass of L images for each step.

    Args:
        model: torchvision or timm model; run in eval mode and left as found.
        layer: the site, by name, or ``"last"``.
        sae: of the site's activations.
        latents: ``[L]`` indices into the dictionary.
        preprocess: gives the normalisation.
        size: ``S``, side of the images in pixels.
        steps: of Adam.
        lr: of Adam, on the spectrum.
        l2: λ_L2 ≥ 0.
        tv: λ_TV ≥ 0.
        jitter: largest shift in pixels, either way along each axis; what leaves one side comes in at the other.
        signs: ``[L]``, +1 or −1: −1 makes the latent as negative as it can be.
        seed: of the starting noise and the shifts; the result is determined by it.

    Raises:
        UserError: no such site or latent, an SAE of another width, bad signs, a setting out of its range.

    Source: Flovik 2025 (arXiv 2512.15938) for the objective; Olah et al. 2017 (Feature Visualization) for the spectrum.
    """
    site = find_site(model, layer)
    check_width(sae, site)
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
        raise UserError(f"lr={lr} must be positive.")
    dtype, device = sae.encoder.dtype, sae.encoder.device
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        index = checked_latents(latents, sae)
        sign = checked_signs(signs, index, dtype)
        mean, std = (
            torch.tensor(channels, dtype=dtype, device=device).view(1, 3, 1, 1)
            for channels in (preprocess.mean, preprocess.std)
        )

        def measure(x: Tensor) -> tuple[Tensor, Tensor]:
            with recorded(model, site) as seen:
                model(x)
            return sae.pre_activations(seen[0]).gather(1, index[:, None]).squeeze(1), seen[0]

        scale = _inverse_frequency(size).to(device, dtype)
        noise = torch.randn(len(index), 3, *scale.shape, 2, generator=generator, dtype=dtype)
        spectrum = (_START_NOISE * noise).to(device).requires_grad_()
        optimiser = torch.optim.Adam([spectrum], lr=lr)
        with torch.no_grad():
            start, activations = measure((_draw(spectrum, scale, size) - mean) / std)
            unit = sae.encoder[index].norm(dim=1) * activations.norm(dim=1).mean()
            unit.clamp_(min=torch.finfo(dtype).tiny)
        for _ in range(steps):
            x = (_draw(spectrum, scale, size) - mean) / std
            shift = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            value, _activations = measure(x.roll(shift, dims=(2, 3)))
            penalty = l2 * x.square().mean(dim=(1, 2, 3)) + tv * _total_variation(x)
            # Not .backward(): that would leave gradients in the model's weights.
            (spectrum.grad,) = torch.autograd.grad((penalty - sign * value / unit).sum(), spectrum)
            optimiser.step()
        with torch.no_grad():
            images = _draw(spectrum, scale, size)
            final, _ = measure((images - mean) / std)
    return ActivationMaximum(images, start, final)


def _inverse_frequency(size: int) -> Tensor:
    """Weight of each frequency of a real ``[size, size]`` image, ``[size, size // 2 + 1]``, with mean one."""
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]
    # The mean colour has frequency zero; it weighs as much as the lowest other one.
    scale = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / size)
    return scale / scale.mean()


def _draw(spectrum: Tensor, scale: Tensor, size: int) -> Tensor:
    """Images ``[L, 3, S, S]`` in 0..1 of spectra ``[L, 3, S, S // 2 + 1, 2]``; zero is mid-grey."""
    return torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(size, size), norm="ortho").sigmoid()


def _total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along each axis, summed over the axes: ``[N, 3, H, W] → [N]``."""
    return x.diff(dim=2).abs().mean(dim=(1, 2, 3)) + x.diff(dim=3).abs().mean(dim=(1, 2, 3))
