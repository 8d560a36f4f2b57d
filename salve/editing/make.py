# SPDX-License-Identifier: MIT
"""Make edit files of a network: of latents of an SAE, and of new weights that any method has found."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salve.backbones.site import Site
from salve.editing.additions import AdditionFile, stamps
from salve.editing.edits import Edit, GateFile, State, checksum, checksums, is_counter
from salve.editing.gating import contribution
from salve.sae import SAE, fingerprint
from salve.types import UserError
from salve.untrusted import some


def make_edit_file(
    model: nn.Module, site: Site, sae: SAE, edits: Sequence[Edit], backbone: str, name: str = ""
) -> GateFile:
    """Make one edit file of edits whose gates multiply; the network itself does not change.

    Args:
        model: the network. site: where it is edited. sae: the SAE of that site. edits: the edits.
        backbone: the network, for people. name: what the edits act on, such as a class.

    Raises:
        UserError: there is no such latent, a strength is out of range, or the edit would change nothing.
    """
    return make_edit_files(model, site, sae, [(name, edits)], backbone)[0]


def make_edit_files(
    model: nn.Module, site: Site, sae: SAE, named: Sequence[tuple[str, Sequence[Edit]]], backbone: str
) -> list[GateFile]:
    """As :func:`make_edit_file`, for many edits of one network, with its checksums computed once.

    Args:
        model, site, sae, backbone: see :func:`make_edit_file`.
        named: for each edit file its name, and the edits that belong together.
    """
    if sae.width != site.width:
        raise UserError(f"This SAE reads {sae.width} channels, but the site {site.name} has {site.width}.")
    state = _state(model)
    originals = {reader.weight: _original(state, reader.weight) for reader in site.readers}
    weights, made_of = checksums(state), fingerprint(sae)
    before, decoder = checksum(weights), sae.decoder.detach().float().cpu()
    return [
        GateFile(
            name=name,
            backbone=backbone,
            site=site.name,
            readers=site.readers,
            sae=made_of,
            edits=tuple(edits),
            before=before,
            contributions=torch.stack([contribution(decoder, e.latent, e.scale, e.channels, e.sign) for e in edits]),
            weights=weights,
            originals=originals,
        )
        for name, edits in named
    ]


class NewWeights(NamedTuple):
    """New values of tensors of a network, and where they come from.

    Attributes:
        changed: name of a tensor in the ``state_dict`` → its new values.
        name: what the edit acts on, such as a class; may be empty.
        method: how the values were found, such as ``steering``. alpha: the strength of the method.
        site: name of the site that the method works at; empty if it has none.
    """

    changed: Mapping[str, Tensor]
    name: str
    method: str
    alpha: float
    site: str


def make_addition(
    model: nn.Module,
    changed: Mapping[str, Tensor],
    *,
    name: str,
    method: str,
    alpha: float,
    site: str,
    backbone: str,
) -> AdditionFile:
    """Make an edit file of new weights; the network itself does not change.

    Args:
        model: the network, without edits.
        changed: name of a tensor in the ``state_dict`` → its new values, which are rounded to float32. Tensors whose
            values are those of the network, and BatchNorm's counters, are left out.
        name, method, alpha, site: see :class:`NewWeights`.
        backbone: the network, for people.

    Raises:
        UserError: the network has no such tensor, a new value is NaN or infinite or of another shape, a tensor is not
            floating-point, only one of two names of the same parameter is changed, or the edit would change nothing.
    """
    return make_additions(model, [NewWeights(changed, name, method, alpha, site)], backbone)[0]


def make_additions(model: nn.Module, many: Sequence[NewWeights], backbone: str) -> list[AdditionFile]:
    """As :func:`make_addition`, for many edits of one network, with its checksums computed once.

    Args:
        model, backbone: see :func:`make_addition`. many: for each edit file the new weights.
    """
    state = _state(model)
    weights, twins, originals = checksums(state), _twins(model), State()
    made = []
    for new in many:
        edited = _edited(new, state, twins)
        originals |= {name: _original(state, name) for name in edited.keys() - originals.keys()}
        made.append(
            AdditionFile(
                name=new.name,
                backbone=backbone,
                site=new.site,
                before=checksum(weights),
                method=new.method,
                alpha=float(new.alpha),
                changed=stamps(edited),
                weights=weights,
                originals={name: originals[name] for name in edited},
                edited=edited,
            )
        )
    return made


def _state(model: nn.Module) -> State:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _original(state: State, name: str) -> Tensor:
    """A tensor of the network in float32."""
    original = state[name].float().clone()
    if not torch.equal(original.to(state[name].dtype), state[name]):
        raise UserError(f"{name} is float64 with digits that float32 cannot hold; convert the model to float32 first.")
    return original


def _edited(new: NewWeights, state: State, twins: Mapping[str, list[str]]) -> State:
    """The tensors that have new values, in float32."""
    if unknown := sorted(new.changed.keys() - state.keys()):
        raise UserError(
            f"The network has no {some(unknown)}, which {new.method} would change; a layer that was made without a "
            "bias gets none."
        )
    edited = State()
    for name, tensor in new.changed.items():
        if is_counter(name):
            continue
        found, original = tensor.detach().cpu(), state[name]
        if found.is_floating_point() and original.is_floating_point():
            found = found.to(torch.float32, copy=True).contiguous()
            if not torch.equal(found, original.float()):
                edited[name] = found
        elif found.dtype != original.dtype or not torch.equal(found, original):
            raise UserError(f"{name} is not floating-point, so that {new.method} cannot change it.")
    for name in edited:
        for twin in twins.get(name, []):
            if twin not in edited or not torch.equal(edited[twin], edited[name]):
                raise UserError(
                    f"{name} and {twin} are the same parameter, but {new.method} changes them differently; give the "
                    "same new values to both."
                )
    return edited


def _twins(model: nn.Module) -> dict[str, list[str]]:
    """Name of a tensor that has several names → all its names."""
    names = defaultdict(list)
    for name, tensor in model.state_dict().items():
        if tensor.numel():
            names[tensor.device, tensor.data_ptr(), tensor.shape].append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}
