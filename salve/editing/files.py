"""Edit files: an edit as a JSON record that people can read, and the originals that all edits of a network share.

``NAME.json`` describes the edit. It has the contribution vectors (a few numbers per channel), so that applying needs no
SAE. ``originals-<checksum>.safetensors`` beside it holds the readers' weights without edits, because multiplying by a
gate cannot be undone by arithmetic, and the checksums of all tensors of the network. It is written once for a network
and site, and serves all their edits in a folder. The files belong together and must be moved together.

The metadata of a ``.safetensors`` file that ``salve-edit`` wrote lists, under :data:`HELD`, the edits that it holds.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salve.artifacts import digest_of, save_tensors, write_record, written_whole
from salve.backbones.site import Reader
from salve.backbones.weights import check_tensors
from salve.editing.edits import Edit, EditFile, HeldEdit, checksum, checksums
from salve.editing.gating import Channels, Mode, Scale
from salve.types import UserError
from salve.untrusted import check_safetensors, parse_json, read_text, reason
from salve.values import LARGEST

FORMAT = "salve-edit-2"
#: Entry in the metadata of edited weights: a JSON list of their edits.
HELD = "salve_edits"
_SHARED = re.compile(r"originals-[0-9a-f]{12}\.safetensors")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
#: Letters of a text in an edit file, at most; the name of an edit of many classes is long.
_MOST_LETTERS = 10_000
#: An index of a latent must be smaller.
_MOST_LATENTS = 2**31


def save_edit_file(edit_file: EditFile, path: Path) -> None:
    """Write an edit file and, unless it exists, the file of originals beside it.

    Each file is written completely or not at all.

    Args:
        edit_file: the edit. path: where to write it, ending in ``.json``.

    Raises:
        OSError: a file cannot be written.
    """
    key = _key_of_originals(edit_file.weights, edit_file.originals)
    shared = path.with_name(f"originals-{key}.safetensors")
    if not (shared.is_file() and _is_whole(shared, *_stamp(shared))):
        header = {"salve": json.dumps({"format": FORMAT, "weights": dict(edit_file.weights)}, sort_keys=True)}
        with written_whole(shared) as unfinished:
            save_tensors(unfinished, edit_file.originals, header)
    record = {"format": FORMAT, **record_of(edit_file), "after": edit_file.after, "originals": shared.name}
    with written_whole(path) as unfinished:
        write_record(unfinished, record)


def load_edit_file(path: Path) -> EditFile:
    """Read an edit file and its originals.

    Raises:
        UserError: a file is missing, is no edit file, or is damaged.
    """
    return load_edit_files([path])[0]


def load_edit_files(paths: Sequence[Path]) -> list[EditFile]:
    """As :func:`load_edit_file`, for several files; originals that they share are read once."""
    known: dict[Path, tuple[dict[str, str], dict[str, Tensor]]] = {}
    return [_edit_file(path, known) for path in paths]


def load_held(path: Path) -> HeldEdit:
    """Read an edit file without its originals; raises as :func:`load_edit_file`."""
    return _said(path)[0]


def _said(path: Path) -> tuple[HeldEdit, str, str]:
    """Read an edit file: the edit, the checksum of the network with it, and the name of the file of originals."""
    record = _read_json(path)
    if record.get("format") != FORMAT:
        raise UserError(f"{path} is no edit file of this version of salve: its format is not {FORMAT}.")
    try:
        held, after, shared = held_from(record), _text(record, "after"), _text(record, "originals")
        # Only a plain name, so that no file in another folder is read.
        _expect(is_originals(shared), "originals must be the name of a file such as originals-….safetensors")
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    return held, after, shared


def _edit_file(path: Path, known: dict[Path, tuple[dict[str, str], dict[str, Tensor]]]) -> EditFile:
    held, after, name = _said(path)
    shared = path.with_name(name)
    if shared not in known:
        known[shared] = _read_originals(shared)
    weights, originals = known[shared]
    if checksum(weights) != held.before or set(originals) != set(held.weights_scaled):
        raise UserError(f"{path} is damaged: {name} holds the originals of another network or site.")
    try:
        facts = {field: getattr(held, field) for field in HeldEdit.__dataclass_fields__}
        edit_file = EditFile(**facts, weights=weights, originals=originals)
    except UserError as error:
        raise UserError(f"{path} is damaged: {reason(error)}.") from error
    if edit_file.after != after:
        raise UserError(f"{path} is damaged: its edit does not give the checksum that it states.")
    return edit_file


def record_of(held: HeldEdit) -> dict[str, Any]:
    """The JSON record of an edit, without its originals."""
    rows = held.contributions.detach().cpu().numpy().astype("<f4")
    return {
        **{name: getattr(held, name) for name in ("name", "backbone", "site", "sae", "before")},
        "readers": {reader.weight: reader.groups for reader in held.readers},
        # Standard JSON has no infinity.
        "edits": [{**asdict(edit), "alpha": "inf" if math.isinf(edit.alpha) else edit.alpha} for edit in held.edits],
        # float32, little-endian, in base64: short and exact.
        "contributions": [base64.b64encode(row.tobytes()).decode() for row in rows],
    }


def held_from(record: Any) -> HeldEdit:
    """Read the JSON record of an edit, and check every field.

    Raises:
        UserError: a field is missing or has a wrong value; the message is part of a sentence.
    """
    _expect(isinstance(record, dict), "an edit must be a JSON object")
    edits, rows = (_list(record, name) for name in ("edits", "contributions"))
    readers = record.get("readers")
    _expect(isinstance(readers, dict) and bool(readers), "readers must be an object that is not empty")
    _expect(
        all(name and type(groups) is int and groups >= 1 for name, groups in readers.items()),
        "readers must give names of weights with their number of groups",
    )
    _expect(len(edits) == len(rows), "there must be one contribution for each edit")
    contributions = [_contribution(row) for row in rows]
    _expect(len({len(row) for row in contributions}) == 1, "contributions must have the same length")
    return HeldEdit(
        **{name: _text(record, name) for name in ("name", "backbone", "site", "sae", "before")},
        readers=tuple(Reader(name, groups) for name, groups in readers.items()),
        edits=tuple(_edit(edit) for edit in edits),
        contributions=torch.stack(contributions),
    )


def held_in(metadata: Mapping[str, str], path: Path) -> list[HeldEdit]:
    """The edits that a file of weights lists.

    Args:
        metadata: of the file. path: the file, for messages.

    Raises:
        UserError: the list is damaged.
    """
    try:
        records = parse_json(metadata.get(HELD, "[]"))
        _expect(isinstance(records, list), "it must be a JSON list")
        return [held_from(record) for record in records]
    except ValueError as error:
        raise UserError(f"{path} has a damaged list of its edits ({HELD} in its metadata): {reason(error)}.") from error


def metadata_with(metadata: Mapping[str, str], held: Sequence[HeldEdit]) -> dict[str, str]:
    """Metadata that list these edits; the result does not depend on their order."""
    rest = {name: text for name, text in metadata.items() if name != HELD}
    if not held:
        return rest
    records = [record_of(edit) for edit in sorted(held, key=lambda edit: edit.key)]
    return rest | {HELD: json.dumps(records, sort_keys=True, ensure_ascii=False, separators=(",", ":"))}


def is_originals(name: str) -> bool:
    """Whether a name, without folder, is that of a file of originals."""
    return bool(_SHARED.fullmatch(name))


def read_safetensors(path: Path, missing: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Args:
        path: the file. missing: the message if there is no such file.

    Raises:
        UserError: the file is missing, cannot be read, or holds other things than plain tensors.
    """
    check_safetensors(path, missing)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except Exception as error:  # SafetensorError, or almost anything for a dtype that torch does not have
        raise UserError(f"{path} cannot be read as safetensors: {reason(error)}.") from error
    check_tensors(state, path)
    return state, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, without its tensors; raises as :func:`read_safetensors`."""
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {reason(error)}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path, f"There is no edit file {path}.")
    try:
        record = parse_json(text)
        _expect(isinstance(record, dict), "it holds no JSON object")
    except ValueError as error:
        raise UserError(f"{path} is no edit file: {reason(error)}.") from error
    return record


def _read_originals(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read and check the checksums of a network's tensors and its readers' weights without edits."""
    missing = f"There is no {path}, which holds the weights without edits; it must lie beside its edit files."
    originals, metadata = read_safetensors(path, missing)
    try:
        header = parse_json(metadata.get("salve", ""))
        _expect(isinstance(header, dict) and header.get("format") == FORMAT, "it is of another version")
        weights = header.get("weights")
        _expect(isinstance(weights, dict) and bool(weights), "it has no checksums")
        _expect(all(isinstance(s, str) and _CHECKSUM.fullmatch(s) for s in weights.values()), "a checksum is malformed")
        _expect(all(weight.dtype == torch.float32 for weight in originals.values()), "its weights are not float32")
        _expect(checksums(originals).items() <= weights.items(), "its weights do not have their checksums")
        named = f"originals-{_key_of_originals(weights, originals)}.safetensors" == path.name
        _expect(named, "its checksum is not the one in its name")
        finite = all(bool(weight.isfinite().all()) for weight in originals.values())
        _expect(finite, "its weights are not finite")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {reason(error)}.") from error
    return weights, originals


def _key_of_originals(weights: Mapping[str, str], originals: Mapping[str, Tensor]) -> str:
    return digest_of({"weights": dict(weights), "originals": sorted(originals)})[:12]


@lru_cache(maxsize=16)
def _is_whole(path: Path, *_: int) -> bool:
    """Whether a file of originals can be read; cached by its stamp, because a folder may get a thousand edits."""
    try:
        _read_originals(path)
    except UserError:
        return False
    return True


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _expect(true: bool, otherwise: str) -> None:
    """Raise a UserError whose message is part of a sentence; the caller adds the file."""
    if not true:
        raise UserError(otherwise)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or len(value) > _MOST_LETTERS:
        raise UserError(f"{name} must be a text of at most {_MOST_LETTERS:,} letters")
    return value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list that is not empty")
    return value


def _edit(record: Any) -> Edit:
    _expect(isinstance(record, dict), "an edit must be a JSON object")
    known = set(Edit.__dataclass_fields__)
    _expect(set(record) == known, f"an edit must say {', '.join(sorted(known))}, and nothing else")
    for name, allowed in (("mode", Mode), ("scale", Scale), ("channels", Channels)):
        choices = get_args(allowed)
        _expect(record[name] in choices, f"{name} must be {' or '.join(choices)}")
    for name in ("latent", "sign"):
        _expect(type(record[name]) is int, f"{name} must be a whole number")
    _expect(0 <= record["latent"] < _MOST_LATENTS, f"latent must not be negative, and below {_MOST_LATENTS:,}")
    _expect(record["sign"] in (-1, 1), "sign must be 1 or -1")
    alpha = record["alpha"]
    finite = type(alpha) in (int, float) and 0 <= alpha <= LARGEST
    _expect(finite or (alpha == "inf" and record["mode"] == "suppress"), 'alpha must be a number from 0, or "inf"')
    return Edit(**{**record, "alpha": float(alpha)})


def _contribution(text: Any) -> Tensor:
    try:
        _expect(isinstance(text, str), "contributions must be texts")
        row = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (binascii.Error, ValueError) as error:
        raise UserError(f"contributions must be float32 numbers in base64 ({reason(error)})") from error
    _expect(len(row) > 0 and bool(np.isfinite(row).all()), "contributions must be finite numbers")
    return torch.from_numpy(row.astype(np.float32))
