"""A site of a network's graph, and the weights that read it."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Reader:
    """A weight that reads a site: ``[out, M / groups, …]``.

    Attributes:
        weight: the parameter's name, as in the ``state_dict``. groups: of a convolution; 1 for a linear layer.
    """

    weight: str
    groups: int = 1

    @property
    def path(self) -> str:
        """The module that the weight belongs to."""
        return self.weight.rpartition(".")[0]

    def scaled(self, weight: Float[Tensor, "out in *k"], gate: Float[Tensor, " M"]) -> Float[Tensor, "out in *k"]:
        """The weight that reads ``a`` as this one reads ``gate ⊙ a`` (Law 1)."""
        out, size = weight.shape[0] // self.groups, weight.shape[1]
        gates = gate.view(self.groups, 1, size).expand(self.groups, out, size).reshape(-1, size)
        return weight * gates.view(*gates.shape, *[1] * (weight.ndim - 2))


@dataclass(frozen=True)
class GraphSite:
    """A tensor that nothing but weights reads.

    Attributes:
        name: the first reader's path. aliases: other names that it goes by: ``last`` at the head, and the module whose
            output it is. readers: in the order in which they read. width: ``M``.
        positions: sizes of the axes that are neither batch nor channels: ``()`` of a vector, ``(H, W)``, ``(T,)``.
        prefix_tokens: of these ``T``, tokens before those of the image (CLS, registers).
        signed: whether its activations can be negative.
        node: the tensor's name in the graph. channel_axis: of the tensor. batch_axis: likewise; where the batch is
            folded into an axis with other positions, that axis, and ``batch_first`` says whether the batch is the
            outer of the two.
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
        """The site's tensor as images by positions by channels."""
        moved = tensor.movedim((self.batch_axis, self.channel_axis), (0, -1))
        if self.folded == 1:
            return moved.reshape(len(moved), -1, self.width)
        images = len(moved) // self.folded
        if self.batch_first:
            return moved.reshape(images, -1, self.width)
        return moved.reshape(self.folded, images, -1, self.width).transpose(0, 1).reshape(images, -1, self.width)

    def gate_like(self, gate: Float[Tensor, " M"], tensor: Tensor) -> Tensor:
        """A gate in a shape that multiplies the site's tensor channel by channel."""
        shape = [1] * tensor.ndim
        shape[self.channel_axis] = self.width
        return gate.view(shape)
