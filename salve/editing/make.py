"""Making edits of a network from the latents of an SAE."""

from collections.abc import Sequence

import torch
from torch import nn

from salve.backbones.sites import Site
from salve.editing.edits import Edit, EditFile, checksum, checksums
from salve.editing.gating import contribution
from salve.sae import SAE, fingerprint
from salve.types import UserError


def make_edit_file(
    model: nn.Module, site: Site, sae: SAE, edits: Sequence[Edit], backbone: str, name: str = ""
) -> EditFile:
    """One edit file's worth of edits of a network, whose gates multiply; the network itself is not touched.

    Args:
        model: the network. site: where it is edited. sae: the SAE of that site. edits: what to do.
        backbone: what the network is, for people. name: what the edit is meant to act on, such as a class.

    Raises:
        UserError: no such latent, a strength out of range, an edit that would change nothing.
    """
    return make_edit_files(model, site, sae, [(name, edits)], backbone)[0]


def make_edit_files(
    model: nn.Module, site: Site, sae: SAE, named: Sequence[tuple[str, Sequence[Edit]]], backbone: str
) -> list[EditFile]:
    """As :func:`make_edit_file`, for many edits of one network, whose checksums are taken once.

    Args:
        named: for each edit file its name, and the edits that belong together.
    """
    if sae.width != site.width:
        raise UserError(f"This SAE reads {sae.width} channels, but the site {site.name} has {site.width}.")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    originals = {f"{reader}.weight": state[f"{reader}.weight"].float().clone() for reader in site.readers}
    for name, weight in originals.items():
        if not torch.equal(weight.to(state[name].dtype), state[name]):
            raise UserError(f"{name} is float64 and has digits that float32 does not hold: convert the model first.")
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
