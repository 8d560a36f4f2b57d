# SPDX-License-Identifier: MIT
"""A site: a tensor in a network that nothing but weights reads (docs/method.md), and the weights that read it."""

import math
from dataclasses import dataclass
from typing import Literal

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

    @property
    def bias(self) -> str:
        """The name that the bias beside the weight has, if there is one."""
        return self.weight.removesuffix("weight") + "bias"

    def scaled(self, weight: Float[Tensor, "out in *k"], gate: Float[Tensor, " M"]) -> Float[Tensor, "out in *k"]:
        """Scale the input channels of the weight, so that it reads ``a`` as it would have read ``gate ⊙ a`` (Law 1)."""
        out, size = weight.shape[0] // self.groups, weight.shape[1]
        gates = gate.view(self.groups, 1, size).expand(self.groups, out, size).reshape(-1, size)
        return weight * gates.view(*gates.shape, *[1] * (weight.ndim - 2))


@dataclass(frozen=True)
class GraphTensor:
    """A site's tensor in the network's graph, and how it is laid out.

    Attributes:
        node: name of the tensor in the graph.
        channel_axis, batch_axis: axes of the tensor.
        folded: positions that share the batch axis with the images; 1 if none do.
        batch_first: whether the rows of one image lie next to each other on the batch axis, if positions share it.
    """

    node: str
    channel_axis: int
    batch_axis: int
    folded: int = 1
    batch_first: bool = True

    def rows(self, tensor: Tensor) -> Float[Tensor, "N P M"]:
        """Arrange the site's tensor as images by positions by channels."""
        moved = tensor.movedim((self.batch_axis, self.channel_axis), (0, -1))
        images, width = len(moved) // self.folded, moved.shape[-1]
        if self.folded > 1 and not self.batch_first:
            moved = moved.unflatten(0, (self.folded, images)).transpose(0, 1)
        return moved.reshape(images, -1, width)

    def tensor(self, rows: Float[Tensor, "N P M"], like: Tensor) -> Tensor:
        """Arrange rows as the site's tensor: the reverse of :meth:`rows`; ``like`` has the tensor's shape."""
        moved = like.movedim((self.batch_axis, self.channel_axis), (0, -1))
        if self.folded > 1 and not self.batch_first:
            shape = (len(rows), self.folded, *moved.shape[1:])
            filled = rows.reshape(shape).transpose(0, 1).reshape(moved.shape)
        else:
            filled = rows.reshape(moved.shape)
        return filled.movedim((0, -1), (self.batch_axis, self.channel_axis))

    def gate(self, gate: Float[Tensor, "*N M"], tensor: Tensor) -> Tensor:
        """Multiply the site's tensor by a gate, one for all images ``[M]`` or one for each image ``[N, M]``."""
        shape = [1] * tensor.ndim
        shape[self.channel_axis] = gate.shape[-1]
        if gate.ndim == 1:
            return tensor * gate.view(shape)
        if self.folded > 1:
            gate = gate.repeat_interleave(self.folded, 0) if self.batch_first else gate.repeat(self.folded, 1)
        shape[self.batch_axis] = len(gate)
        return tensor * (gate if self.batch_axis < self.channel_axis else gate.T).reshape(shape)


@dataclass(frozen=True)
class Site:
    """A tensor that only weights read.

    Attributes:
        name: the setting ``layer``: the path of the first reader, or of the last site a name that people know.
        readers: the weights that read it, in the order of the forward pass.
        width: ``M``, the number of channels.
        aliases: further names: ``last``, the path of the module whose output the tensor is.
        positions: ``()`` of a vector, ``(H, W)`` or ``(T,)`` of a map.
        prefix_tokens: how many of the ``T`` tokens, of the site or of its map, come before those of the image (CLS,
            registers).
        signed: whether activations can be negative, as far as the network's graph tells.
        bypassed: whether the images also reach the logits on a way around it, such as a skip connection, as far as
            the graph tells. Gates cannot take away what goes that way.
        map: module path of the spatial map ``[N, M', H, W]`` or token grid ``[N, T, M']`` for Grad-FAM; empty if the
            activation depends on none, or is a map itself.
        map_side: whether the map is the input or the output of that module.
        in_graph: its tensor in the network's graph; None of the last site, which the head's module is given.
    """

    name: str
    readers: tuple[Reader, ...]
    width: int
    aliases: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    prefix_tokens: int = 0
    signed: bool = True
    bypassed: bool = False
    map: str = ""
    map_side: Literal["input", "output"] = "output"
    in_graph: GraphTensor | None = None

    @property
    def kind(self) -> str:
        """``vector`` or ``map``."""
        return "map" if self.count > 1 else "vector"

    @property
    def count(self) -> int:
        """``P``, the number of positions."""
        return math.prod(self.positions)
