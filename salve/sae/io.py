# SPDX-License-Identifier: MIT
"""Save and load SAEs: one safetensors file each, whose header holds variant, settings and facts."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from salve.artifacts import digest_of, digest_of_tensors, load_tensors, read_header, save_tensors
from salve.integrity import check_file
from salve.sae.models import SAE, is_imported, make_sae
from salve.types import UserError
from salve.untrusted import check_safetensors, parse_json, reason, shown, some

FORMAT = "salve-sae-1"


def save_sae(path: Path, sae: SAE, facts: dict[str, Any] | None = None) -> None:
    """Write an SAE.

    Args:
        path: of the safetensors file.
        sae: takes raw activations, that is, already folded (:meth:`salve.sae.SAE.fold`).
        facts: JSON-like facts for the header, such as backbone and site.
    """
    header = {"format": FORMAT, "variant": sae.variant, "settings": sae.settings(), "facts": facts or {}}
    # One entry only: safetensors writes several in no fixed order, and the file's digest would change.
    save_tensors(path, sae.state_dict(), {"salve": json.dumps(header, sort_keys=True)})


def load_sae(path: Path, *, width: int | None = None, backbone: str | None = None, site: str | None = None) -> SAE:
    """Read an SAE, ready to encode raw activations.

    Args:
        path: the file.
        width, backbone, site: what the SAE must have been made for; None accepts anything. The site ``last`` fits
            every site name, since its name depends on the backbone.

    Returns:
        The SAE in eval mode, without gradients.

    Raises:
        UserError: there is no such file, it is no SAE file or damaged, the SAE does not fit, or its class is the user's
            own and not imported.
    """
    check_safetensors(path, f"There is no SAE at {path}.")
    check_file(path)
    try:
        header = parse_json(read_header(path).get("salve", "{}"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no safetensors file: {reason(error)}.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path} is no SAE file: its header names no variant.")
    variant = header.get("variant")
    if isinstance(variant, str) and "." in variant and not is_imported(variant):
        raise UserError(
            f"The SAE in {path} is of the class {shown(variant)}, and what a file names is not imported; if you "
            "know and trust it, import its module first."
        )
    try:
        sae, tensors = _empty(header, path)
    except (ValueError, TypeError, LookupError, SafetensorError, OverflowError, RuntimeError) as error:
        raise UserError(f"The SAE in {path} is damaged: {reason(error)}.") from error
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"The SAE in {path} is broken: its {', '.join(bad)} holds NaN or infinity.")
    facts = {"width": sae.width, **header["facts"]}
    for name, wanted in (("width", width), ("backbone", backbone), ("site", site)):
        has = facts.get(name)
        if wanted is not None and has != wanted and not (name == "site" and "last" in (has, wanted)):
            said = "does not say which it is" if has is None else f"was made for {shown(str(has))}"
            raise UserError(f"The SAE in {path} does not fit {name} {wanted}: it {said}.")
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False)


def _empty(header: dict[str, Any], path: Path) -> tuple[SAE, dict[str, Tensor]]:
    """An SAE as the header describes it, and the file's tensors, whose names, shapes and dtypes fit it.

    Shapes are compared before any memory is allocated: a hostile header cannot ask for more than the file holds.

    Raises:
        UserError, ValueError, TypeError, …: the header or the tensors are invalid.
    """
    variant, settings, facts = (header.get(name) for name in ("variant", "settings", "facts"))
    if not (isinstance(variant, str) and isinstance(settings, dict) and isinstance(facts, dict)):
        raise UserError("its header must hold a variant, settings and facts")
    tensors = load_tensors(path)
    decoder = tensors.get("decoder")
    if decoder is None or decoder.ndim != 2 or 0 in decoder.shape:
        raise UserError("it has no decoder, channels by latents")
    width, dictionary_size = decoder.shape
    with torch.device("meta"):  # shapes without numbers
        wanted = make_sae(variant, width, dictionary_size, **settings).state_dict()
    if tensors.keys() != wanted.keys():
        raise UserError(f"it holds {some(sorted(tensors), 9)} instead of {', '.join(wanted)}")
    if wrong := [name for name, tensor in wanted.items() if tensor.shape != tensors[name].shape]:
        raise UserError(f"the shape of its {', '.join(wrong)} does not go with that of its decoder")
    kinds = {tensor.dtype for tensor in tensors.values()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        raise UserError(f"its tensors must be float32 or float64, not {some(sorted(map(str, kinds)))}")
    return make_sae(variant, width, dictionary_size, **settings).to(decoder.dtype), tensors


def fingerprint(sae: SAE) -> str:
    """Hex SHA-256 of the SAE's tensors, variant and settings."""
    return f"{sae.variant}:{digest_of([sae.settings(), digest_of_tensors(sae.state_dict())])}"
