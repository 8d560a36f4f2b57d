"""One SAE, one safetensors file whose header says what it is."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from salve.artifacts import digest_of, digest_of_tensors, load_tensors, read_header, save_tensors
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


def load_sae(path: Path) -> SAE:
    """Read an SAE, ready to encode raw activations.

    Raises:
        UserError: no such file, or not an SAE of this project.
    """
    if not path.is_file():
        raise UserError(f"There is no SAE at {path}.")
    try:
        header = json.loads(read_header(path).get("salve", "{}"))
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}.") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no SAE file: its header names no variant.")
    tensors = load_tensors(path)
    width, dictionary_size = tensors["decoder"].shape
    sae = make_sae(header["variant"], width, dictionary_size, **header["settings"])
    sae.load_state_dict(tensors)
    return sae.to(tensors["decoder"].dtype).eval().requires_grad_(False)


def fingerprint(sae: SAE) -> str:
    """Hex SHA-256 of the SAE's tensors, variant and settings."""
    return f"{sae.variant}:{digest_of([sae.settings(), digest_of_tensors(sae.state_dict())])}"
