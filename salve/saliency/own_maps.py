# SPDX-License-Identifier: MIT
"""A latent's own map: its value at every position of a site that is a map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from salve.backbones.probe import evaluating
from salve.backbones.site import Site
from salve.backbones.sites import find_site, graph_of
from salve.sae.models import SAE
from salve.sae.positions import at_positions
from salve.saliency.cells import Cells, CellTracker, enlarge, even_cells
from salve.saliency.common import (
    NoMap,
    check_images,
    check_square,
    check_width,
    checked_latents,
    checked_signs,
)
from salve.saliency.graph_maps import map_of_site
from salve.saliency.grids import Grid
from salve.types import Maps, UserError

#: Latents that are in memory at once.
_AT_ONCE = 1 << 24


def own_maps(
    model: nn.Module,
    layer: str,
    sae: SAE,
    images: Tensor,
    latents: Tensor | Sequence[int],
    *,
    signs: Tensor | None = None,
) -> Maps:
    """The latents' own maps, for all images of a batch: exact, without a gradient.

        map_l = ReLU( z_l(a_p) ) at position p, enlarged to the size of the image

    Positions that have no place in the image, such as a class token, are left out. Nothing behind the site is computed.
    Maps are enlarged as those of :func:`salve.saliency.grad_fam`.

    Args:
        model: an image classifier; run in eval mode and left as it was.
        layer: name of a site that is a map.
        sae: an SAE of the site's activations.
        images: ``[N, 3, S, S]``, preprocessed for the model, as one batch.
        latents: ``[L]`` indices into the dictionary.
        signs: ``[L]``, +1 or −1, multiplied with ``z_l``; −1 shows the *negative* part of a signed latent.

    Returns:
        ``[N, L, S, S]``, ≥ 0, detached, in the dtype of the images.

    Raises:
        UserError: there is no such site or latent, the site is no map, its positions are no grid of the image, the SAE
            has another width than the site, or images or signs are wrong.
    """
    check_images(images, model, sae)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        site = find_site(model, layer, images.shape[-1])
        check_width(sae, site)
        index = checked_latents(latents, sae)
        sign = checked_signs(signs, index, images.dtype)
        rows, grid, cells = rows_at(model, site, images)
        block = max(1, _AT_ONCE // (site.count * sae.dictionary_size))
        values = torch.cat([at_positions(sae.encode, part)[:, :, index] for part in rows.split(block)])
        maps = grid.maps(values * sign)
    return enlarge(maps.relu(), cells, (images.shape[2], images.shape[3]))


def rows_at(model: nn.Module, site: Site, images: Tensor) -> tuple[Tensor, Grid, Cells]:
    """The activations ``[N, P, M]`` of a site that is a map, the grid of its positions, and where its cells lie.

    Raises:
        UserError: the site is no map of the image, or an activation is NaN or infinite.
    """
    if site.kind == "vector":
        raise NoMap(f"The site {site.name} is a vector, which has no maps of its own; use grad_fam.")
    check_square(images, f"The site {site.name}")
    graph = graph_of(model, images.shape[-1])
    found = map_of_site(model, graph, site)
    if found is None:
        raise NoMap(
            f"The positions of the site {site.name} are no grid of the image, so there are no maps of its own; use "
            "grad_fam."
        )
    images = images.to(memory_format=torch.channels_last)
    with CellTracker(images) as tracker:
        tensor = graph.values(model, images, (found.node,))[found.node]
        cells = tracker.of(tensor)
    rows = found.rows(tensor)
    if not rows.isfinite().all():
        raise UserError(f"The activation at site {site.name} is NaN or infinite for some of these images.")
    count = found.grid.shape
    size = (images.shape[2], images.shape[3])
    tracked = cells if cells is not None and cells.count == count else even_cells(count, size)
    return rows, found.grid, tracked
