"""Grad-FAM: where in an image a latent comes from (Flovik 2025; Grad-CAM with a latent as the target)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salve.backbones.sites import Site, find_site, recorded
from salve.sae.models import SAE
from salve.saliency.cells import Cells, CellTracker, enlarge, even_cells
from salve.saliency.common import check_images, check_width, checked_latents, checked_signs, evaluating
from salve.types import Activations, Maps, UserError


def grad_fam(
    model: nn.Module,
    layer: str,
    sae: SAE,
    images: Tensor,
    latents: Tensor | Sequence[int],
    at: str | None = None,
    *,
    signs: Tensor | None = None,
) -> Maps:
    """Saliency maps of SAE latents, for all images and latents of a batch.

        map_l = ReLU( Σ_k g_k A_k ),   g_k = mean_hw ∂z_l / ∂A_k,   enlarged to the size of the image

    with ``A [N, K, h, w]`` a map inside the model and ``z_l`` the latent of the site's activation ``a``. An inactive
    latent of a ReLU or TopK SAE has a map of zeros. Maps are raw: comparable between images, not scaled to 0..1.

    *Enlarged* is bilinear between the places that the cells look at: pixel ``p`` of an axis gets the value at
    ``(p − start) / stride`` cells, beyond the outermost that of the nearest, where ``start`` is the centre of the first
    cell's receptive field (``CellTracker``). Plain bilinear enlargement, as in the ``grad-cam`` package, takes the cells
    to divide the image evenly, ``start = (stride − 1) / 2``. So it is behind patches (ViT, ConvNeXt). Behind strided,
    symmetrically padded convolutions (ResNet) ``start = 0``, and plain maps lie half a cell too far down and right;
    with TensorFlow's padding ``start = stride − 1``, half a cell too far up and left. Where the cells cannot be
    followed, the enlargement is plain.

    Where ``a`` is the spatial mean of the default map (CNNs with global average pooling), ``∂z_l/∂A_k`` is known in
    closed form, ``E_lk / (hw)`` times the derivative of the SAE's activation function, and all latents come from one
    einsum without a backward pass through the model. Elsewhere the model is run once and only the part behind ``A``
    is differentiated, once for each latent; for more latents than the site is wide, once for each of its ``M`` channels
    instead, of which the latents' maps are then sums.

    Args:
        model: torchvision or timm model; run in eval mode and left as found.
        layer: the site, by name, or ``"last"``.
        sae: of the site's activations.
        images: ``[N, 3, H, W]``, preprocessed for the model; the caller makes the batches.
        latents: ``[L]`` indices into the dictionary.
        at: path of the module whose output is ``A``: a map ``[N, K, h, w]`` (or channels last) or a token grid
            ``[N, T, K]`` that starts with the site's prefix tokens. Default: the map of the site.
        signs: ``[L]``, +1 or −1, multiplies ``z_l`` before differentiation: −1 asks where the *negative* part of a
            signed latent comes from, as wanted for a class in which its mean is negative.

    Returns:
        ``[N, L, H, W]``, ≥ 0, detached, in the dtype of the images.

    Raises:
        UserError: no such site, module or latent; an SAE of another width than the site; bad images or signs; ``A``
            is no map, is made more than once in a forward pass, or is a place which the site's activation does not
            depend on, such as the patch tokens after a ViT's last block: there every map would be blank.

    Source: Flovik 2025 (arXiv 2512.15938); Selvaraju et al. 2017 (Grad-CAM); Zhou et al. 2016 (CAM, the closed form).
    """
    site = find_site(model, layer)
    check_width(sae, site)
    check_images(images, model, sae)
    # A caller's inference mode would make the gradients of the second branch impossible.
    with torch.inference_mode(False), evaluating(model):
        index = checked_latents(latents, sae)
        sign = checked_signs(signs, index, images.dtype)
        run = _run(model, site, images, at)
        grid = _as_map(run.place, site, images, at)
        if at is None and _is_spatial_mean(run.activations, grid):
            maps = _combined(sae, run.activations, grid, index, sign / (grid.shape[2] * grid.shape[3]))
        else:
            maps = _by_gradient(sae, run, grid, site, images, index, sign, at)
    count, size = (grid.shape[2], grid.shape[3]), (images.shape[2], images.shape[3])
    cells = run.cells if run.cells is not None and run.cells.count == count else even_cells(count, size)
    return enlarge(maps.relu(), cells, size).to(images.dtype)


class _Pass(NamedTuple):
    """One forward pass: the tensor at the chosen place, a leaf, and the activation ``[N, M]`` computed from it.

    ``cells`` says where in the image the positions of the place are centred; None where that cannot be followed.
    """

    place: Tensor
    activations: Activations
    cells: Cells | None


def _run(model: nn.Module, site: Site, images: Tensor, at: str | None) -> _Pass:
    """Run the model, with a graph only from the chosen place on."""
    path, side = (site.map, site.map_side) if at is None else (at, "output")
    modules = dict(model.named_modules())
    if path not in modules or path == "":
        raise UserError(f"at={path} is no module of this {type(model).__name__}; the default is {_default(site)}.")
    # Channels last: 1.4 times as fast for 16 images in a ResNet-18 on the CPU, as capture has it.
    images = images.to(memory_format=torch.channels_last)
    tracker = CellTracker(images)
    leaves: list[Tensor] = []
    cells: list[Cells | None] = []

    def cut(value: object) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(f"The {side} of {path} is a {type(value).__name__}, no map: use {_default(site)}.")
        if leaves:
            raise UserError(f"{path} runs several times in one forward pass, so it is no place: use {_default(site)}.")
        cells.append(tracker.of(value))
        leaves.append(value.detach().clone().requires_grad_())
        torch.set_grad_enabled(True)
        # A copy, because the next module may work in place, which a leaf does not allow.
        return leaves[0].clone()

    if side == "input":
        hook = modules[path].register_forward_pre_hook(lambda _, inputs: (cut(inputs[0]), *inputs[1:]))
    else:
        hook = modules[path].register_forward_hook(lambda _, __, output: cut(output))
    try:
        # Gradients are off up to the place, where ``cut`` turns them on; leaving the context restores the caller's mode.
        with torch.no_grad(), recorded(model, site) as seen, tracker:
            model(images)
    finally:
        hook.remove()
    if not leaves:
        raise UserError(f"{path} does not run in a forward pass of this model: use {_default(site)}.")
    if not seen[0].isfinite().all():
        raise UserError(f"The activation at site {site.name} is NaN or infinite for some of these images.")
    return _Pass(leaves[0], seen[0], cells[0])


def _as_map(value: Tensor, site: Site, images: Tensor, at: str | None) -> Tensor:
    """A map in either layout, or a token grid, as ``[N, K, h, w]``."""
    height, width = images.shape[2:]
    value = value.detach()
    if value.ndim == 4:
        # Swin and ConvNeXt blocks keep channels last: there it is the middle axes that have the image's aspect.
        middle, last = (value.shape[i] * width == value.shape[i + 1] * height for i in (1, 2))
        return value.permute(0, 3, 1, 2) if middle and not last else value
    where = _default(site) if at is None else f"the output of {at}"
    if value.ndim != 3:
        raise UserError(
            f"{where} has shape {list(value.shape)}, which is neither a map [N, K, h, w] nor tokens [N, T, K]."
        )
    patches = value[:, site.prefix_tokens :]  # [N, T - prefix, K]
    rows = round(math.sqrt(patches.shape[1] * height / width))
    columns = patches.shape[1] // max(rows, 1)
    if rows * columns != patches.shape[1] or rows * width != columns * height:
        raise UserError(
            f"The {patches.shape[1]} tokens at {where} (after {site.prefix_tokens} prefix tokens) are no grid of the "
            f"shape of the images, {height} x {width}: use {_default(site)}."
        )
    return patches.transpose(1, 2).unflatten(2, (rows, columns))


def _is_spatial_mean(activations: Tensor, grid: Tensor) -> bool:
    """Whether pooling the map by its mean gives the site's activation, up to rounding, on this batch."""
    mean = grid.mean(dim=(2, 3))
    if mean.shape != activations.shape:
        return False
    tolerance = 32 * torch.finfo(grid.dtype).eps * grid.abs().max()
    return bool((mean - activations.detach()).abs().max() <= tolerance)


def _combined(sae: SAE, activations: Tensor, channels: Tensor, index: Tensor, factor: Tensor) -> Tensor:
    """Weighted maps ``[N, L, h, w]`` of latents from those of the site's channels ``[N, M, h, w]``, times ``[L]``.

    ``z_l = f(E_l a + …)``, so that its map is ``f' Σ_m E_lm`` times that of ``a_m``. Where ``a = mean_hw A`` the map of
    ``a_m`` is ``A_m / (hw)``.
    """
    with torch.enable_grad():
        pre = sae.pre_activations(activations.detach()).detach().requires_grad_()
        # Each latent depends on its own pre-activation only, so this is the diagonal ∂z_l/∂pre_l.
        (active,) = torch.autograd.grad(sae.activate(pre).sum(), pre)
    rows = sae.encoder.detach()[index] * factor[:, None]  # [L, M]
    return torch.einsum("lm,nmhw->nlhw", rows, channels) * active[:, index, None, None]


def _by_gradient(
    sae: SAE, run: _Pass, grid: Tensor, site: Site, images: Tensor, index: Tensor, sign: Tensor, at: str | None
) -> Tensor:
    """Weighted maps ``[N, L, h, w]`` by a small backward pass for each latent or channel, summed over the images."""
    _check_dependence(run, site, images, at)
    few = len(index) <= run.activations.shape[1]
    with torch.enable_grad():
        targets = (sae.encode(run.activations)[:, index] * sign if few else run.activations).sum(dim=0)
    maps = []
    # A loop, because behind a ViT's last block it is 1.5 to 1.8 times as fast as is_grads_batched (one core).
    for target in targets:
        (gradient,) = torch.autograd.grad(target, run.place, retain_graph=True)
        weights = _as_map(gradient, site, images, at).mean(dim=(2, 3))  # [N, K]
        maps.append(torch.einsum("nk,nkhw->nhw", weights, grid))
    found = torch.stack(maps, dim=1)
    return found if few else _combined(sae, run.activations, found, index, sign)


def _check_dependence(run: _Pass, site: Site, images: Tensor, at: str | None) -> None:
    """Refuse a place that the activation does not depend on; a blank map alone may be an inactive latent.

    Probed with a smooth function of the activation. Its coefficients must be generic: the plain sum, for one, is
    constant behind a LayerNorm.
    """
    probe = None
    if run.activations.requires_grad:
        coefficients = torch.arange(1, run.activations.shape[1] + 1).cos().to(run.activations)
        with torch.enable_grad():
            target = (run.activations * coefficients).sum()
        (probe,) = torch.autograd.grad(target, run.place, retain_graph=True, allow_unused=True)
    if probe is None or not _as_map(probe, site, images, at).any():
        place = _default(site) if at is None else f"the output of {at}"
        advice = "" if at is None else f": use an earlier place, such as the default, {_default(site)}"
        raise UserError(
            f"Grad-FAM cannot be taken at {place}, because the activation of site {site.name} does not depend on "
            f"the image's positions there (its gradient is exactly zero) and every map would be blank{advice}."
        )


def _default(site: Site) -> str:
    return f"the {site.map_side} of {site.map}"
