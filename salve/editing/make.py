"""Make edits of a network from latents of an SAE."""

from collections.abc import Sequence

import torch
from torch import nn

from salve.backbones.site import Site
from salve.editing.edits import Edit, EditFile, checksum, checksums
from salve.editing.gating import contribution
from salve.sae import SAE, fingerprint
from salve.types import UserError


def make_edit_file(
    model: nn.Module, site: Site, sae: SAE, edits: Sequence[Edit], backbone: str, name: str = ""
) -> EditFile:
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
) -> list[EditFile]:
    """As :func:`make_edit_file`, for many edits of one network, with its checksums computed once.

    Args:
        model, site, sae, backbone: see :func:`make_edit_file`.
        named: for each edit file its name, and the edits that belong together.
    """
    if sae.width != site.width:
        raise UserError(f"This SAE reads {sae.width} channels, but the site {site.name} has {site.width}.")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    originals = {reader.weight: state[reader.weight].float().clone() for reader in site.readers}
    for name, weight in originals.items():
        if not torch.equal(weight.to(state[name].dtype), state[name]):
            raise UserError(
                f"{name} is float64 with digits that float32 cannot hold; convert the model to float32 first."
            )
    weights, made_of = checksums(state), fingerprint(sae)
    before, decoder = checksum(weights), sae.decoder.detach().float().cpu()
    return [
        EditFile(
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
