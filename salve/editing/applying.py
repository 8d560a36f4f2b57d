# SPDX-License-Identifier: MIT
"""Apply edits to a ``state_dict``, stack them, and undo them to the same bits.

**Which weights an edit fits.** It is made for the network that salve studied, in float32. It fits every ``state_dict``
with the same names, shapes and *values in float32*, such as the float16 or bfloat16 file that salve cast to float32 to
study it. BatchNorm's ``num_batches_tracked`` may differ or be missing: a network in eval mode does not read it.

**What is written.** The tensors that edits change are computed in float32 (float64 ones in float64) and rounded once to
their dtype in the file. All other tensors stay as they are. Undoing writes back the originals in the same dtype. The
bits are the same, because every float16 and bfloat16 value is exact in float32. Float64 tensors are refused if float32
cannot hold their values, because undoing could not restore them. A float32 network that was rounded to half precision
after it was studied is refused, because its values differ.

**Several edits.** Gates multiply, and what additions add is summed::

    edited = original ⊙ gates + Σ (new − original)

The right side is always computed from the originals, whatever was applied before, with the gates of each channel sorted
by size and the additions sorted by key, so that the order of applying and undoing does not change any bit. A tensor
that a single addition changes gets its new values as they are.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from salve.editing.additions import AdditionFile, HeldAddition
from salve.editing.edits import EditFile, HeldEdit, HeldGates, State, checksums, is_counter, scaled
from salve.types import UserError
from salve.untrusted import shown, some

#: Dtypes that tensors may have which edits change.
_EDITED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def apply_edit_file(edit_file: EditFile, state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()) -> State:
    """Apply one edit file; see :func:`apply_edit_files`."""
    return apply_edit_files([edit_file], state, held)


def apply_edit_files(
    edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()
) -> State:
    """Apply edits to weights.

    Args:
        edit_files: the edits, all of one network. state: its weights.
        held: edits that ``state`` holds already. Of an addition that changes a tensor which ``edit_files`` change too,
            its edit file.

    Returns:
        A new ``state_dict``; tensors that ``edit_files`` do not change are those of ``state``.

    Raises:
        UserError: the edits were made for other weights, ``state`` holds one of them already, the edit file of an
            addition in ``held`` is needed, or rounding to the dtype of ``state`` would leave nothing of the edit.
    """
    keys = [edit.key for edit in held]
    for edit_file in edit_files:
        if edit_file.key in keys:
            raise UserError(
                f"These weights hold this edit already{_named(edit_file)}; undo it before applying it again."
            )
        keys.append(edit_file.key)
    _need_new_values(edit_files, held)
    problem = _difference(edit_files, state, held)
    if problem and not held and any(_difference([edit_file], state, [edit_file]) is None for edit_file in edit_files):
        raise UserError("These weights hold this edit already; undo it before applying it again.")
    if problem:
        raise UserError(
            f"These weights are not the ones that the edit was made for ({edit_files[0].backbone}"
            f"{', with the edits that the file lists' if held else ''}): {problem}."
        )
    edited = _with(edit_files, state, [*held, *edit_files])
    if not held and len(edit_files) == 1 and edit_files[0].before != edit_files[0].after:
        names = edit_files[0].tensors
        if all(_same_bits(edited[name], state[name]) for name in names):
            raise UserError(
                f"This edit would not change these weights: what it changes is lost in {_dtype(state[names[0]])}."
            )
    return edited


def undo_edit_file(edit_file: EditFile, state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()) -> State:
    """Undo one edit file; see :func:`undo_edit_files`."""
    return undo_edit_files([edit_file], state, held)


def undo_edit_files(
    edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()
) -> State:
    """Undo edits of weights.

    Args:
        edit_files: the edits, all of one network. state: its weights.
        held: other edits of ``state``, which stay; see :func:`apply_edit_files`.

    Returns:
        A new ``state_dict`` with the same bits as if the edits had never been applied.

    Raises:
        UserError: ``state`` is not what applying the edits gives, or the edit file of an addition in ``held`` is
            needed.
    """
    _need_new_values(edit_files, held)
    if problem := _difference(edit_files, state, [*held, *edit_files]):
        if _difference(edit_files, state, held) is None:
            raise UserError("These weights do not hold the edit, so there is nothing to undo.")
        raise UserError(f"The edit cannot be undone, because these weights are not what applying it gave: {problem}.")
    return _with(edit_files, state, held)


def _named(held: HeldEdit) -> str:
    return f" ({held.name})" if held.name else ""


def _originals(edit_files: Iterable[EditFile]) -> State:
    return {name: weight for edit_file in edit_files for name, weight in edit_file.originals.items()}


def _need_new_values(edit_files: Sequence[EditFile], held: Sequence[HeldEdit]) -> None:
    """Refuse held additions without their new values, where the tensors of ``edit_files`` cannot be computed so."""
    originals = _originals(edit_files)
    for edit in held:
        shared = sorted(originals.keys() & set(edit.tensors))
        if shared and isinstance(edit, HeldAddition) and not isinstance(edit, AdditionFile):
            raise UserError(
                f"These weights hold the edit {shown(edit.title)}, which changes {some(shared)} too; give its edit "
                "file as well, with --held (in Python in held=[…])."
            )


def _with(edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> State:
    """``state``, with the tensors that ``edit_files`` change computed from the originals and the edits ``held``."""
    originals = _originals(edit_files)
    edited = {
        name: _edited(weight, held, name, state[name].dtype).to(state[name].device)
        for name, weight in originals.items()
    }
    for name, weight in edited.items():
        if not weight.isfinite().all() and originals[name].isfinite().all():
            strongest = max(alpha for edit in held for alpha in edit.strengths if math.isfinite(alpha))
            raise UserError(
                f"At α = {strongest:g} the edit would give values in {name} that {_dtype(weight)} cannot hold; choose "
                "a smaller α."
            )
    return {**state, **edited}


def _edited(original: Tensor, held: Sequence[HeldEdit], name: str, dtype: torch.dtype) -> Tensor:
    """A tensor under the edits ``held``, as ``dtype``, from its original."""
    gates = [edit for edit in held if isinstance(edit, HeldGates) and name in edit.tensors]
    additions = [edit for edit in held if isinstance(edit, AdditionFile) and name in edit.tensors]
    if not additions:
        return scaled(original, gates, name, dtype)
    if len(additions) == 1 and not gates:
        return additions[0].edited[name].to(dtype, copy=True)
    wide = scaled(original, gates, name, torch.float64)  # exact: the product of two float32 numbers
    for addition in sorted(additions, key=lambda edit: edit.key):
        wide += addition.edited[name].double() - original.double()
    return wide if dtype == torch.float64 else wide.float().to(dtype)


def _difference(edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> str | None:
    """How ``state`` differs from the network of ``edit_files`` under the edits ``held``, in words; None if not.

    Tensors that other edits have changed cannot be compared if their originals are not at hand; those that a single
    addition has changed can be, in float32.
    """
    weights, originals = edit_files[0].weights, _originals(edit_files)
    if any(edit.before != edit_files[0].before for edit in [*edit_files, *held]):
        return "the edits were made for different networks"
    if problem := _misfit(edit_files, originals, held):
        return problem
    if missing := sorted(weights.keys() - state.keys()):
        return f"they lack {some(missing)}"
    if unknown := sorted(name for name in state.keys() - weights.keys() if not is_counter(name)):
        return f"they have unknown tensors, {some(unknown)}"
    differing = []
    for name, original in originals.items():
        found = state[name].detach().cpu()
        if found.shape == original.shape and found.dtype in _EDITED:
            if _same_bits(found, _edited(original, held, name, found.dtype)):
                if _same_bits(found, original.to(found.dtype)) and not _same_bits(found.to(original.dtype), original):
                    return (
                        f"{name} is rounded to {_dtype(found)}; apply the edit to the float32 weights, then round the "
                        "result"
                    )
                continue
            if found.dtype == torch.float64 and _same_bits(found.float(), original):
                return (
                    f"{name} is float64 with digits that float32 cannot hold, so that undoing could not restore them; "
                    "convert it to float32 first"
                )
        differing.append(name)
    expected = {**weights, **_sums_elsewhere(state, held)}
    rest = {name: state[name] for name, known in expected.items() if known and name not in originals}
    differing += [name for name, found_sum in checksums(rest).items() if found_sum != expected[name]]
    if not differing:
        return None
    differ = f"{some(differing)} differ{'s' * (len(differing) == 1)}"
    if set(differing) <= originals.keys():
        return f"only {differ}, so they may hold edits, or strengths, that are not listed"
    return differ


def _misfit(edit_files: Sequence[EditFile], originals: State, held: Sequence[HeldEdit]) -> str | None:
    """Which of the held gates do not fit the tensors that they scale, in words; None if all do."""
    gates = [edit for edit in [*held, *edit_files] if isinstance(edit, HeldGates)]
    for name, original in originals.items():
        readers = [(edit, reader) for edit in gates for reader in edit.readers if reader.weight == name]
        groups = {reader.groups for _, reader in readers}
        for edit, reader in readers:
            if len(groups) > 1 or not edit.fits(reader, original.shape):
                return f"an edit that the file lists has {edit.contributions.shape[1]} channels, unlike {name}"
    return None


def _sums_elsewhere(state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> dict[str, str]:
    """Name → checksum of each tensor that the edits ``held`` change, or "" if it is not known."""
    found: dict[str, str] = {}
    for edit in held:
        for name in set(edit.tensors) & state.keys():
            known = isinstance(edit, HeldAddition) and name not in found and state[name].dtype == torch.float32
            found[name] = edit.changed[name].checksum if known and isinstance(edit, HeldAddition) else ""
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; unlike ``torch.equal``, NaN equals NaN, and −0 differs from 0."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
