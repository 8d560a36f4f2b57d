"""One SAE, one safetensors file whose header says what it is."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from salve.artifacts import digest_of, digest_of_tensors, load_tensors, read_header, save_tensors
from salve.integrity import check_file
from salve.sae.models import SAE, make_sae
from salve.types import UserError

FORMAT = "salve-sae-1"


def save_sae(path: Path, sae: SAE, facts: dict[str, Any] | None = None) -> None:
    """Write an SAE that takes raw activations.

    Args:
        path: the safetensors file.
        sae: the SAE, already folded.
        facts: JSON-like facts for the header, such as the backbone and the site it belongs to.
    """
    header = {"format": FORMAT, "variant": sae.variant, "settings": sae.settings(), "facts": facts or {}}
    # One entry: the order in which safetensors writes several is not fixed, and the file's digest should be.
    save_tensors(path, sae.state_dict(), {"salve": json.dumps(header, sort_keys=True)})


def load_sae(path: Path, *, width: int | None = None, backbone: str | None = None, site: str | None = None) -> SAE:
    """Read an SAE, ready to encode raw activations.

    Args:
        path: the file. width, backbone, site: what it must have been made for, or None for anything. The site
            ``last`` goes with every name: which one it was depends on the backbone.

    Raises:
        UserError: no such file, not an SAE of this project, or one that does not fit.
    """
    if not path.is_file():
        raise UserError(f"There is no SAE at {path}.")
    check_file(path)
    try:
        header = json.loads(read_header(path).get("salve", "{}"))
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}.") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no SAE file: its header names no variant.")
    tensors = load_tensors(path)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"The SAE in {path} is broken: its {', '.join(bad)} holds NaN or infinity.")
    own_width, dictionary_size = tensors["decoder"].shape
    facts = {"width": own_width, **header["facts"]}
    for name, wanted in (("width", width), ("backbone", backbone), ("site", site)):
        has = facts.get(name)
        if wanted is not None and has != wanted and not (name == "site" and "last" in (has, wanted)):
            said = "does not say which it is" if has is None else f"was made for {has}"
            raise UserError(f"The SAE in {path} does not fit {name} {wanted}: it {said}.")
    sae = make_sae(header["variant"], own_width, dictionary_size, **header["settings"]).to(tensors["decoder"].dtype)
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False)


def fingerprint(sae: SAE) -> str:
    """Hex SHA-256 of the SAE's tensors, variant and settings."""
    return f"{sae.variant}:{digest_of([sae.settings(), digest_of_tensors(sae.state_dict())])}"
