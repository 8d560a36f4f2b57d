"""A network as the graph of its tensor operations, and the sites found in it (docs/method.md, *Site*).

``torch.export`` turns a forward pass into a graph of ATen operations, in which a weight, the tensor that it reads and
everything else that reads this tensor can be seen, whatever classes the network is written in. No line here names an
architecture.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import free_symbols

from salve.types import Images, UserError

aten = torch.ops.aten

#: Weights that read their first argument; transposed convolutions are left out, since their channels lie elsewhere.
_LINEAR = (aten.linear.default,)
_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding),
)
#: Position of the number of groups among a convolution's arguments.
_GROUPS = 6
#: Operations that give the elements of their first argument another arrangement, and nothing else.
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
    *(
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.mul.Tensor,
        aten.mul_.Tensor,
        aten.cat.default,
        aten.roll.default,
        aten.amax.default,
        aten.sqrt.default,
    ),
)
#: Images of the example that a network is exported with: more than one, so that the batch is not taken for a constant.
EXAMPLE = 3
#: Of the largest logit, by how much the graph's may differ from the network's own.
_SAME = 1e-4


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


class NetworkGraph:
    """The graph of a network in eval mode, for batches of any size, and its sites.

    Args:
        model: an image classifier, which is left as it is. size: pixels of a side of its square images.

    Attributes:
        sites: by name, in the order in which they are computed.

    Raises:
        UserError: the network is in train mode or cannot be exported, or its graph computes something else.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        if model.training:
            raise UserError(f"This {type(model).__name__} is in train mode; call model.eval() first.")
        weight = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(EXAMPLE, 3, size, size, generator=generator).to(weight)
        self._exported = _Exported(model, images)
        self._of_batch = {EXAMPLE: self._exported}
        with torch.no_grad():
            values = self._exported.run(model, images, keep=True)
            logits, own = values[self._exported.last.name], model(images)
        if own.shape != logits.shape or (own - logits).abs().max() > _SAME * own.abs().max().clamp(min=1e-6):
            name = type(model).__name__
            raise UserError(f"The graph that torch.export makes of this {name} computes something else than it does.")
        with torch.no_grad():
            fewer = self._for(model, images[:-1]).run(model, images[:-1], keep=True)
        self.sites = _find(self._exported, values, fewer)

    def logits(self, model: nn.Module, images: Images) -> Float[Tensor, "N C"]:
        """What the network answers, computed by the graph."""
        exported = self._for(model, images)
        answer: Tensor = exported.run(model, images)[exported.last.name]
        return answer

    def activations(self, model: nn.Module, site: GraphSite, images: Images) -> Float[Tensor, "N P M"]:
        """A site's activations; what is behind the site is not computed."""
        return site.rows(self._for(model, images).run(model, images, until=site.node)[site.node])

    def gated_logits(
        self, model: nn.Module, site: GraphSite, gate: Float[Tensor, " M"], images: Images
    ) -> Float[Tensor, "N C"]:
        """Logits with the site's tensor multiplied by a gate."""
        exported = self._for(model, images)
        change = {site.node: lambda tensor: tensor * site.gate_like(gate, tensor)}
        answer: Tensor = exported.run(model, images, change=change)[exported.last.name]
        return answer

    def _for(self, model: nn.Module, images: Images) -> "_Exported":
        """The graph for as many images; a network that asks for their number as a plain int has one for each number."""
        if self._exported.any_batch:
            return self._exported
        if len(images) not in self._of_batch:
            self._of_batch[len(images)] = _Exported(model, images)
        return self._of_batch[len(images)]


class _Exported:
    """One exported graph.

    Attributes:
        graph: its nodes. weights: names of parameters by the name of their node. last: the node of the logits.
        any_batch: whether it takes batches of any size.
    """

    def __init__(self, model: nn.Module, images: Images) -> None:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = export(model, (images,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        except Exception as error:  # torch.export raises almost anything
            first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            name = type(model).__name__
            raise UserError(f"This {name} cannot be exported ({type(error).__name__}: {first}).") from error
        signature = program.graph_signature
        self.graph = program.graph
        self._parts = program.graph_module  # of the network that run in a mode of their own, such as autocast
        self.weights = dict(signature.inputs_to_parameters)
        self._states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
        self._constants = {
            node: program.constants[target] for node, target in constants.items() if target in program.constants
        }
        self.images, *others = (node for node in self.graph.nodes if node.name in signature.user_inputs)
        (outputs,) = self.graph.find_nodes(op="output")
        answers = outputs.args[0]
        if len(answers) != 1 or others:
            raise UserError(f"This {type(model).__name__} gives {len(answers)} outputs for an image instead of logits.")
        self.last: fx.Node = answers[0]
        self.any_batch = bool(free_symbols(self.images.meta["val"].shape[0]))

    def run(
        self,
        model: nn.Module,
        images: Images,
        *,
        keep: bool = False,
        until: str | None = None,
        change: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> dict[str, Any]:
        """Values of nodes by name: of the last one, or of ``until`` alone, and where ``keep`` is set of all.

        Args:
            change: by the name of a node, what its value is replaced by.
        """
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        goal = self.last if until is None else next(node for node in self.graph.nodes if node.name == until)
        needed = _ancestors(goal)
        left = {node.name: sum(user in needed for user in node.users) for node in needed}
        values: dict[str, Any] = {}
        for node in self.graph.nodes:
            if node not in needed:
                continue
            if node.op == "placeholder":
                values[node.name] = self._placeholder(node, state, images)
                continue
            if node.op == "get_attr":
                values[node.name] = getattr(self._parts, str(node.target))
                continue
            arguments, keywords = fx.graph.map_arg((node.args, node.kwargs), lambda other: values[other.name])
            value = _function(node)(*arguments, **keywords)
            values[node.name] = change[node.name](value) if change and node.name in change else value
            for other in node.all_input_nodes:
                left[other.name] -= 1
                if not left[other.name] and not keep and other is not goal:
                    del values[other.name]
        return values

    def _placeholder(self, node: fx.Node, state: Mapping[str, Tensor], images: Images) -> Tensor:
        if node is self.images:
            return images
        if node.name in self._constants:
            constant = self._constants[node.name].to(images.device)
            return constant.to(images.dtype) if constant.is_floating_point() else constant
        return state[self._states[node.name]]


def _function(node: fx.Node) -> Callable[..., Any]:
    """What a node calls. Strides may be others than those that were exported, and views of them impossible."""
    return aten.reshape.default if node.target is aten.view.default else node.target  # type: ignore[return-value]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        for other in waiting.pop().all_input_nodes:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


# -- finding sites


def _find(exported: _Exported, values: Mapping[str, Any], fewer: Mapping[str, Any]) -> dict[str, GraphSite]:
    """The sites by name.

    Args:
        exported: the graph. values: of its nodes, for the example's images. fewer: likewise, without the last image.
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


def _readers(exported: _Exported) -> Iterator[tuple[fx.Node, Reader]]:
    """Every use of a parameter as a weight, if it is the parameter's only use."""
    for node in exported.graph.nodes:
        if node.target not in (*_LINEAR, *_CONVOLUTIONS) or not isinstance(node.args[1], fx.Node):
            continue
        weight = node.args[1]
        if weight.name in exported.weights and len(weight.users) == 1 and isinstance(node.args[0], fx.Node):
            groups: Any = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
            yield node, Reader(exported.weights[weight.name], groups)


def _is_shape(node: fx.Node) -> bool:
    """Whether a node only arranges its first argument's elements otherwise; in eval mode dropout leaves them alone."""
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
    """The tensor that a node shows, perhaps in another arrangement."""
    while _is_shape(node):
        node = _given(node)
    return node


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in _SIZES]


def _uses(node: fx.Node, readers: Mapping[fx.Node, Reader]) -> list[fx.Node] | None:
    """The readers of a tensor, through changes of its shape; None if anything else reads it."""
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
    """Of a site's tensor; see :class:`GraphSite`."""

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


def _described(
    exported: _Exported, node: fx.Node, source: fx.Node, readers: Sequence[Reader], axes: _Axes
) -> GraphSite:
    return GraphSite(
        name=readers[0].path,
        aliases=_aliases(source),
        readers=tuple(readers),
        width=int(node.meta["val"].shape[axes.channel]),
        positions=axes.positions,
        prefix_tokens=_prefix_tokens(exported, source, axes.positions),
        signed=not _is_not_negative(source),
        node=node.name,
        channel_axis=axes.channel,
        batch_axis=axes.batch,
        folded=axes.folded,
        batch_first=axes.batch_first,
    )


def _channel_axis(node: fx.Node, use: fx.Node, values: Mapping[str, Any]) -> int | None:
    """The axis of a node's tensor that is a reader's input channels; None if they are no axis of it.

    The numbers of the tensor's elements go through whatever stands between it and the reader; along the reader's
    channels they must be those along one axis of the tensor.
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
            numbers = _function(step)(numbers, *arguments, **keywords)
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
    """The axis that grows with the images, how many positions are folded into it, and whether images come first in it.

    Args:
        tensor: for the example's images. fewer: for all but the last of them.
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
    if node.target in _NOT_NEGATIVE:
        return True
    if node.target in (aten.clamp.default, aten.hardtanh.default, aten.hardtanh_.default, aten.clamp_min.default):
        return len(node.args) > 1 and isinstance(node.args[1], int | float) and node.args[1] >= 0
    if node.target in _KEEPS_SIGN or _is_shape(node):
        given = [other for other in node.all_input_nodes if isinstance(other.meta.get("val"), Tensor)]
        numbers = [number for number in node.args if isinstance(number, int | float) and not isinstance(number, bool)]
        pads = node.target not in (aten.mul.Tensor, aten.mul_.Tensor) or all(number >= 0 for number in numbers)
        return bool(given) and pads and all(_is_not_negative(other) for other in given)
    return False


def _prefix_tokens(exported: _Exported, source: fx.Node, positions: tuple[int, ...]) -> int:
    """Tokens before the image's: those that do not depend on the images, where both are put together."""
    if len(positions) != 1:
        return 0
    for node in _ancestors(source):
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


def _depends(node: fx.Node, images: fx.Node) -> bool:
    """Whether a tensor's values depend on the images, and not on their number alone."""
    waiting, seen = [node], {node}
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
    for path in _modules(source):
        if path and all(path not in _modules(user) for user in _users(source)):
            return (path,)
    return ()


def _modules(node: fx.Node) -> list[str]:
    """Paths of the modules that a node belongs to, from the outermost in."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
