"""Edits as values: applied to a ``state_dict``, stacked, and undone to the same bits (docs/method.md, Control).

**What an edit fits.** It is made for the network that salve studied, in float32, and fits every ``state_dict`` with the
same names, shapes and *values in float32*: so also the float16 or bfloat16 file that salve cast to float32 to study it.
BatchNorm's ``num_batches_tracked`` is not looked at and may be missing: an evaluated network does not read it.

**What comes out.** The readers' weights are scaled in float32 (float64 ones in float64) and rounded once to the dtype
that they have in the file; every other tensor is passed on as it is. Undoing writes the originals back in that dtype.
Float16 and bfloat16 values are float32 values, so that the bits are the same. A float64 reader fits only if float32
holds all its values: of the others' digits an edit keeps nothing that could be given back, and they are refused. So is
a float32 network that was rounded to half precision after it was studied, since its values are others.

**Several edits.** Their gates multiply. The weights are always computed from the originals, with the factors of each
channel in the order of their size, so that the order of applying and undoing does not change one bit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from salve.artifacts import digest_of, digest_of_tensors
from salve.editing.gating import Channels, Mode, Scale, gate
from salve.types import UserError
from salve.untrusted import some

State = dict[str, Tensor]

#: What a reader's weights may be. Smaller numbers than half precision are for computing, not for keeping weights.
_EDITED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Edit:
    """One latent, one strength.

    Attributes:
        latent: index in the SAE. alpha: strength ≥ 0, +inf allowed for ``suppress``. mode, scale, channels, sign: see
            :mod:`salve.editing.gating`.
    """

    latent: int
    alpha: float
    mode: Mode = "suppress"
    scale: Scale = "unit"
    channels: Channels = "all"
    sign: int = 1


@dataclass(frozen=True, eq=False)
class HeldEdit:
    """What a file of edited weights says of an edit that it holds: all but what undoing needs.

    Attributes:
        name: what it is meant to act on, a class or a set; may be empty. backbone: what the network is, for people.
        site: name of the site. readers: module paths whose input channels are scaled. sae: fingerprint of the SAE.
        edits: what is done; their gates multiply. before: checksum of the network that it was made for.
        contributions: ``[E, M]`` float32, one row per edit.
    """

    name: str
    backbone: str
    site: str
    readers: tuple[str, ...]
    sae: str
    edits: tuple[Edit, ...]
    before: str
    contributions: Tensor

    def __post_init__(self) -> None:
        if len(self.contributions) != len(self.edits):
            raise ValueError(f"{len(self.edits)} edits, but {len(self.contributions)} contribution vectors.")

    @property
    def weights_scaled(self) -> tuple[str, ...]:
        """Names of the weights that it scales."""
        return tuple(f"{reader}.weight" for reader in self.readers)

    @cached_property
    def key(self) -> str:
        """Tells edits apart: the same network, site, latents and strengths have the same one."""
        facts = {name: getattr(self, name) for name in ("site", "sae", "before")}
        # JSON has no infinity that every reader takes.
        edits = [{**asdict(edit), "alpha": repr(float(edit.alpha))} for edit in self.edits]
        rows = digest_of_tensors({"contributions": self.contributions})
        return digest_of({**facts, "readers": list(self.readers), "edits": edits, "contributions": rows})[:16]

    def gates(self) -> Tensor:
        """The gates of its edits, ``[E, M]``."""
        rows = zip(self.contributions, self.edits, strict=True)
        return torch.stack([gate(row, edit.alpha, edit.mode) for row, edit in rows])

    def is_same_but_for_strength(self, other: "HeldEdit") -> bool:
        """Whether both do the same thing to the same network, at strengths that may differ."""
        return _at_zero(self).key == _at_zero(other).key


@dataclass(frozen=True, eq=False)
class EditFile(HeldEdit):
    """A permanent edit of one network, with all that applying and undoing it needs.

    Attributes:
        weights: name → checksum of every tensor of the network (:func:`checksums`).
        originals: name → the weights that are scaled, as they were, float32.
    """

    weights: Mapping[str, str]
    originals: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.originals) != set(self.weights_scaled):
            raise ValueError(f"The original weights {sorted(self.originals)} are not those of {self.readers}.")
        width = self.contributions.shape[1]
        for name, weight in self.originals.items():
            if weight.ndim < 2 or weight.shape[1] != width:
                raise UserError(f"The edit has {width} channels, but {name} has the shape {tuple(weight.shape)}.")
        if any(edit.alpha > 0 for edit in self.edits) == (self.before == self.after):
            raise UserError(
                f"This edit would leave the model as it is: at the site {self.site}, the latents "
                f"{[edit.latent for edit in self.edits]} scale no weight that is not zero."
            )

    @cached_property
    def after(self) -> str:
        """Checksum of the network with this edit alone, in float32."""
        scaled = {name: _scaled(weight, [self], name, torch.float32) for name, weight in self.originals.items()}
        return checksum({**self.weights, **checksums(scaled)})

    def at(self, alpha: float) -> "EditFile":
        """The same edit at another strength.

        Raises:
            UserError: the strength is negative, NaN, or infinite in an enhancement.
        """
        return self.with_edits(tuple(replace(edit, alpha=float(alpha)) for edit in self.edits))

    def with_edits(self, edits: tuple[Edit, ...]) -> "EditFile":
        """The same latents with other strengths."""
        return replace(self, edits=edits)


def _at_zero(held: HeldEdit) -> HeldEdit:
    facts = {name: getattr(held, name) for name in HeldEdit.__dataclass_fields__}
    return HeldEdit(**{**facts, "edits": tuple(replace(edit, alpha=0.0) for edit in held.edits)})


def checksums(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → checksum of its shape and of its values in float32 (its bits, if they are no floating-point numbers).

    BatchNorm's counters are left out: many files lack them.
    """
    found = {}
    for name, tensor in state.items():
        if not is_counter(name):
            found[name] = digest_of_tensors({"": tensor.float() if tensor.is_floating_point() else tensor})[:32]
    return found


def is_counter(name: str) -> bool:
    """Whether a tensor counts batches, which no evaluated network reads."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def checksum(weights: Mapping[str, str]) -> str:
    """One checksum of a whole network from those of its tensors."""
    return digest_of(dict(weights))


def apply_edit_file(edit_file: EditFile, state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()) -> State:
    """The edited ``state_dict``; see :func:`apply_edit_files`."""
    return apply_edit_files([edit_file], state, held)


def apply_edit_files(
    edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()
) -> State:
    """A new ``state_dict`` with edits added; its tensors other than the readers' weights are the ones passed in.

    Args:
        edit_files: what to add, of one network. state: its weights. held: the edits that ``state`` has already.

    Raises:
        UserError: these are not the weights that the edits were made for, or they carry one of them already.
    """
    keys = [edit.key for edit in held]
    for edit_file in edit_files:
        if edit_file.key in keys:
            raise UserError(
                f"These weights carry this edit already{_named(edit_file)}; undo it before applying it again."
            )
        keys.append(edit_file.key)
    problem = _difference(edit_files, state, held)
    if problem and not held and any(_difference([edit_file], state, [edit_file]) is None for edit_file in edit_files):
        raise UserError("These weights carry this edit already; undo it before applying it again.")
    if problem:
        raise UserError(
            f"These weights are not the ones that the edit was made for ({edit_files[0].backbone}"
            f"{', with the edits that the file says it holds' if held else ''}): {problem}."
        )
    return _with(edit_files, state, [*held, *edit_files])


def undo_edit_file(edit_file: EditFile, state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()) -> State:
    """The ``state_dict`` without one edit, bit for bit; see :func:`undo_edit_files`."""
    return undo_edit_files([edit_file], state, held)


def undo_edit_files(
    edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit] = ()
) -> State:
    """A new ``state_dict`` as it would be if some edits had never been applied, bit for bit.

    Args:
        edit_files: what to take away, of one network. state: its weights. held: its other edits, which stay.

    Raises:
        UserError: these weights are not what the edits left.
    """
    if problem := _difference(edit_files, state, [*held, *edit_files]):
        if _difference(edit_files, state, held) is None:
            raise UserError("These weights do not hold the edit: it cannot be undone, since there is nothing to undo.")
        raise UserError(f"These weights are not what the edit left: {problem}; it cannot be undone on them.")
    return _with(edit_files, state, held)


def _named(held: HeldEdit) -> str:
    return f" ({held.name})" if held.name else ""


def _originals(edit_files: Iterable[EditFile]) -> State:
    return {name: weight for edit_file in edit_files for name, weight in edit_file.originals.items()}


def _with(edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> State:
    """``state`` with the weights that the edit_files scale computed anew, under the gates of ``held``."""
    scaled = {
        name: _scaled(weight, held, name, state[name].dtype).to(state[name].device)
        for name, weight in _originals(edit_files).items()
    }
    for name, weight in scaled.items():
        if not weight.isfinite().all() and _originals(edit_files)[name].isfinite().all():
            strongest = max(edit.alpha for one in held for edit in one.edits if math.isfinite(edit.alpha))
            raise UserError(
                f"At α = {strongest:g} the edit would make values in {name} that {_dtype(weight)} does not hold; "
                "choose a smaller α."
            )
    return {**state, **scaled}


def _scaled(weight: Tensor, held: Sequence[HeldEdit], name: str, dtype: torch.dtype) -> Tensor:
    """The original weight ``[out, M, ...]`` with its input channels scaled by all gates on it, in another dtype."""
    gates = [edit.gates() for edit in held if name in edit.weights_scaled]  # each [E, M]
    wide = weight.to(torch.promote_types(dtype, torch.float32), copy=True)
    if gates:
        # Sorted, a channel's factors multiply to the same bits in whatever order the edits came.
        factor = torch.cat(gates).sort(dim=0).values.prod(dim=0)  # [M]
        wide *= factor.to(wide.dtype).reshape((1, -1) + (1,) * (weight.ndim - 2))
    return wide.to(dtype)


def _difference(edit_files: Sequence[EditFile], state: Mapping[str, Tensor], held: Sequence[HeldEdit]) -> str | None:
    """In what ``state`` is not the network that the edit_files were made for, under the gates of ``held``; None: it is.

    Of weights that other edits have scaled, and whose originals are not at hand, nothing can be said.
    """
    weights, originals = edit_files[0].weights, _originals(edit_files)
    if any(edit.before != edit_files[0].before for edit in [*edit_files, *held]):
        return "the edits were made for different networks"
    for edit in held:
        for name in originals.keys() & set(edit.weights_scaled):
            if edit.contributions.shape[1] != originals[name].shape[1]:
                width = edit.contributions.shape[1]
                return f"an edit that they are said to hold has {width} channels, not those of {name}"
    if missing := sorted(weights.keys() - state.keys()):
        return f"there is no {some(missing)}"
    if unknown := sorted(name for name in state.keys() - weights.keys() if not is_counter(name)):
        return f"{some(unknown)} should not be there"
    differing = []
    for name, original in originals.items():
        found = state[name].detach().cpu()
        if found.shape == original.shape and found.dtype in _EDITED:
            if _same_bits(found, _scaled(original, held, name, found.dtype)):
                if _same_bits(found, original.to(found.dtype)) and not _same_bits(found.to(original.dtype), original):
                    return (
                        f"{name} is rounded to {_dtype(found)}; apply the edit to the float32 weights, then round what "
                        "comes out"
                    )
                continue
            if found.dtype == torch.float64 and _same_bits(found.float(), original):
                return (
                    f"{name} is float64 and has digits that float32 does not hold, which undoing could not give back; "
                    "convert it to float32 first, as salve does to study it"
                )
        differing.append(name)
    elsewhere = {name for edit in held for name in edit.weights_scaled}
    rest = {name: state[name] for name in weights if name not in originals and name not in elsewhere}
    differing += [name for name, found_sum in checksums(rest).items() if found_sum != weights[name]]
    if not differing:
        return None
    alone = set(differing) <= originals.keys()
    return (
        f"{some(differing)} {'alone ' * alone}differ{'s' * (len(differing) == 1)}"
        f"{', so that they seem to hold other edits, or other strengths, than are known of' * alone}"
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike ``torch.equal`` also for NaN, and −0 is not 0."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
