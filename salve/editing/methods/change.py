# SPDX-License-Identifier: MIT
"""What an edit does to a network at one strength: a change of a site's activations, of weights, or both alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.backbones.site import Reader, Site
from salve.types import UserError

#: A function of the activations of a site, ``[N, P, M] → [N, P, M]``.
Activations = Callable[[Tensor], Tensor]
#: New values of tensors of the ``state_dict``, by name.
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Change:
    """What an edit does at one strength.

    Attributes:
        activations: the change of the site's activations ``[N, P, M]``; None if the edit is none.
        weights: computes the tensors of the ``state_dict`` that differ, which makes the edit permanent; None if no
            change of weights does what the edit does.
        why_not_permanent: why there are no weights, as part of a sentence.

    Raises:
        ValueError: there is neither.
    """

    activations: Activations | None = None
    weights: Callable[[], Weights] | None = None
    why_not_permanent: str = ""

    def __post_init__(self) -> None:
        if self.activations is None and self.weights is None:
            raise ValueError("A change is one of activations, of weights, or of both.")

    @property
    def permanent(self) -> bool:
        """Whether a plain ``state_dict`` can hold it."""
        return self.weights is not None


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine change of every position's activation, ``a' = g ⊙ a − L Rᵀ a + q``; what is None is left out.

    Attributes:
        gate: ``g`` ``[M]``. left, right: ``L`` and ``R`` ``[M, r]``. shift: ``q`` ``[M]``.
    """

    gate: Float[Tensor, " M"] | None = None
    left: Float[Tensor, "M r"] | None = None
    right: Float[Tensor, "M r"] | None = None
    shift: Float[Tensor, " M"] | None = None

    def __call__(self, activations: Float[Tensor, "*N M"]) -> Float[Tensor, "*N M"]:
        """The changed activations, in their own dtype."""
        changed = activations if self.gate is None else activations * self.gate.to(activations)
        if self.left is not None and self.right is not None:
            changed = changed - (activations @ self.right.to(activations)) @ self.left.to(activations).T
        return changed if self.shift is None else changed + self.shift.to(activations)

    def weights(self, model: nn.Module, site: Site) -> Weights:
        """The readers' weights and biases with which the network reads ``a`` as it would have read ``a'``.

        ``W' = W diag(g) − (W L) Rᵀ`` at every tap of a kernel, and ``b' = b + W q``, summed over a kernel's taps.

        Args:
            model: the network. site: where the change is.

        Raises:
            UserError: some reader cannot hold the change; see :meth:`obstacle`.
        """
        if obstacle := self.obstacle(model, site):
            raise UserError(f"At the site {site.name} this edit has no permanent form: {obstacle}.")
        state = model.state_dict()
        found: Weights = {}
        for reader in site.readers:
            weight = state[reader.weight]
            wide = weight.double()
            changed = wide if self.gate is None else reader.scaled(wide, self.gate.to(wide))
            if self.left is not None and self.right is not None:
                seen = torch.einsum("om...,mr->or...", wide, self.left.to(wide))  # W L
                changed = changed - torch.einsum("or...,mr->om...", seen, self.right.to(wide))
            if self.gate is not None or self.left is not None:
                found[reader.weight] = changed.to(weight)
            if self.shift is not None and bool(self.shift.any()):
                bias = state[reader.bias]
                added = reader.scaled(wide, self.shift.to(wide)).flatten(1).sum(dim=1)  # W q
                found[reader.bias] = (bias.double() + added).to(bias)
        return found

    def obstacle(self, model: nn.Module, site: Site) -> str:
        """Why the readers cannot hold the change, as part of a sentence; empty if they can."""
        for reader in site.readers:
            if self.left is not None and reader.groups > 1:
                return (
                    f"{reader.weight} is a convolution in {reader.groups} groups, each of which reads its own channels"
                )
            if self.shift is not None and bool(self.shift.any()):
                if _pads(model, reader):
                    return f"{reader.path} pads its input with zeros, to which nothing is added"
                if reader.bias not in model.state_dict():
                    return f"{reader.path} has no bias to hold what is added"
        return ""

    def change(self, model: nn.Module, site: Site) -> Change:
        """Both forms of the change; only that of the activations where the readers cannot hold it."""
        if obstacle := self.obstacle(model, site):
            return Change(self, None, obstacle)
        return Change(self, lambda: self.weights(model, site))


def _pads(model: nn.Module, reader: Reader) -> bool:
    """Whether a convolution adds zeros around its input.

    A weight that no module of torch's uses is taken to pad if it has a kernel of more than one tap.
    """
    weight, module = model.get_parameter(reader.weight), model.get_submodule(reader.path)
    padding = getattr(module, "padding", "same")  # of one tap, "same" pads nothing
    if weight.ndim <= 2 or getattr(module, "padding_mode", "zeros") != "zeros":
        return False
    if isinstance(padding, str):
        return padding == "same" and weight[0, 0].numel() > 1
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def changed_state(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``state_dict`` with other values of some tensors.

    Raises:
        UserError: the network has no such tensor, or one of another shape.
    """
    state = dict(model.state_dict())
    for name, tensor in weights.items():
        if name not in state or state[name].shape != tensor.shape:
            shape = tuple(state[name].shape) if name in state else "none"
            raise UserError(f"The edit changes {name} to the shape {tuple(tensor.shape)}, but the network has {shape}.")
    return state | dict(weights)
