# SPDX-License-Identifier: MIT
"""Find the sites of a network in its graph: the tensors that only weights read (docs/method.md, *Site*).

No line names an architecture.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from salve.backbones.exported import Exported, ancestors, function_of
from salve.backbones.site import GraphTensor, Reader, Site

aten = torch.ops.aten

#: Operations in which a weight reads the first argument; not transposed convolutions, whose input channels lie on
#: another axis.
_LINEAR = (aten.linear.default,)
_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding),
)
#: Position of the number of groups among a convolution's arguments.
_GROUPS = 6
#: Operations that only rearrange the elements of their first argument.
_SHAPE = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int),
    *(aten.t.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default, aten.detach.default),
    *(aten.contiguous.default, aten.movedim.int, aten.movedim.intlist, aten.lift_fresh_copy.default),
)
#: Uses of a tensor that read only its size.
_SIZES = (aten.sym_size.int, aten._assert_tensor_metadata.default)
#: Operations whose result is never negative; those below keep the sign of what they are given.
_NOT_NEGATIVE = (
    *(aten.relu.default, aten.relu6.default, aten.sigmoid.default, aten.hardsigmoid.default, aten.softmax.int),
    *(aten._softmax.default, aten.square.default, aten.abs.default, aten.exp.default, aten.relu_.default),
    *(aten.relu6_.default, aten.sigmoid_.default, aten.hardsigmoid_.default),
)
_KEEPS_SIGN = (
    *(aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim),
    *(aten.adaptive_avg_pool1d.default, aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default),
    *(aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default, aten.roll.default),
    *(aten.amax.default, aten.sqrt.default),
)
#: Of these, those whose number among the arguments must not be negative either.
_WITH_A_NUMBER = (
    *(aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.constant_pad_nd.default),
)
#: Images of the example that a network is exported with: more than one, so that the batch is not taken for a constant.
EXAMPLE = 3


def find_sites(exported: Exported, values: Mapping[str, Any], fewer: Mapping[str, Any]) -> dict[str, Site]:
    """Find the sites.

    Args:
        exported: the graph.
        values: by node, its value for the example's images.
        fewer: the same without the last image.

    Returns:
        The sites by name, in the order of the forward pass.
    """
    readers = dict(_readers(exported))
    order = {node: number for number, node in enumerate(exported.graph.nodes)}
    found = []
    for source in dict.fromkeys(_source(_given(use)) for use in readers):
        uses = _uses(source, readers)
        if uses is None or source is exported.images:  # the images themselves are no activation
            continue
        node = source
        while len(users := _users(node)) == 1 and _is_shape(users[0]):
            node = users[0]
        uses.sort(key=order.__getitem__)
        axes = _axes(node, uses, values, fewer)
        if axes is not None:
            found.append((order[node], _described(exported, node, source, [readers[use] for use in uses], axes)))
            if any(_source(exported.last) is use for use in uses):
                at, site = found[-1]
                found[-1] = (at, replace(site, aliases=("last", *site.aliases)))
    return {site.name: site for _, site in sorted(found, key=lambda one: one[0])}


def _readers(exported: Exported) -> Iterator[tuple[fx.Node, Reader]]:
    """Every use of a parameter as a weight, if it is the parameter's only use."""
    for node in exported.graph.nodes:
        if node.target not in (*_LINEAR, *_CONVOLUTIONS) or not isinstance(node.args[1], fx.Node):
            continue
        weight = node.args[1]
        if weight.name in exported.weights and isinstance(node.args[0], fx.Node):
            groups: Any = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
            yield node, Reader(exported.weights[weight.name], groups)


def _is_shape(node: fx.Node) -> bool:
    """Whether a node only rearranges the elements of its first argument; dropout in eval mode leaves them alone."""
    if node.target in _SHAPE:
        return True
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target is aten.slice.Tensor:
        return node.meta["val"].shape == _given(node).meta["val"].shape
    return False


def _given(node: fx.Node) -> fx.Node:
    """A node's first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _source(node: fx.Node) -> fx.Node:
    """The tensor of which a node is a rearrangement; the node itself if it is none."""
    while _is_shape(node):
        node = _given(node)
    return node


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in _SIZES]


def _uses(node: fx.Node, readers: Mapping[fx.Node, Reader]) -> list[fx.Node] | None:
    """The operations in which weights read a tensor or a rearrangement of it; None if anything else reads it."""
    found: list[fx.Node] = []
    for user in _users(node):
        if user in readers and user.args[0] is node and list(user.all_input_nodes).count(node) == 1:
            found.append(user)
        elif _is_shape(user) and user.args[0] is node:
            more = _uses(user, readers)
            if more is None:
                return None
            found += more
        else:
            return None
    return found


class _Axes(NamedTuple):
    """Of a site's tensor; see :class:`GraphTensor`."""

    channel: int
    batch: int
    folded: int
    batch_first: bool
    positions: tuple[int, ...]


def _axes(node: fx.Node, uses: Sequence[fx.Node], values: Mapping[str, Any], fewer: Mapping[str, Any]) -> _Axes | None:
    """The axes of a site's tensor; None if they cannot be told."""
    tensor: Tensor = values[node.name]
    channels = {_channel_axis(node, use, values) for use in uses}
    batch = _batch_axis(tensor, fewer[node.name])
    channel = channels.pop()
    if channels or channel is None or batch is None or batch[0] == channel:
        return None
    axis, folded, batch_first = batch
    others = [size for number, size in enumerate(tensor.shape) if number not in (channel, axis)]
    positions = tuple(size for size in (folded, *others) if size > 1)
    return _Axes(channel, axis, folded, batch_first, positions if len(positions) < 3 else (math.prod(positions),))


def _described(exported: Exported, node: fx.Node, source: fx.Node, readers: Sequence[Reader], axes: _Axes) -> Site:
    return Site(
        name=readers[0].path,
        readers=tuple(readers),
        width=int(node.meta["val"].shape[axes.channel]),
        aliases=_aliases(source),
        positions=axes.positions,
        prefix_tokens=_prefix_tokens(exported, source, axes.positions),
        signed=not _is_not_negative(source),
        bypassed=_depends(exported.last, exported.images, without=source),
        in_graph=GraphTensor(node.name, axes.channel, axes.batch, axes.folded, axes.batch_first),
    )


def _channel_axis(node: fx.Node, use: fx.Node, values: Mapping[str, Any]) -> int | None:
    """Find the axis of a node's tensor that a reader takes as its input channels; None if there is none.

    Number the elements of the tensor and pass the numbers through the rearrangements up to the reader. Along the
    reader's channels, the numbers must be those along one axis of the tensor.
    """
    shape = values[node.name].shape
    numbers = torch.arange(math.prod(shape)).view(shape)
    read, chain = _given(use), list[fx.Node]()
    while read is not node:
        chain.append(read)
        read = _given(read)
    for step in reversed(chain):
        if step.target is not aten.dropout.default:
            arguments, keywords = fx.graph.map_arg((step.args[1:], step.kwargs), lambda other: values[other.name])
            numbers = function_of(step)(numbers, *arguments, **keywords)
    weight: Any = use.args[1]
    axis = -1 if use.target in _LINEAR else numbers.ndim - weight.meta["val"].ndim + 1
    steps = numbers.movedim(axis, 0).flatten(1)  # [M, …]
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :])
        along = size == len(steps) and (steps - steps[:1] == stride * torch.arange(size)[:, None]).all()
        if along and not ((steps[0] // stride) % size).any():
            return axis
    return None


def _batch_axis(tensor: Tensor, fewer: Tensor) -> tuple[int, int, bool] | None:
    """Find the batch axis: the one that grows with the number of images.

    Args:
        tensor: value of a node for the example's images.
        fewer: its value without the last image.

    Returns:
        The axis, how many positions share it with the images, and whether the rows of one image lie next to each other.
        None if it cannot be told.
    """
    grown = [axis for axis, (one, other) in enumerate(zip(tensor.shape, fewer.shape, strict=True)) if one != other]
    if len(grown) != 1 or tensor.shape[grown[0]] * (EXAMPLE - 1) != fewer.shape[grown[0]] * EXAMPLE:
        return None
    (axis,) = grown
    folded = tensor.shape[axis] // EXAMPLE
    if folded == 1:
        return axis, 1, True
    several, some = tensor.movedim(axis, 0), fewer.movedim(axis, 0)
    bound = 1e-3 * some.abs().max().clamp(min=1e-12)
    outer = bool((several[: len(some)] - some).abs().max() <= bound)
    inner = several.unflatten(0, (folded, EXAMPLE))[:, :-1] - some.unflatten(0, (folded, EXAMPLE - 1))
    return (axis, folded, outer) if outer != bool(inner.abs().max() <= bound) else None


def _is_not_negative(node: fx.Node) -> bool:
    """Whether a tensor cannot be negative, as far as the operations that made it tell."""
    if node.target in _NOT_NEGATIVE:
        return True
    if node.target in (aten.clamp.default, aten.hardtanh.default, aten.hardtanh_.default, aten.clamp_min.default):
        return len(node.args) > 1 and isinstance(node.args[1], int | float) and node.args[1] >= 0
    if node.target in _KEEPS_SIGN or _is_shape(node):
        given = [other for other in node.all_input_nodes if isinstance(other.meta.get("val"), Tensor)]
        numbers: list[Any] = []
        if node.target in _WITH_A_NUMBER:  # a factor, a summand, the factor of a summand, or what is put around a map
            numbers = [one for one in (*node.args, *node.kwargs.values()) if isinstance(one, int | float)]
        return bool(given) and all(one >= 0 for one in numbers) and all(_is_not_negative(other) for other in given)
    return False


def _prefix_tokens(exported: Exported, source: fx.Node, positions: tuple[int, ...]) -> int:
    """How many tokens, which do not depend on the images, were put before those of the image."""
    if len(positions) != 1:
        return 0
    for node in ancestors([source]):
        if node.target is aten.cat.default:
            given: Any = node.args[0]
            axis: Any = node.args[1] if len(node.args) > 1 else 0
            parts = [(part, part.meta["val"].shape[axis]) for part in given]
            fixed = [int(size) for _, size in parts if isinstance(size, int)]
            if len(fixed) == len(parts) and sum(fixed) == positions[0]:
                depends = [_depends(part, exported.images) for part, _ in parts]
                if any(depends) and not depends[0]:
                    return sum(fixed[: depends.index(True)])
    return 0


def _depends(node: fx.Node, images: fx.Node, without: fx.Node | None = None) -> bool:
    """Whether a tensor's values depend on the images, not on their number alone, on ways that avoid ``without``."""
    waiting, seen = [node], {node, without}
    while waiting:
        node = waiting.pop()
        if node is images:
            return True
        for other in node.all_input_nodes:
            if other not in seen and isinstance(other.meta.get("val"), Tensor):
                seen.add(other)
                waiting.append(other)
    return False


def _aliases(source: fx.Node) -> tuple[str, ...]:
    """The path of the outermost module whose output the tensor is, if it is one's."""
    for path in modules_of(source):
        if path and all(path not in modules_of(user) for user in _users(source)):
            return (path,)
    return ()


def modules_of(node: fx.Node) -> list[str]:
    """Paths of the modules that a node belongs to, from the outermost in."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
