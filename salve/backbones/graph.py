# SPDX-License-Identifier: MIT
"""The sites of a network, their activations, and the logits with a site gated."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.exported import Exported, ancestors
from salve.backbones.found import EXAMPLE, find_sites, modules_of
from salve.backbones.site import Site
from salve.system import first_line
from salve.types import Images, UserError

#: Of the largest logit, by how much the graph's may differ from the network's own.
_SAME = 1e-4


class NetworkGraph:
    """The graph of a network in eval mode, for batches of any size, and its sites.

    Args:
        model: an image classifier; it is not changed.
        size: side of its square images in pixels.

    Attributes:
        size: as given.
        sites: by name, in the order of the forward pass.

    Raises:
        UserError: the network is in train mode, cannot read images of this size or cannot be exported, or its graph
            computes something else.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        if model.training:
            raise UserError(f"This {type(model).__name__} is in train mode; call model.eval() first.")
        self.size = size
        weight = next(model.parameters(), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(EXAMPLE, 3, size, size, generator=generator).to(weight)
        own = _answer(model, images)
        self._exported = Exported(model, images)
        self._of_batch = {EXAMPLE: self._exported}
        with torch.no_grad():
            values = self._every_value(model, images)
        logits = values[self._exported.last.name]
        if own.shape != logits.shape or (own - logits).abs().max() > _SAME * own.abs().max().clamp(min=1e-6):
            name = type(model).__name__
            raise UserError(f"The graph that torch.export makes of this {name} does not give its logits.")
        with torch.no_grad():
            fewer = self._every_value(model, images[:-1])
        self.sites = find_sites(self._exported, values, fewer)

    def logits(self, model: nn.Module, images: Images) -> Float[Tensor, "N C"]:
        """The logits, computed by the graph."""
        exported = self._for(model, images)
        answer: Tensor = exported.run(model, images)[exported.last.name]
        return answer

    def activations(self, model: nn.Module, site: Site, images: Images) -> Float[Tensor, "N P M"]:
        """The activations of a site. Nothing behind the site is computed."""
        assert site.in_graph is not None, "this site is not one of the graph"
        node = site.in_graph.node
        return site.in_graph.rows(self._for(model, images).run(model, images, (node,))[node])

    def values(
        self, model: nn.Module, images: Images, nodes: Sequence[str], known: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The values of nodes, by name; the ``known`` ones are used as they are, not computed."""
        return self._for(model, images).run(model, images, nodes, known=known)

    def in_front(self, node: str) -> list[str]:
        """Names of the nodes that a node's value is computed from, in the order of the forward pass."""
        found = ancestors([one for one in self._exported.graph.nodes if one.name == node])
        return [one.name for one in self._exported.graph.nodes if one in found and one.op == "call_function"][:-1]

    def outputs_of(self, path: str) -> list[str]:
        """Names of the nodes inside a module that the network outside of it reads."""
        return [
            node.name
            for node in self._exported.graph.nodes
            if path in modules_of(node) and any(path not in modules_of(user) for user in node.users)
        ]

    def tail(self, model: nn.Module, site: Site, images: Images, order: Tensor | None = None) -> "GraphTail":
        """The tail of a site for some images; see :class:`GraphTail`."""
        return GraphTail(self._for(model, images), model, site, images, order)

    def weights_before(self, site: Site) -> set[str]:
        """Names of the parameters and buffers that the activations of a site depend on."""
        assert site.in_graph is not None, "this site is not one of the graph"
        return self._exported.weights_before(site.in_graph.node)

    def _every_value(self, model: nn.Module, images: Images) -> dict[str, Any]:
        """The values of all nodes that the logits depend on."""
        exported = self._for(model, images)
        return exported.run(model, images, [node.name for node in ancestors([exported.last])])

    def _for(self, model: nn.Module, images: Images) -> "Exported":
        """The graph for so many images; a network that reads their number as a plain int needs one for each number."""
        if self._exported.any_batch:
            return self._exported
        if len(images) not in self._of_batch:
            self._of_batch[len(images)] = Exported(model, images)
        return self._of_batch[len(images)]


@torch.no_grad()
def _answer(model: nn.Module, images: Images) -> Tensor:
    """The network's own logits; what it raises becomes a UserError."""
    try:
        logits: Tensor = model(images)
    except Exception as error:  # a network that was never seen before raises what it likes
        side = images.shape[-1]
        raise UserError(
            f"This {type(model).__name__} cannot read {side} × {side} images ({first_line(error)})."
        ) from error
    return logits


class GraphTail:
    """The tail of a site in a network's graph, for one batch of images.

    What by-passes the site, such as a skip connection, keeps the value that it has for these images. Only what depends
    on the site is computed when the tail is called. Gradients flow from logits to activations where they are on.

    Args:
        exported: the graph. model: the network. site: found in the graph. images: ``[N, 3, H, W]``.
        order: ``[C]``, the outputs in the order wanted; None for all in their own.

    Attributes:
        activations: of the site, ``[N, P, M]``.
    """

    def __init__(
        self, exported: Exported, model: nn.Module, site: Site, images: Images, order: Tensor | None = None
    ) -> None:
        assert site.in_graph is not None, "this site is not one of the graph"
        self._exported, self._model, self._images, self._order = exported, model, images, order
        self._in_graph = site.in_graph
        beside = exported.beside(site.in_graph.node)
        with torch.no_grad():
            self._held: dict[str, Any] = exported.run(model, images, (site.in_graph.node, *beside))
        self._tensor: Tensor = self._held[site.in_graph.node]
        self._kept: dict[frozenset[str], list[str]] = {}  # by changed weights, what is held and does not depend on them
        self.activations = site.in_graph.rows(self._tensor)

    def __len__(self) -> int:
        """``N``, the number of images."""
        return len(self.activations)

    @property
    def bytes(self) -> int:
        """Of the tensors that are held."""
        return sum(value.nbytes for value in self._held.values() if isinstance(value, Tensor))

    def __call__(self, activations: Float[Tensor, "N P M"]) -> Float[Tensor, "N C"]:
        """The logits with other activations at the site, in the same order of images and positions."""
        return self._logits(self._in_graph.tensor(activations, self._tensor))

    def gated(self, gate: Float[Tensor, "*N M"]) -> Float[Tensor, "N C"]:
        """The logits with every position gated, for all images alike ``[M]`` or for each image ``[N, M]``."""
        return self._logits(self._in_graph.gate(gate, self._tensor))

    def with_weights(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "N C"]:
        """The logits with other values of some parameters and buffers, wherever in the network they are.

        Only what depends on them is computed again. Gradients flow to the weights where they are on.
        """
        moved = frozenset(weights)
        if moved not in self._kept:
            self._kept[moved] = [node for node in self._held if not self._exported.depends_on(node, moved)]
        known = {node: self._held[node] for node in self._kept[moved]}
        return self._ordered(self._exported.run(self._model, self._images, known=known, weights=weights))

    def _logits(self, tensor: Tensor) -> Tensor:
        known = {**self._held, self._in_graph.node: tensor}
        return self._ordered(self._exported.run(self._model, self._images, known=known))

    def _ordered(self, found: Mapping[str, Tensor]) -> Tensor:
        (logits,) = found.values()
        return logits if self._order is None else logits[:, self._order]
