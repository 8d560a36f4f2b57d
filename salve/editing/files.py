# SPDX-License-Identifier: MIT
"""Edit files: an edit as a JSON record that people can read, and the weights that applying and undoing it needs.

``NAME.json`` describes the edit. That of gates has the contribution vectors (a few numbers per channel), so that
applying needs no SAE. ``originals-<checksum>.safetensors`` beside it holds the tensors that the edit changes, without
edits, because neither multiplying nor rounding can be undone by arithmetic, and the checksums of all tensors of the
network. It is written once for a network and the names of the tensors, and serves all edits of these in a folder. The
new values of an addition lie in ``changes-<checksum>.safetensors``. The files belong together and must be moved
together.

The metadata of a ``.safetensors`` file that ``salve-edit`` wrote lists, under :data:`HELD`, the edits that it holds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salve.artifacts import digest_of, save_tensors, write_record, written_whole
from salve.backbones.weights import check_tensors
from salve.editing.additions import AdditionFile, HeldAddition
from salve.editing.edits import EditFile, GateFile, HeldEdit, HeldGates, checksum, checksums
from salve.editing.records import CHECKSUM, expect, held_from, record_of, text_of
from salve.types import UserError
from salve.untrusted import check_safetensors, parse_json, read_text, reason

#: What the files of gates say that they are, and those of additions. Originals are of the first format for both.
FORMAT, ADDITION = "salve-edit-2", "salve-addition-1"
#: Entry in the metadata of edited weights: a JSON list of their edits.
HELD = "salve_edits"
_ORIGINALS = re.compile(r"originals-[0-9a-f]{12}\.safetensors")
_BESIDE = re.compile(r"(originals|changes)-[0-9a-f]{12}\.safetensors")


def save_edit_file(edit_file: EditFile, path: Path) -> None:
    """Write an edit file; beside it the new values of an addition and, unless it exists, the file of originals.

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
    if isinstance(edit_file, AdditionFile):
        record |= {"format": ADDITION, "changes": edit_file.file_of_changes}
        with written_whole(path.with_name(edit_file.file_of_changes)) as unfinished:
            save_tensors(unfinished, edit_file.edited)
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


def load_held(path: Path) -> HeldGates | HeldAddition:
    """Read an edit file without its weights; raises as :func:`load_edit_file`."""
    return _said(path)[0]


def _said(path: Path) -> tuple[HeldGates | HeldAddition, str, str]:
    """Read an edit file: the edit, the checksum of the network with it, and the name of the file of originals."""
    record = _read_json(path)
    if record.get("format") not in (FORMAT, ADDITION):
        raise UserError(f"{path} is no edit file of this version of salve: its format is not {FORMAT} or {ADDITION}.")
    try:
        fits = ("changed" in record) == (record["format"] == ADDITION)
        expect(fits, f"files of the format {ADDITION}, and only these, must have the field changed")
        held, after, shared = held_from(record), text_of(record, "after"), text_of(record, "originals")
        # Only plain names, so that no file in another folder is read.
        expect(
            bool(_ORIGINALS.fullmatch(shared)), "originals must be the name of a file such as originals-….safetensors"
        )
        if isinstance(held, HeldAddition):
            named = held.file_of_changes
            expect(record.get("changes") == named, f"changes must be {named}, which its checksums give")
    except UserError as error:
        raise UserError(f"{path} is damaged: {reason(error)}.") from error
    return held, after, shared


def _edit_file(path: Path, known: dict[Path, tuple[dict[str, str], dict[str, Tensor]]]) -> EditFile:
    held, after, name = _said(path)
    shared = path.with_name(name)
    if shared not in known:
        known[shared] = _read_originals(shared)
    weights, originals = known[shared]
    if checksum(weights) != held.before or set(originals) != set(held.tensors):
        raise UserError(f"{path} is damaged: {name} holds the originals of another network or site.")
    facts = {field: getattr(held, field) for field in type(held).__dataclass_fields__}
    edit_file: EditFile
    edited: dict[str, Tensor] = {}
    if isinstance(held, HeldAddition):
        changes = path.with_name(held.file_of_changes)
        missing = f"There is no {changes}, which holds the new weights of {path.name}; it must lie beside it."
        edited, _ = read_safetensors(changes, missing)
    try:
        if isinstance(held, HeldAddition):
            edit_file = AdditionFile(**facts, weights=weights, originals=originals, edited=edited)
        else:
            edit_file = GateFile(**facts, weights=weights, originals=originals)
    except UserError as error:
        raise UserError(f"{path} is damaged: {reason(error)}.") from error
    if edit_file.after != after:
        raise UserError(f"{path} is damaged: its edit does not give the checksum that it states.")
    return edit_file


def held_in(metadata: Mapping[str, str], path: Path) -> list[HeldEdit]:
    """The edits that a file of weights lists.

    Args:
        metadata: of the file. path: the file, for messages.

    Raises:
        UserError: the list is damaged.
    """
    try:
        records = parse_json(metadata.get(HELD, "[]"))
        expect(isinstance(records, list), "it must be a JSON list")
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


def is_beside(name: str) -> bool:
    """Whether a name, without folder, is that of a file of weights beside edit files."""
    return bool(_BESIDE.fullmatch(name))


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
        expect(isinstance(record, dict), "it holds no JSON object")
    except ValueError as error:
        raise UserError(f"{path} is no edit file: {reason(error)}.") from error
    return record


def _read_originals(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read and check the checksums of a network's tensors and its readers' weights without edits."""
    missing = f"There is no {path}, which holds the weights without edits; it must lie beside its edit files."
    originals, metadata = read_safetensors(path, missing)
    try:
        header = parse_json(metadata.get("salve", ""))
        expect(isinstance(header, dict) and header.get("format") == FORMAT, "it is of another version")
        weights = header.get("weights")
        expect(isinstance(weights, dict) and bool(weights), "it has no checksums")
        expect(all(isinstance(s, str) and CHECKSUM.fullmatch(s) for s in weights.values()), "a checksum is malformed")
        expect(all(weight.dtype == torch.float32 for weight in originals.values()), "its weights are not float32")
        known = checksums(originals)
        expect(known.items() <= weights.items(), "its weights do not have their checksums")
        expect(known.keys() == originals.keys(), "it holds a counter of batches, which no edit changes")
        named = f"originals-{_key_of_originals(weights, originals)}.safetensors" == path.name
        expect(named, "its checksum is not the one in its name")
        finite = all(bool(weight.isfinite().all()) for weight in originals.values())
        expect(finite, "its weights are not finite")
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
