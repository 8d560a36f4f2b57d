# SPDX-License-Identifier: MIT
"""Grad-CAM of a class, at the same place as the maps of latents, to compare them with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from salve.backbones.probe import evaluating
from salve.backbones.sites import find_site, graph_of
from salve.sae.models import make_sae
from salve.saliency.cells import enlarge
from salve.saliency.grad_fam import grad_fam
from salve.saliency.own_maps import rows_at
from salve.types import Maps, UserError


def grad_cam(model: nn.Module, layer: str, images: Tensor, outputs: Sequence[int]) -> Maps:
    """Grad-CAM maps of outputs of the network, for all images of a batch.

        map_k = ReLU( Σ_m g_m A_m ),   g_m = mean_hw ∂ logit_k / ∂A_m,   enlarged to the size of the image

    ``A`` is the site itself if it is a map; for the last site, the map that Grad-FAM takes by default.

    Args:
        model: an image classifier; run in eval mode and left as it was.
        layer: name of a site. images: ``[N, 3, S, S]``, preprocessed. outputs: ``K`` numbers of logits.

    Returns:
        ``[N, K, S, S]``, ≥ 0, detached, in the dtype of the images.

    Raises:
        UserError: there is no such site, or it is neither a map nor the last one.

    Source: Selvaraju et al. 2017.
    """
    with torch.inference_mode(False), evaluating(model):
        site = find_site(model, layer, images.shape[-1])
        if site.kind == "vector":
            return _at_head(model, layer, images, outputs)
        with torch.no_grad():
            rows, grid, cells = rows_at(model, site, images)
            tail = graph_of(model, images.shape[-1]).tail(model, site, images)
        with torch.enable_grad():
            leaf = rows.detach().clone().requires_grad_()
            logits = tail(leaf)
        maps = []
        for k in outputs:
            (gradient,) = torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)
            weights = grid.maps(gradient).mean(dim=(2, 3))  # [N, M]
            maps.append(torch.einsum("nm,nmhw->nhw", weights, grid.maps(rows)))
    return enlarge(torch.stack(maps, dim=1).relu(), cells, (images.shape[2], images.shape[3])).to(images.dtype)


def _at_head(model: nn.Module, layer: str, images: Tensor, outputs: Sequence[int]) -> Maps:
    """A logit is a linear function of the last site, as a linear latent is: their maps have the same formula."""
    site = find_site(model, layer, images.shape[-1])
    if site.in_graph is not None:
        raise UserError(f"Grad-CAM needs a map, and the site {site.name} is a vector inside the network.")
    weight = model.get_parameter(site.readers[0].weight).detach().flatten(1)
    as_latents = make_sae("linear_l1", site.width, len(weight)).to(weight)
    with torch.no_grad():
        as_latents.encoder.copy_(weight)
    return grad_fam(model, layer, as_latents, images, list(outputs))
