# SPDX-License-Identifier: MIT
"""``salve-edit``: apply edits to a file of weights, undo them, or show them.

Heavy modules are imported only where they are used, so that ``--help`` and refusals are fast.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from salve.ending import as_told

if TYPE_CHECKING:
    from torch import Tensor

_DESCRIPTION = """\
Apply edits to a file of weights, undo them, or show them.

  apply   write a copy of the weights with the edits
  undo    write a copy of the weights without the edits, with the same bits as if they had never been applied
  show    print what edit files say, which edits a run has, or which edits a file of weights holds

EDIT is an edit file (edits/NN-class.json of a run; it needs the originals-….safetensors beside it, and the
changes-….safetensors if it names one), or the folder of a run, where --edit chooses the edit. WEIGHTS is the state_dict
that was studied: a .safetensors file or one that torch.save wrote, perhaps inside a checkpoint, or with a prefix such
as "module." before all names, which is kept. Without WEIGHTS, the classifier of the run is edited. OUT is a
.safetensors file, with the dtypes of WEIGHTS.

An edit fits only the weights that it was made for, compared in float32. float16 and bfloat16 weights fit if they were
studied as they are, not if a float32 network was rounded to them later. float64 weights fit if they are exact in
float32.
"""

_EXAMPLES = """\
examples:
  salve-edit apply 00-church.json model.safetensors edited.safetensors
  salve-edit apply 00-church.json 07-tench.json model.safetensors edited.safetensors
  salve-edit apply outputs/runs/quickstart/<time> --edit church --out edited.safetensors
  salve-edit apply outputs/runs/quickstart/<time> --edit church --alpha inf model.pt edited.safetensors
  salve-edit undo  07-tench.json edited.safetensors church-only.safetensors
  salve-edit undo  outputs/runs/quickstart/<time> edited.safetensors restored.safetensors
  salve-edit undo  07-tench.json edited.safetensors steered.safetensors --held 02-steering.json
  salve-edit show  outputs/runs/quickstart/<time>
  salve-edit show  edited.safetensors

Edits of one network can be applied together or one after the other, and undone in any order. Gates multiply; what
other edits add to the weights is summed. An edited .safetensors file lists its edits in its metadata. If another
program has removed that list, undo all edits in one command, then apply again those that should stay. The list does not
hold new weights: where WEIGHTS holds an edit with new values of a tensor that EDIT changes too, give that edit's file
with --held.
"""


#: Letters of a printed line, at most.
MOST_LETTERS = 2000


class Paths(NamedTuple):
    """The paths on the command line."""

    edits: list[Path]
    weights: Path | None
    out: Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, or 2 after an error, which is one sentence on stderr.
    """
    return as_told(partial(_main, arguments), "salve-edit: stopped; nothing half-written is left.")


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="salve-edit",
        usage="salve-edit {apply,undo} EDIT... [WEIGHTS] OUT [--edit NAME] [--alpha A] [--held EDIT]\n"
        "       salve-edit show EDIT_OR_WEIGHTS...",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("apply", "undo", "show"), help="what to do")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="EDIT... [WEIGHTS] [OUT], in this order")
    parser.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="NAME",
        help="an edit of the run, by its class or the name of its file; may be given several times",
    )
    parser.add_argument(
        "--alpha", type=strength, metavar="A", help="the strength, instead of the file's: a number from 0, or inf"
    )
    parser.add_argument(
        "--held",
        action="append",
        default=[],
        type=Path,
        metavar="EDIT",
        help="an edit that WEIGHTS holds and keeps, or the folder of a run that has it; may be given several times",
    )
    parser.add_argument("--weights", type=Path, help="WEIGHTS, instead of by position")
    parser.add_argument("--out", type=Path, help="OUT, instead of by position")
    given = parser.parse_intermixed_args(arguments)
    if given.action == "show":
        if given.edit or given.held or given.weights or given.out or given.alpha is not None:
            parser.error("show takes files and folders, and no options")
        if not given.paths:
            parser.error("show takes an edit file, the folder of a run, or a .safetensors file of weights")
    from salve.types import UserError

    try:
        if given.action == "show":
            for path in given.paths:
                _say(_shown(path))
        else:
            paths = _by_position(parser, given.paths, given.weights, given.out)
            more = _change(given.action, paths, given.edit, given.alpha, given.held)
            _say(f"Wrote {paths.out}{more}.")
    except (UserError, OSError) as error:
        reason = str(error) if isinstance(error, UserError) else _of_system(error)
        _say(f"salve-edit: {' '.join(reason.split())}", sys.stderr)
        return 2
    return 0


def _by_position(
    parser: argparse.ArgumentParser, paths: Sequence[Path], weights: Path | None, out: Path | None
) -> Paths:
    """Tell paths apart: first edits (.json files and folders), then the weights, then the file to write."""
    edits = list(paths)
    if out is None:
        if len(edits) < 2:
            parser.error("the following are required: EDIT... [WEIGHTS] OUT; salve-edit --help has examples")
        out = edits.pop()
    if weights is None and edits and edits[-1].suffix != ".json" and not edits[-1].is_dir():
        weights = edits.pop()
    if not edits:
        parser.error("no EDIT was given: an edit file (.json), or the folder of a run")
    return Paths(edits, weights, out)


def strength(text: str) -> float:
    """Parse a strength; refuse numbers that only overflow makes infinite in float32."""
    from salve.values import LARGEST

    try:
        value = float(text)
    except ValueError:
        value = -1.0
    meant = text.strip().lower().lstrip("+") in ("inf", "infinity")
    if not (0 <= value <= LARGEST or meant):
        raise argparse.ArgumentTypeError(f"it must be a number from 0 to {LARGEST:.2g}, or inf, not {text[:40]}")
    return value


def _change(action: str, paths: Paths, names: Sequence[str], alpha: float | None, kept: Sequence[Path]) -> str:
    """Apply or undo edits and write the result; returns what to add to the message about it."""
    from salve.backbones.adapt import bare_names
    from salve.editing.applying import apply_edit_files, undo_edit_files
    from salve.editing.files import held_in, metadata_with
    from salve.editing.folders import classifier_of, files_of
    from salve.editing.held import as_held, loaded, of_held, with_weights
    from salve.types import UserError

    _refuse_out(paths)
    weights = paths.weights or classifier_of(paths.edits)
    as_it_came, metadata, entry = _read(weights)
    held, beside = with_weights(held_in(metadata, weights), kept, weights)
    files = files_of(paths.edits, names, every=action == "undo" and bool(held))
    if weights.exists() and paths.out.exists() and any(paths.out.samefile(path) for path in [weights, *files, *beside]):
        raise UserError(f"{paths.out} is one of the input files; give another OUT.")
    if action == "undo" and held and not names:
        files = of_held(files, paths.edits, held, weights)
    edit_files = loaded(files, alpha)
    bare, _ = bare_names(as_it_came, edit_files[0].weights)
    state = {bare[name]: tensor for name, tensor in as_it_came.items()}
    if action == "apply":
        changed, stay = apply_edit_files(edit_files, state, held), [*held, *edit_files]
    elif held:
        edit_files = [as_held(edit_file, held, weights, exactly=alpha is not None) for edit_file in edit_files]
        undone = {edit_file.key for edit_file in edit_files}
        stay = [edit for edit in held if edit.key not in undone]
        changed = undo_edit_files(edit_files, state, stay)
    else:
        try:
            changed, stay = undo_edit_files(edit_files, state), []
        except UserError as error:
            raise UserError(
                f"{error} {weights} does not list its edits: name all of them, each at the strength at which it was "
                "applied."
            ) from error
    _write(paths.out, {name: changed[bare[name]] for name in as_it_came}, metadata_with(metadata, stay))
    return f", the plain state_dict of entry {entry}; other entries of {weights.name} are left out" if entry else ""


def _refuse_out(paths: Paths) -> None:
    from salve.editing.files import is_beside
    from salve.types import UserError

    out = paths.out
    if out.suffix != ".safetensors":
        raise UserError(f"OUT must end in .safetensors, the only format that is written, but is {out}.")
    if is_beside(out.name):
        raise UserError(f"{out} has the name of a file that edit files need beside them; give another OUT.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file as OUT.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} to write {out.name} into.")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"The folder {out.parent} cannot be written to; give another OUT.")


def _read(path: Path) -> "tuple[dict[str, Tensor], dict[str, str], str]":
    """Tensors and metadata of a file, and the entry of the checkpoint that holds them ("" if none)."""
    from salve.backbones.weights import read_tensors
    from salve.editing.files import read_safetensors

    if path.suffix == ".safetensors":
        return (*read_safetensors(path, f"There is no file of weights {path}."), "")
    state, entry = read_tensors(path)
    return state, {}, entry


def _write(path: Path, state: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from salve.artifacts import written_whole
    from salve.types import UserError
    from salve.untrusted import reason

    tensors, seen = {}, set()
    for name, tensor in state.items():
        tensors[name] = tensor.detach().cpu().contiguous()
        address = tensors[name].untyped_storage().data_ptr()
        if address in seen:  # tensors of a torch file may share memory, which safetensors refuses
            tensors[name] = tensors[name].clone()
        seen.add(address)
    with written_whole(path) as unfinished:
        try:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(tensors, unfinished, metadata=dict(metadata))
            unfinished.chmod(mode)  # safetensors makes files that only their owner can read
        except (SafetensorError, ValueError, RuntimeError) as error:  # a full disk, or tensors it cannot hold
            raise UserError(f"{path} could not be written: {reason(error)}.") from error


def _shown(path: Path) -> str:
    from salve.editing.describe import described
    from salve.editing.files import held_in, load_edit_file, load_held, read_metadata
    from salve.editing.folders import edits_of

    if path.is_dir():
        lines = [f"{path} has these edits:"]
        lines += [f"  {file.name}: {load_held(file).title}" for file in edits_of(path)]
        return "\n".join(lines)
    if path.suffix == ".safetensors":
        held = held_in(read_metadata(path), path)
        return "\n".join([f"{path} holds {len(held) or 'no'} edit{'s' * (len(held) != 1)}.", *map(described, held)])
    return f"{path}\n{described(load_edit_file(path))}"


def _of_system(error: OSError) -> str:
    from salve.untrusted import shown

    where = f"{shown(str(error.filename), 500)}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _say(text: str, stream: "object | None" = None) -> None:
    """Print text without control characters, since texts from files must not control the terminal."""
    from salve.untrusted import shown

    print("\n".join(shown(line, MOST_LETTERS) for line in text.split("\n")), file=stream or sys.stdout)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
