"""Export a network's forward pass as a graph of tensor operations, and run parts of it.

The graph of ``torch.export`` shows every weight, the tensor that it reads, and what else reads this tensor, whatever
classes the network is made of.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import free_symbols

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
                if _writes_into_views(program.graph):
                    program = program.run_decompositions({})  # takes twice as long as the export
        except Exception as error:  # torch.export raises almost anything
            first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            name = type(model).__name__
            raise UserError(f"This {name} cannot be exported ({type(error).__name__}: {first}).") from error
        signature = program.graph_signature
        self.graph = program.graph
        self._parts = program.graph_module  # subgraphs that run in a mode of their own, such as autocast
        # A module that the network holds twice gives its weight two names.
        parameters = _state(model)
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
        """Run the graph, or the part of it that one node needs.

        Args:
            model: the network, for its parameters and buffers.
            images: the batch.
            keep: return the values of all nodes instead of the last one alone.
            until: name of the node at which to stop; None for the logits.
            change: by node, a function that replaces the node's value.

        Returns:
            Values by the name of the node.
        """
        state = _state(model)
        goal = self.last if until is None else next(node for node in self.graph.nodes if node.name == until)
        needed = ancestors(goal)
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
            value = function_of(node)(*arguments, **keywords)
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


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _writes_into_views(graph: fx.Graph) -> bool:
    """Whether an operation writes into a view and nothing uses its result, so that :func:`ancestors` would miss it."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not node.users
        for node in graph.nodes
    )


def function_of(node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls; ``reshape`` for ``view``, since strides may differ from those of the export."""
    return aten.reshape.default if node.target is aten.view.default else node.target  # type: ignore[return-value]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    found, waiting = {node}, [node]
    while waiting:
        for other in waiting.pop().all_input_nodes:
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found
