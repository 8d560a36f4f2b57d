# SPDX-License-Identifier: MIT
"""A network cut in two at a site: the front makes activations of images, the tail makes logits of activations."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.graph import GraphTail, NetworkGraph
from salve.backbones.site import Site
from salve.backbones.sites import graph_of, site_activations
from salve.backbones.tail import LinearTail
from salve.types import Images, UserError


class Cut:
    """A network cut in two at a site.

    Args:
        model: the network, frozen and in eval mode. site: where.
        order: ``[C]``, the network's outputs, those of the data's classes first.
        graph: of the network; needed for all sites but the last.

    Attributes:
        model, site, order: as given.
        linear: the tail on the CPU if it is one linear layer, that is at the last site; None elsewhere.

    Raises:
        UserError: the linear tail holds NaN or infinite weights.
    """

    def __init__(self, model: nn.Module, site: Site, order: Tensor, graph: NetworkGraph | None = None) -> None:
        self.model, self.site, self.order = model, site, order
        self._graph = graph
        self.linear = linear_tail(model, site, order) if site.in_graph is None else None

    def __getstate__(self) -> dict[str, Any]:
        """A graph cannot be pickled: where the cut is sent to, the network is exported again."""
        return {**self.__dict__, "_graph": self._graph and self._graph.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        size = state.pop("_graph")
        self.__dict__.update(state)
        self._graph = None if size is None else graph_of(self.model, size)

    def of(self, model: nn.Module) -> "Cut":
        """The same cut through the same network with other weights."""
        return Cut(model, self.site, self.order, self._graph)

    def read(self, images: Images) -> Float[Tensor, "N P M"]:
        """The activations of images ``[N, 3, H, W]``."""
        if self.site.in_graph is None:
            return site_activations(self.model, self.site, images)[:, None]
        return self._known_graph().activations(self.model, self.site, images)

    def tail(self, images: Images) -> GraphTail:
        """The tail for some images, of a site in the graph."""
        return self._known_graph().tail(self.model, self.site, images, self.order.to(images.device))

    def logits(self, images: Images) -> Float[Tensor, "N C"]:
        """The logits of the whole network, those of the data's classes first."""
        logits: Tensor = self.model(images)
        return logits[:, self.order.to(logits.device)]

    def on(self, model: nn.Module, site: Site) -> "Cut":
        """The cut of a network that differs from this one in its weights alone, at another site of the graph."""
        return Cut(model, site, self.order, self._known_graph())

    def sites_onward(self) -> list[Site]:
        """This site and those that come later in the forward pass; the last site alone if the cut is there."""
        if self.site.in_graph is None:
            return [self.site]
        found = list(self._known_graph().sites.values())
        return found[[site.readers for site in found].index(self.site.readers) :]

    def weights_before(self) -> set[str]:
        """Names of the tensors of the ``state_dict`` that the activations depend on."""
        if self.site.in_graph is None:
            own = {name for reader in self.site.readers for name in (reader.weight, reader.bias)}
            return set(self.model.state_dict()) - own
        return self._known_graph().weights_before(self.site)

    def _known_graph(self) -> NetworkGraph:
        assert self._graph is not None, "a site in the graph comes with it"
        return self._graph


def linear_tail(model: nn.Module, site: Site, order: Tensor) -> LinearTail:
    """The linear layer behind the last site of a network, on the CPU.

    Args:
        model: the network. site: the last. order: ``[C]``, its outputs in the order wanted.

    Raises:
        UserError: some of its weights are NaN or infinite.
    """
    reader = site.readers[0]
    weight = model.get_parameter(reader.weight).detach().cpu()
    found = getattr(model.get_submodule(reader.path), "bias", None)
    bias = torch.zeros(len(weight)) if found is None else found.detach().cpu()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(
            f"The classifier's head ({reader.path}) holds NaN or infinite weights, so its predictions mean nothing; "
            "check backbone.weights."
        )
    return LinearTail(weight.flatten(1)[order], bias[order])
