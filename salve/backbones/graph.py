"""The sites of a network, their activations, and the logits with a site gated."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.exported import Exported
from salve.backbones.found import EXAMPLE, find_sites
from salve.backbones.graph_site import GraphSite, Reader
from salve.types import Images, UserError

__all__ = ["GraphSite", "NetworkGraph", "Reader"]

#: Of the largest logit, by how much the graph's may differ from the network's own.
_SAME = 1e-4


class NetworkGraph:
    """The graph of a network in eval mode, for batches of any size, and its sites.

    Args:
        model: an image classifier; it is not changed.
        size: side of its square images in pixels.

    Attributes:
        sites: by name, in the order of the forward pass.

    Raises:
        UserError: the network is in train mode or cannot be exported, or its graph computes something else.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        if model.training:
            raise UserError(f"This {type(model).__name__} is in train mode; call model.eval() first.")
        weight = next(model.parameters(), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(EXAMPLE, 3, size, size, generator=generator).to(weight)
        self._exported = Exported(model, images)
        self._of_batch = {EXAMPLE: self._exported}
        with torch.no_grad():
            values = self._exported.run(model, images, keep=True)
            logits, own = values[self._exported.last.name], model(images)
        if own.shape != logits.shape or (own - logits).abs().max() > _SAME * own.abs().max().clamp(min=1e-6):
            name = type(model).__name__
            raise UserError(f"The graph that torch.export makes of this {name} does not give its logits.")
        with torch.no_grad():
            fewer = self._for(model, images[:-1]).run(model, images[:-1], keep=True)
        self.sites = find_sites(self._exported, values, fewer)

    def logits(self, model: nn.Module, images: Images) -> Float[Tensor, "N C"]:
        """The logits, computed by the graph."""
        exported = self._for(model, images)
        answer: Tensor = exported.run(model, images)[exported.last.name]
        return answer

    def activations(self, model: nn.Module, site: GraphSite, images: Images) -> Float[Tensor, "N P M"]:
        """The activations of a site. Nothing behind the site is computed."""
        return site.rows(self._for(model, images).run(model, images, until=site.node)[site.node])

    def gated_logits(
        self, model: nn.Module, site: GraphSite, gate: Float[Tensor, " M"], images: Images
    ) -> Float[Tensor, "N C"]:
        """The logits, with the site's tensor multiplied by a gate."""
        exported = self._for(model, images)
        change = {site.node: lambda tensor: tensor * site.gate_like(gate, tensor)}
        answer: Tensor = exported.run(model, images, change=change)[exported.last.name]
        return answer

    def _for(self, model: nn.Module, images: Images) -> "Exported":
        """The graph for so many images; a network that reads their number as a plain int needs one for each number."""
        if self._exported.any_batch:
            return self._exported
        if len(images) not in self._of_batch:
            self._of_batch[len(images)] = Exported(model, images)
        return self._of_batch[len(images)]
