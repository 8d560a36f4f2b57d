# SPDX-License-Identifier: MIT
"""Export a network's forward pass as a graph of tensor operations, and run parts of it.

The graph of ``torch.export`` shows every weight, the tensor that it reads, and what else reads this tensor, whatever
classes the network is made of.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import free_symbols

from salve.system import first_line
from salve.types import Images, UserError

aten = torch.ops.aten


class Exported:
    """The graph of a network.

    Args:
        model: the network, in eval mode. images: an example batch.

    Attributes:
        graph: the graph.
        images, last: the nodes of the images and of the logits.
        weights: by node, the names of the parameters that are used exactly once.
        any_batch: whether the graph takes batches of any size, or only as many images as the example has.

    Raises:
        UserError: the network cannot be exported, or has more than one output.
    """

    def __init__(self, model: nn.Module, images: Images) -> None:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = export(model, (images,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
                if _overwrites(program.graph):
                    program = program.run_decompositions({})  # takes twice as long as the export
        except Exception as error:  # torch.export raises almost anything
            raise UserError(f"This {type(model).__name__} cannot be exported ({first_line(error)}).") from error
        signature = program.graph_signature
        self.graph = program.graph
        self._parts = program.graph_module  # subgraphs that run in a mode of their own, such as autocast
        # A module that the network holds twice gives its weight two names.
        parameters = state_of(model)
        uses = Counter[int]()
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name in signature.inputs_to_parameters:
                uses[id(parameters[signature.inputs_to_parameters[node.name]])] += len(node.users)
        self.weights = {
            node: name for node, name in signature.inputs_to_parameters.items() if uses[id(parameters[name])] == 1
        }
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
        self._plans: dict[tuple[tuple[str, ...], frozenset[str]], list[tuple[fx.Node, list[str]]]] = {}
        self.any_batch = bool(free_symbols(self.images.meta["val"].shape[0]))

    def run(
        self,
        model: nn.Module,
        images: Images,
        goals: Sequence[str] = (),
        *,
        known: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Run the graph, or the part of it that some nodes need.

        Args:
            model: the network, for its parameters and buffers.
            images: the batch.
            goals: names of nodes; none for the logits.
            known: by node, values that are not computed again, but used as they are.
            weights: by name, parameters and buffers that are used in the place of the network's own.

        Returns:
            The values of the goals by name.
        """
        known, values = known or {}, dict[str, Any]()
        state = state_of(model) | dict(weights or {})
        for node, done in self._plan(tuple(goals) or (self.last.name,), frozenset(known)):
            if node.name in known:
                values[node.name] = known[node.name]
            elif node.op == "placeholder":
                values[node.name] = self._placeholder(node, state, images)
            elif node.op == "get_attr":
                values[node.name] = getattr(self._parts, str(node.target))
            else:
                arguments, keywords = fx.graph.map_arg((node.args, node.kwargs), lambda other: values[other.name])
                values[node.name] = function_of(node)(*arguments, **keywords)
            for name in done:
                del values[name]
        return values

    def _plan(self, goals: tuple[str, ...], known: frozenset[str]) -> list[tuple[fx.Node, list[str]]]:
        """The nodes to compute, in order, and after each the names of the values that are needed no longer."""
        key = goals, known
        if key not in self._plans:
            by_name = {node.name: node for node in self.graph.nodes}
            needed = ancestors([by_name[name] for name in goals], known)
            order = [node for node in self.graph.nodes if node in needed]
            last_use = {node.name: node for node in order}
            for node in order:
                if node.name not in known:
                    last_use |= dict.fromkeys((other.name for other in node.all_input_nodes), node)
            done: dict[fx.Node, list[str]] = {node: [] for node in order}
            for name, node in last_use.items():
                if name not in goals:
                    done[node].append(name)
            self._plans[key] = list(done.items())
        return self._plans[key]

    def beside(self, node: str) -> tuple[str, ...]:
        """The tensors, apart from weights and images, that the part of the graph behind a node reads beside it."""
        (start,) = (one for one in self.graph.nodes if one.name == node)
        behind, waiting = {start}, [start]
        while waiting:
            for user in waiting.pop().users:
                if user not in behind:
                    behind.add(user)
                    waiting.append(user)
        behind &= ancestors([self.last])
        read = {other for one in behind - {start} for other in one.all_input_nodes} - behind
        return tuple(one.name for one in self.graph.nodes if one in read and one.op == "call_function")

    def depends_on(self, node: str, weights: Container[str]) -> bool:
        """Whether a node's value depends on some of these parameters and buffers."""
        (goal,) = (one for one in self.graph.nodes if one.name == node)
        return any(self._states[one.name] in weights for one in ancestors([goal]) if one.name in self._states)

    def weights_before(self, node: str) -> set[str]:
        """Names of the parameters and buffers that a node's value depends on."""
        (goal,) = (one for one in self.graph.nodes if one.name == node)
        return {self._states[one.name] for one in ancestors([goal]) if one.name in self._states}

    def _placeholder(self, node: fx.Node, state: Mapping[str, Tensor], images: Images) -> Tensor:
        if node is self.images:
            return images
        if node.name in self._constants:
            constant = self._constants[node.name].to(images.device)
            return constant.to(images.dtype) if constant.is_floating_point() else constant
        return state[self._states[node.name]]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _overwrites(graph: fx.Graph) -> bool:
    """Whether an operation changes a tensor in place that other operations read too, by this name or as a view.

    The order of the operations would then matter, which :func:`ancestors` and a run in parts do not know.
    """
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and (not node.users or any(len(other.users) > 1 for other in node.all_input_nodes[:1]))
        for node in graph.nodes
    )


def function_of(node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls.

    ``reshape`` for ``view``, since strides may differ from those of the export; and for a function that changes its
    argument in place, the one that does not, since the argument may be used again in another run.
    """
    target: Any = node.target
    if target is aten.view.default:
        return aten.reshape.default
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        packet = getattr(aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
        return getattr(packet, target._overloadname, target)
    return target


def ancestors(nodes: Iterable[fx.Node], known: Container[str] = ()) -> set[fx.Node]:
    """The nodes and everything that they are computed from; nothing that only known ones are computed from."""
    waiting = list(nodes)
    found = set(waiting)
    while waiting:
        node = waiting.pop()
        for other in node.all_input_nodes if node.name not in known else ():
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found
