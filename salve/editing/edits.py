"""Edits as values: applied to a ``state_dict``, stacked, and undone to the same bits (docs/method.md, Control).

**Which weights an edit fits.** It is made for the network that salve studied, in float32. It fits every ``state_dict``
with the same names, shapes and *values in float32*, such as the float16 or bfloat16 file that salve cast to float32 to
study it. BatchNorm's ``num_batches_tracked`` may differ or be missing: a network in eval mode does not read it.

**What is written.** The readers' weights are scaled in float32 (float64 ones in float64) and rounded once to their
dtype in the file. All other tensors stay as they are. Undoing writes back the originals in the same dtype. The bits are
the same, because every float16 and bfloat16 value is exact in float32. Float64 readers are refused if float32 cannot
hold their values, because undoing could not restore them. A float32 network that was rounded to half precision after it
was studied is refused, because its values differ.

**Several edits.** Their gates multiply. The weights are always computed from the originals, and the factors of each
channel are sorted by size, so that the order of applying and undoing does not change any bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from salve.artifacts import digest_of, digest_of_tensors
from salve.backbones.site import Reader
from salve.editing.gating import Channels, Mode, Scale, gate
from salve.types import UserError
from salve.untrusted import some

State = dict[str, Tensor]

#: Dtypes that the weights of a reader may have.
_EDITED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Edit:
    """One latent at one strength.

    Attributes:
        latent: index in the SAE. alpha: strength ≥ 0, or +inf for ``suppress``.
        mode, scale, channels, sign: see :mod:`salve.editing.gating`.
    """

    latent: int
    alpha: float
    mode: Mode = "suppress"
    scale: Scale = "unit"
    channels: Channels = "all"
    sign: int = 1


@dataclass(frozen=True, eq=False)
class HeldEdit:
    """Edits of one network that belong together, without the original weights that undoing needs.

    A file of edited weights holds such records.

    Attributes:
        name: what they act on, such as a class; may be empty. backbone: the network, for people.
        site: name of the site. readers: the weights whose input channels are scaled. sae: fingerprint of the SAE.
        edits: ``E`` edits, whose gates multiply. before: checksum of the network that they were made for.
        contributions: ``[E, M]`` float32, one row per edit.
    """

    name: str
    backbone: str
    site: str
    readers: tuple[Reader, ...]
    sae: str
    edits: tuple[Edit, ...]
    before: str
    contributions: Tensor

    def __post_init__(self) -> None:
        if len(self.contributions) != len(self.edits):
            raise ValueError(f"{len(self.edits)} edits, but {len(self.contributions)} contribution vectors.")

    @property
    def weights_scaled(self) -> tuple[str, ...]:
        """Names of the weights that are scaled."""
        return tuple(reader.weight for reader in self.readers)

    @cached_property
    def key(self) -> str:
        """Identifies the edits: it is the same for the same network, site, latents and strengths."""
        facts = {name: getattr(self, name) for name in ("site", "sae", "before")}
        # Standard JSON has no infinity.
        edits = [{**asdict(edit), "alpha": repr(float(edit.alpha))} for edit in self.edits]
        rows = digest_of_tensors({"contributions": self.contributions})
        readers = {reader.weight: reader.groups for reader in self.readers}
        return digest_of({**facts, "readers": readers, "edits": edits, "contributions": rows})[:16]

    def gates(self) -> Tensor:
        """The gates of the edits, ``[E, M]``."""
        rows = zip(self.contributions, self.edits, strict=True)
        return torch.stack([gate(row, edit.alpha, edit.mode) for row, edit in rows])

    def is_same_but_for_strength(self, other: "HeldEdit") -> bool:
        """Whether both are the same edits of the same network, perhaps at different strengths."""
        return _at_zero(self).key == _at_zero(other).key


@dataclass(frozen=True, eq=False)
class EditFile(HeldEdit):
    """Edits of one network, with what applying and undoing them needs.

    Attributes:
        weights: name → checksum of every tensor of the network (:func:`checksums`).
        originals: name → the weights that are scaled, without edits, float32.

    Raises:
        UserError: the contributions do not fit the weights, or the edit would change nothing.
    """

    weights: Mapping[str, str]
    originals: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.originals) != set(self.weights_scaled):
            raise ValueError(f"The original weights {sorted(self.originals)} are not {self.weights_scaled}.")
        width = self.contributions.shape[1]
        for reader in self.readers:
            shape, groups = tuple(self.originals[reader.weight].shape), reader.groups
            if len(shape) < 2 or shape[1] * groups != width or shape[0] % groups:
                in_groups = f" in {groups} groups" if groups > 1 else ""
                raise UserError(f"The edit has {width} channels, but {reader.weight} has the shape {shape}{in_groups}.")
        if any(edit.alpha > 0 for edit in self.edits) == (self.before == self.after):
            raise UserError(
                f"This edit would not change the model: at the site {self.site}, all weights that the latents "
                f"{[edit.latent for edit in self.edits]} scale are zero."
            )

    @cached_property
    def after(self) -> str:
        """Checksum of the network with only this edit, in float32."""
        scaled = {name: _scaled(weight, [self], name, torch.float32) for name, weight in self.originals.items()}
        return checksum({**self.weights, **checksums(scaled)})

    def at(self, alpha: float) -> "EditFile":
        """The same edits, all at another strength.

        Raises:
            UserError: the strength is negative, NaN, or infinite for ``enhance``.
        """
        return self.with_edits(tuple(replace(edit, alpha=float(alpha)) for edit in self.edits))

    def with_edits(self, edits: tuple[Edit, ...]) -> "EditFile":
        """The same edit file with other edits of the same latents, such as at other strengths."""
        return replace(self, edits=edits)


def _at_zero(held: HeldEdit) -> HeldEdit:
    facts = {name: getattr(held, name) for name in HeldEdit.__dataclass_fields__}
    return HeldEdit(**{**facts, "edits": tuple(replace(edit, alpha=0.0) for edit in held.edits)})


def checksums(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → checksum of a tensor's shape and of its values in float32 (of its bits, if it is not floating-point).

    BatchNorm's counters are left out, because many files lack them.
    """
    found = {}
    for name, tensor in state.items():
        if not is_counter(name):
            found[name] = digest_of_tensors({"": tensor.float() if tensor.is_floating_point() else tensor})[:32]
    return found


def is_counter(name: str) -> bool:
    """Whether a tensor counts batches for BatchNorm; a network in eval mode does not read it."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def checksum(weights: Mapping[str, str]) -> str:
    """One checksum of a network, from the checksums of its tensors."""
    return digest_of(dict(weights))


def apply_edit_file(edit_file: EditFile, state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()) -> State:
    """Apply one edit file; see :func:`apply_edit_files`."""
    return apply_edit_files([edit_file], state, held)


def apply_edit_files(
    edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()
) -> State:
    """Apply edits to weights.

    Args:
        edit_files: the edits, all of one network. state: its weights. held: edits that ``state`` holds already.

    Returns:
        A new ``state_dict``; tensors other than the readers' weights are those of ``state``.

    Raises:
        UserError: the edits were made for other weights, or ``state`` holds one of them already.
    """
    keys = [edit.key for edit in held]
    for edit_file in edit_files:
        if edit_file.key in keys:
            raise UserError(
                f"These weights hold this edit already{_named(edit_file)}; undo it before applying it again."
            )
        keys.append(edit_file.key)
    problem = _difference(edit_files, state, held)
    if problem and not held and any(_difference([edit_file], state, [edit_file]) is None for edit_file in edit_files):
        raise UserError("These weights hold this edit already; undo it before applying it again.")
    if problem:
        raise UserError(
            f"These weights are not the ones that the edit was made for ({edit_files[0].backbone}"
            f"{', with the edits that the file lists' if held else ''}): {problem}."
        )
    return _with(edit_files, state, [*held, *edit_files])


def undo_edit_file(edit_file: EditFile, state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()) -> State:
    """Undo one edit file; see :func:`undo_edit_files`."""
    return undo_edit_files([edit_file], state, held)


def undo_edit_files(
    edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()
) -> State:
    """Undo edits of weights.

    Args:
        edit_files: the edits, all of one network. state: its weights. held: other edits of ``state``, which stay.

    Returns:
        A new ``state_dict`` with the same bits as if the edits had never been applied.

    Raises:
        UserError: ``state`` is not what applying the edits gives.
    """
    if problem := _difference(edit_files, state, [*held, *edit_files]):
        if _difference(edit_files, state, held) is None:
            raise UserError("These weights do not hold the edit, so there is nothing to undo.")
        raise UserError(f"The edit cannot be undone, because these weights are not what applying it gave: {problem}.")
    return _with(edit_files, state, held)


def _named(held: HeldEdit) -> str:
    return f" ({held.name})" if held.name else ""


def _originals(edit_files: Iterable[EditFile]) -> State:
    return {name: weight for edit_file in edit_files for name, weight in edit_file.originals.items()}


def _with(edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> State:
    """``state``, with the weights that ``edit_files`` scale computed from the originals and the gates of ``held``."""
    scaled = {
        name: _scaled(weight, held, name, state[name].dtype).to(state[name].device)
        for name, weight in _originals(edit_files).items()
    }
    for name, weight in scaled.items():
        if not weight.isfinite().all() and _originals(edit_files)[name].isfinite().all():
            strongest = max(edit.alpha for one in held for edit in one.edits if math.isfinite(edit.alpha))
            raise UserError(
                f"At α = {strongest:g} the edit would give values in {name} that {_dtype(weight)} cannot hold; choose "
                "a smaller α."
            )
    return {**state, **scaled}


def _scaled(weight: Tensor, held: Sequence[HeldEdit], name: str, dtype: torch.dtype) -> Tensor:
    """The original weight ``[out, M / groups, …]`` with its input channels scaled by all gates, as ``dtype``."""
    readers = {edit: reader for edit in held for reader in edit.readers if reader.weight == name}
    gates = [edit.gates() for edit in readers]  # each [E, M]
    wide = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
    if gates:
        # Sorted, so that the product has the same bits in whatever order the edits came.
        factor = torch.cat(gates).sort(dim=0).values.prod(dim=0)  # [M]
        wide = next(iter(readers.values())).scaled(wide, factor.to(wide.dtype))
    return wide.to(dtype)


def _difference(edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> str | None:
    """How ``state`` differs from the network of ``edit_files`` under the gates of ``held``, in words; None if not.

    Weights that other edits have scaled, and whose originals are not at hand, cannot be compared.
    """
    weights, originals = edit_files[0].weights, _originals(edit_files)
    if any(edit.before != edit_files[0].before for edit in [*edit_files, *held]):
        return "the edits were made for different networks"
    for edit in held:
        for name in originals.keys() & set(edit.weights_scaled):
            width = edit.contributions.shape[1]
            groups = {
                reader.groups for other in (edit, *edit_files) for reader in other.readers if reader.weight == name
            }
            if len(groups) != 1 or width != originals[name].shape[1] * groups.pop():
                return f"an edit that the file lists has {width} channels, unlike {name}"
    if missing := sorted(weights.keys() - state.keys()):
        return f"they lack {some(missing)}"
    if unknown := sorted(name for name in state.keys() - weights.keys() if not is_counter(name)):
        return f"they have unknown tensors, {some(unknown)}"
    differing = []
    for name, original in originals.items():
        found = state[name].detach().cpu()
        if found.shape == original.shape and found.dtype in _EDITED:
            if _same_bits(found, _scaled(original, held, name, found.dtype)):
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
    elsewhere = {name for edit in held for name in edit.weights_scaled}
    rest = {name: state[name] for name in weights if name not in originals and name not in elsewhere}
    differing += [name for name, found_sum in checksums(rest).items() if found_sum != weights[name]]
    if not differing:
        return None
    differ = f"{some(differing)} differ{'s' * (len(differing) == 1)}"
    if set(differing) <= originals.keys():
        return f"only {differ}, so they may hold edits, or strengths, that are not listed"
    return differ


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; unlike ``torch.equal``, NaN equals NaN, and −0 differs from 0."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
