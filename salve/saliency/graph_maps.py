# SPDX-License-Identifier: MIT
"""Maps in a network's graph: tensors whose positions lie in a grid over the image."""

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.graph import NetworkGraph
from salve.backbones.site import Site
from salve.backbones.sites import graph_of
from salve.saliency.cells import Cells, CellTracker
from salve.saliency.common import NoMap, check_square
from salve.saliency.grids import Grid, PositionTracker, Where, grid_of
from salve.types import UserError

#: The share of a map's positions on which the activation must depend.
SEEN = 0.5


class GraphMap(NamedTuple):
    """A map in a network's graph.

    Attributes:
        node: the tensor's name in the graph. name: what it is, in words.
        rows: arranges the tensor as images, positions and channels ``[N, P, K]``. grid: of the positions.
    """

    node: str
    name: str
    rows: Callable[[Tensor], Tensor]
    grid: Grid

    def maps(self, tensor: Tensor) -> Float[Tensor, "N K h w"]:
        """The tensor as maps."""
        return self.grid.maps(self.rows(tensor))


class Pass(NamedTuple):
    """One forward pass.

    Attributes:
        map: the tensor that is a map, a leaf of autograd's graph. activations: ``[N, P, M]``, computed from it.
        cells: where in the image the cells of the map are centred; None if they could not be tracked.
        to_map: arranges a tensor like ``map`` as maps ``[N, K, h, w]``.
        site: of the activations. where: what the map is, in words. advice: for a wrong map.
        own: if the map is the site itself, the grid of its positions.
    """

    map: Tensor
    activations: Float[Tensor, "N P M"]
    cells: Cells | None
    to_map: Callable[[Tensor], Tensor]
    site: Site
    where: str
    advice: str
    own: Grid | None = None


def run_graph(model: nn.Module, site: Site, images: Tensor, at: str | Site | None) -> Pass:
    """Run a network's graph up to a site, with autograd's graph only behind the map.

    Args:
        model: the network, in eval mode. site: of the activations. images: ``[N, 3, H, W]``.
        at: path of the module whose output is the map, or another site; None for the default.

    Raises:
        UserError: there is no such module or site, it is no map, or images are not square.
    """
    check_square(images, f"The site {site.name}" if site.in_graph is not None else "The map")
    inner = site
    try:
        graph = graph_of(model, images.shape[-1])
        if site.in_graph is None:
            inner = next(one for one in graph.sites.values() if one.readers == site.readers)
    except (UserError, StopIteration) as error:
        raise NoMap(
            f"This {type(model).__name__} has no spatial map that is known in front of its site {site.name}."
        ) from error
    assert inner.in_graph is not None, "this site is not one of the graph"
    found = _map_at(model, graph, inner, at)
    images = images.to(memory_format=torch.channels_last)
    goal = inner.in_graph.node
    with torch.no_grad(), CellTracker(images) as tracker:
        value = graph.values(model, images, (found.node,))[found.node]
        cells = tracker.of(value)
    leaf = value.clone().requires_grad_()
    with torch.enable_grad():
        tensor = leaf if found.node == goal else graph.values(model, images, (goal,), {found.node: leaf})[goal]
        activations = inner.in_graph.rows(tensor)
    advice = "" if at is None else "; use an earlier module, or leave at out"
    own = found.grid if found.node == goal else None
    return Pass(leaf, activations, cells, found.maps, site, found.name, advice, own)


def _map_at(model: nn.Module, graph: NetworkGraph, site: Site, at: str | Site | None) -> GraphMap:
    name = type(model).__name__
    if at is None:
        return map_for(model, graph, site)
    if isinstance(at, Site):
        if graph.sites.get(at.name) != at:
            raise UserError(f"at={at.name} is no site of this {name} for images of {graph.size} pixels.")
        found = map_of_site(model, graph, at)
        if found is None:
            raise UserError(f"The positions of at={at.name} are no grid of the image, so Grad-FAM cannot use them.")
        return found
    if at not in dict(model.named_modules()) or at == "":
        raise UserError(f"at={at} is no module of this {name}; leave at out for the last map in front of {site.name}.")
    return map_of_module(model, graph, at)


def map_of_site(model: nn.Module, graph: NetworkGraph, site: Site) -> GraphMap | None:
    """A site as a map; None if it is a vector, or its positions are not those of the image."""
    return _remembered(graph, ("site", site.name), lambda: _map_of_site(model, graph, site))


def map_of_module(model: nn.Module, graph: NetworkGraph, path: str) -> GraphMap:
    """The output of a module as a map.

    Raises:
        UserError: it does not run, or several times, or its output is no map.
    """
    found = _remembered(graph, ("module", path), lambda: _map_of_module(model, graph, path))
    assert found is not None, "a module without a map is an error"
    return found


def map_for(model: nn.Module, graph: NetworkGraph, site: Site) -> GraphMap:
    """The map for Grad-FAM of a site: the site itself, or the last map in front that most of its positions matter in.

    Raises:
        UserError: there is none.
    """
    found = _remembered(graph, ("default", site.name), lambda: _map_for(model, graph, site))
    if found is None:
        raise NoMap(f"This {type(model).__name__} has no spatial map in front of its site {site.name}.")
    return found


#: What was found, by graph; a look takes about as long as a forward pass in which each operation is watched.
_found: MutableMapping[NetworkGraph, dict[tuple[str, str], GraphMap | None]] = WeakKeyDictionary()


def _remembered(graph: NetworkGraph, key: tuple[str, str], find: Callable[[], GraphMap | None]) -> GraphMap | None:
    known = _found.setdefault(graph, {})
    if key not in known:
        known[key] = find()
    return known[key]


def _map_of_site(model: nn.Module, graph: NetworkGraph, site: Site) -> GraphMap | None:
    assert site.in_graph is not None, "this site is not one of the graph"
    if site.kind == "vector":
        return None
    ((_, where),) = _tracked(model, graph, [site.in_graph.node])
    if where is None:
        return None
    rows, columns = (site.in_graph.rows(one)[0].mean(1) for one in where)
    grid = grid_of(rows, columns)
    return None if grid is None else GraphMap(site.in_graph.node, f"the site {site.name}", site.in_graph.rows, grid)


def _map_of_module(model: nn.Module, graph: NetworkGraph, path: str) -> GraphMap:
    nodes = graph.outputs_of(path)
    if not nodes:
        raise UserError(f"{path} does not run in a forward pass of this model.")
    if len(nodes) > 1:
        raise UserError(f"{path} runs several times in one forward pass, or has several outputs, so it has no one map.")
    ((value, where),) = _tracked(model, graph, nodes)
    found = _map_of_tensor(nodes[0], f"the output of {path}", value, where)
    if found is None:
        shape = list(value.shape) if isinstance(value, Tensor) else []
        raise UserError(f"The output of {path} has the shape {shape}, whose positions are no grid of the image.")
    return found


def _map_for(model: nn.Module, graph: NetworkGraph, site: Site) -> GraphMap | None:
    own = map_of_site(model, graph, site)
    if own is not None:
        return own
    assert site.in_graph is not None, "this site is not one of the graph"
    nodes = graph.in_front(site.in_graph.node)
    maps = [
        found
        for node, (value, where) in zip(nodes, _tracked(model, graph, nodes), strict=True)
        if (found := _map_of_tensor(node, f"the last map in front of {site.name}", value, where)) is not None
    ]
    if not maps:
        return None
    images = _noise(model, graph)
    with torch.enable_grad():
        values = graph.values(model, images.requires_grad_(), [*(one.node for one in maps), site.in_graph.node])
        gradients = torch.autograd.grad(
            probe(site.in_graph.rows(values[site.in_graph.node])), [values[one.node] for one in maps], allow_unused=True
        )
    for one, gradient in zip(reversed(maps), reversed(gradients), strict=True):
        if gradient is not None and one.maps(gradient).ne(0).any(dim=1).double().mean() >= SEEN:
            return one
    return None


def probe(activations: Float[Tensor, "*N M"]) -> Float[Tensor, ""]:
    """A linear function of activations, whose gradient tells what they depend on.

    Its coefficients differ, because the plain sum, for example, is constant behind a LayerNorm.
    """
    coefficients = torch.arange(1, activations.shape[-1] + 1).cos().to(activations)
    return (activations * coefficients).sum()


def _map_of_tensor(node: str, name: str, value: object, where: Where | None) -> GraphMap | None:
    """A tensor with images along its first axis as a map; the axes along which no position changes are channels."""
    if where is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
        return None
    along = [axis for axis in range(value.ndim) if any(_changes(one, axis) for one in where)]
    if not along or along[0] == 0:
        return None
    arrange = partial(_rows, tuple(along))
    rows, columns = (arrange(one)[0, :, 0] for one in where)
    grid = grid_of(rows, columns)
    return None if grid is None else GraphMap(node, name, arrange, grid)


def _rows(along: Sequence[int], tensor: Tensor) -> Tensor:
    """A tensor with positions along some axes as ``[N, P, K]``."""
    moved = tensor.movedim(tuple(along), tuple(range(1, len(along) + 1)))
    return moved.reshape(len(moved), math.prod(moved.shape[1 : len(along) + 1]), -1)


def _changes(places: Tensor, axis: int) -> bool:
    first = places.narrow(axis, 0, 1)
    return not bool(((places == first) | (places.isnan() & first.isnan())).all())


def _noise(model: nn.Module, graph: NetworkGraph) -> Tensor:
    weight = next(model.parameters(), torch.empty(0))
    return torch.randn(1, 3, graph.size, graph.size, generator=torch.Generator().manual_seed(0)).to(weight)


def _tracked(model: nn.Module, graph: NetworkGraph, nodes: Sequence[str]) -> Iterator[tuple[object, Where | None]]:
    """The values of nodes for one image of noise, and where their elements lie."""
    images = _noise(model, graph)
    with torch.no_grad(), PositionTracker(images) as tracker:
        values = graph.values(model, images, nodes)
    for node in nodes:
        value = values[node]
        yield value, tracker.of(value) if isinstance(value, Tensor) else None
