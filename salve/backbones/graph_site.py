"""A site of a network's graph, and the weights that read it."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Reader:
    """A weight that reads a site: ``[out, M / groups, …]``.

    Attributes:
        weight: the parameter's name, as in the ``state_dict``. groups: of a convolution; 1 of a linear layer.
    """

    weight: str
    groups: int = 1

    @property
    def path(self) -> str:
        """The module that the weight belongs to."""
        return self.weight.rpartition(".")[0]

    def scaled(self, weight: Float[Tensor, "out in *k"], gate: Float[Tensor, " M"]) -> Float[Tensor, "out in *k"]:
        """Scale the input channels of the weight, so that it reads ``a`` as it would have read ``gate ⊙ a`` (Law 1)."""
        out, size = weight.shape[0] // self.groups, weight.shape[1]
        gates = gate.view(self.groups, 1, size).expand(self.groups, out, size).reshape(-1, size)
        return weight * gates.view(*gates.shape, *[1] * (weight.ndim - 2))


@dataclass(frozen=True)
class GraphSite:
    """A tensor that only weights read.

    Attributes:
        name: path of the first reader.
        aliases: further names: ``last`` at the head, and the path of the module whose output the tensor is.
        readers: the weights that read it, in the order of the forward pass.
        width: ``M``, the number of channels.
        positions: ``()`` of a vector, ``(H, W)`` or ``(T,)`` of a map.
        prefix_tokens: how many of the ``T`` tokens come before those of the image (CLS, registers).
        signed: whether activations can be negative.
        node: name of the tensor in the graph.
        channel_axis, batch_axis: axes of that tensor.
        folded: positions that share the batch axis with the images; 1 if none do.
        batch_first: whether the rows of one image lie next to each other on the batch axis, if positions share it.
    """

    name: str
    aliases: tuple[str, ...]
    readers: tuple[Reader, ...]
    width: int
    positions: tuple[int, ...]
    prefix_tokens: int
    signed: bool
    node: str
    channel_axis: int
    batch_axis: int
    folded: int = 1
    batch_first: bool = True

    @property
    def kind(self) -> str:
        """``vector`` or ``map``."""
        return "map" if math.prod(self.positions) > 1 else "vector"

    def rows(self, tensor: Tensor) -> Float[Tensor, "N P M"]:
        """Arrange the site's tensor as images by positions by channels."""
        moved = tensor.movedim((self.batch_axis, self.channel_axis), (0, -1))
        if self.folded == 1:
            return moved.reshape(len(moved), -1, self.width)
        images = len(moved) // self.folded
        if self.batch_first:
            return moved.reshape(images, -1, self.width)
        return moved.reshape(self.folded, images, -1, self.width).transpose(0, 1).reshape(images, -1, self.width)

    def gate_like(self, gate: Float[Tensor, " M"], tensor: Tensor) -> Tensor:
        """Shape a gate so that it multiplies the site's tensor channel by channel."""
        shape = [1] * tensor.ndim
        shape[self.channel_axis] = self.width
        return gate.view(shape)
