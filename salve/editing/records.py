# SPDX-License-Identifier: MIT
"""The JSON records of edits: written, and read with every field checked."""

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from salve.backbones.site import Reader
from salve.editing.additions import HeldAddition, Stamp
from salve.editing.edits import Edit, HeldEdit, HeldGates
from salve.editing.gating import Channels, Mode, Scale
from salve.types import UserError
from salve.untrusted import reason
from salve.values import LARGEST

CHECKSUM = re.compile(r"[0-9a-f]{32}")
#: Letters of a text in an edit file, at most; the name of an edit of many classes is long.
_MOST_LETTERS = 10_000
#: An index of a latent must be smaller, and so must a size of a tensor.
_TOO_LARGE = 2**31


def record_of(held: HeldEdit) -> dict[str, Any]:
    """The JSON record of an edit, without its weights."""
    facts = {name: getattr(held, name) for name in ("name", "backbone", "site", "before")}
    if isinstance(held, HeldAddition):
        changed = {name: {"shape": list(shape), "checksum": known} for name, (shape, known) in held.changed.items()}
        return {**facts, "method": held.method, "alpha": held.alpha, "changed": changed}
    if not isinstance(held, HeldGates):
        raise TypeError(f"{type(held).__name__} has no record.")
    rows = held.contributions.detach().cpu().numpy().astype("<f4")
    return {
        **facts,
        "sae": held.sae,
        "readers": {reader.weight: reader.groups for reader in held.readers},
        # Standard JSON has no infinity.
        "edits": [{**asdict(edit), "alpha": "inf" if math.isinf(edit.alpha) else edit.alpha} for edit in held.edits],
        # float32, little-endian, in base64: short and exact.
        "contributions": [base64.b64encode(row.tobytes()).decode() for row in rows],
    }


def held_from(record: Any) -> HeldGates | HeldAddition:
    """Read the JSON record of an edit, and check every field.

    Raises:
        UserError: a field is missing or has a wrong value; the message is part of a sentence.
    """
    expect(isinstance(record, dict), "an edit must be a JSON object")
    return _addition_from(record) if "changed" in record else _gates_from(record)


def _gates_from(record: Mapping[str, Any]) -> HeldGates:
    edits, rows = (_list(record, name) for name in ("edits", "contributions"))
    readers: Any = record.get("readers")
    expect(isinstance(readers, dict) and bool(readers), "readers must be an object that is not empty")
    expect(
        all(name and type(groups) is int and groups >= 1 for name, groups in readers.items()),
        "readers must give names of weights with their number of groups",
    )
    expect(len(edits) == len(rows), "there must be one contribution for each edit")
    contributions = [_contribution(row) for row in rows]
    expect(len({len(row) for row in contributions}) == 1, "contributions must have the same length")
    return HeldGates(
        **{name: text_of(record, name) for name in ("name", "backbone", "site", "sae", "before")},
        readers=tuple(Reader(name, groups) for name, groups in readers.items()),
        edits=tuple(_edit(edit) for edit in edits),
        contributions=torch.stack(contributions),
    )


def _addition_from(record: Mapping[str, Any]) -> HeldAddition:
    changed: Any = record["changed"]
    alpha: Any = record.get("alpha")
    expect(isinstance(changed, dict) and bool(changed), "changed must be an object that is not empty")
    expect(type(alpha) in (int, float) and abs(alpha) <= LARGEST, "alpha must be a number")
    return HeldAddition(
        **{name: text_of(record, name) for name in ("name", "backbone", "site", "before", "method")},
        alpha=float(alpha),
        changed={name: _stamp(stamp) for name, stamp in changed.items()},
    )


def _stamp(record: Any) -> Stamp:
    known = isinstance(record, dict) and set(record) == set(Stamp._fields)
    expect(known, f"changed must say {' and '.join(Stamp._fields)} of each tensor, and nothing else")
    shape, found = record["shape"], record["checksum"]
    expect(
        isinstance(shape, list) and all(type(size) is int and 0 <= size < _TOO_LARGE for size in shape),
        "a shape must be a list of whole numbers",
    )
    expect(isinstance(found, str) and bool(CHECKSUM.fullmatch(found)), "a checksum is malformed")
    return Stamp(tuple(shape), found)


def expect(true: bool, otherwise: str) -> None:
    """Raise a UserError whose message is part of a sentence; the caller adds the file."""
    if not true:
        raise UserError(otherwise)


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A text of a record.

    Raises:
        UserError: it is missing, no text, or too long; the message is part of a sentence.
    """
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
    expect(isinstance(record, dict), "an edit must be a JSON object")
    known = set(Edit.__dataclass_fields__)
    expect(set(record) == known, f"an edit must say {', '.join(sorted(known))}, and nothing else")
    for name, allowed in (("mode", Mode), ("scale", Scale), ("channels", Channels)):
        choices = get_args(allowed)
        expect(record[name] in choices, f"{name} must be {' or '.join(choices)}")
    for name in ("latent", "sign"):
        expect(type(record[name]) is int, f"{name} must be a whole number")
    expect(0 <= record["latent"] < _TOO_LARGE, f"latent must not be negative, and below {_TOO_LARGE:,}")
    expect(record["sign"] in (-1, 1), "sign must be 1 or -1")
    alpha = record["alpha"]
    finite = type(alpha) in (int, float) and 0 <= alpha <= LARGEST
    expect(finite or (alpha == "inf" and record["mode"] == "suppress"), 'alpha must be a number from 0, or "inf"')
    return Edit(**{**record, "alpha": float(alpha)})


def _contribution(text: Any) -> Tensor:
    try:
        expect(isinstance(text, str), "contributions must be texts")
        row = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (binascii.Error, ValueError) as error:
        raise UserError(f"contributions must be float32 numbers in base64 ({reason(error)})") from error
    expect(len(row) > 0 and bool(np.isfinite(row).all()), "contributions must be finite numbers")
    return torch.from_numpy(row.astype(np.float32))
