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

    from salve.editing.edits import EditFile, HeldEdit

_DESCRIPTION = """\
Apply edits to a file of weights, undo them, or show them.

  apply   write a copy of the weights with the edits
  undo    write a copy of the weights without the edits, with the same bits as if they had never been applied
  show    print what edit files say, which edits a run has, or which edits a file of weights holds

EDIT is an edit file (edits/NN-class.json of a run; it needs the originals-….safetensors beside it), or the folder of a
run, where --edit chooses the edit. WEIGHTS is the state_dict that was studied: a .safetensors file or one that
torch.save wrote, perhaps inside a checkpoint, or with a prefix such as "module." before all names, which is kept.
Without WEIGHTS, the classifier of the run is edited. OUT is a .safetensors file, with the dtypes of WEIGHTS.

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
  salve-edit show  outputs/runs/quickstart/<time>
  salve-edit show  edited.safetensors

Edits of one network can be applied together or one after the other, and undone in any order. Their gates multiply. An
edited .safetensors file lists its edits in its metadata. If another program has removed that list, undo all edits in
one command, then apply again those that should stay.
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
        usage="salve-edit {apply,undo} EDIT... [WEIGHTS] OUT [--edit NAME] [--alpha A]\n"
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
    parser.add_argument("--weights", type=Path, help="WEIGHTS, instead of by position")
    parser.add_argument("--out", type=Path, help="OUT, instead of by position")
    given = parser.parse_intermixed_args(arguments)
    if given.action == "show":
        if given.edit or given.weights or given.out or given.alpha is not None:
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
            more = _change(given.action, paths, given.edit, given.alpha)
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


def _change(action: str, paths: Paths, names: Sequence[str], alpha: float | None) -> str:
    """Apply or undo edits and write the result; returns what to add to the message about it."""
    from salve.backbones.adapt import bare_names
    from salve.editing.edits import apply_edit_files, undo_edit_files
    from salve.editing.files import held_in, metadata_with
    from salve.editing.folders import classifier_of, files_of
    from salve.types import UserError

    _refuse_out(paths)
    weights = paths.weights or classifier_of(paths.edits)
    as_it_came, metadata, entry = _read(weights)
    held = held_in(metadata, weights)
    files = files_of(paths.edits, names, every=action == "undo" and bool(held))
    if weights.exists() and paths.out.exists() and any(paths.out.samefile(path) for path in [weights, *files]):
        raise UserError(f"{paths.out} is one of the input files; give another OUT.")
    if action == "undo" and held and not names:
        files = _of_held(files, paths.edits, held, weights)
    edit_files = _loaded(files, alpha)
    bare, _ = bare_names(as_it_came, edit_files[0].weights)
    state = {bare[name]: tensor for name, tensor in as_it_came.items()}
    if action == "apply":
        changed, stay = apply_edit_files(edit_files, state, held), [*held, *edit_files]
    elif held:
        edit_files = [_as_held(edit_file, held, weights, exactly=alpha is not None) for edit_file in edit_files]
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


def _of_held(files: Sequence[Path], given: Sequence[Path], held: "Sequence[HeldEdit]", weights: Path) -> list[Path]:
    """Those edit files of the given folders whose edits the weights hold, and all edit files that were given."""
    from salve.editing.files import load_held
    from salve.types import UserError

    def is_held(file: Path) -> bool:
        said = load_held(file)
        return any(edit.is_same_but_for_strength(said) for edit in held)

    found = [file for file in files if file in given or is_held(file)]
    if not found:
        raise UserError(f"{weights} holds no edit of {given[0]}.")
    return found


def _loaded(files: Sequence[Path], alpha: float | None) -> "list[EditFile]":
    from salve.editing.files import load_edit_files
    from salve.types import UserError

    edit_files = load_edit_files(files)
    if len({edit_file.before for edit_file in edit_files}) > 1:
        other = next(k for k, edit_file in enumerate(edit_files) if edit_file.before != edit_files[0].before)
        raise UserError(f"{files[0]} and {files[other]} were made for different networks; apply them separately.")
    return edit_files if alpha is None else [edit_file.at(alpha) for edit_file in edit_files]


def _as_held(edit_file: "EditFile", held: "Sequence[HeldEdit]", weights: Path, exactly: bool) -> "EditFile":
    """The edit at the strength at which the weights hold it; with ``exactly`` only at its own strength."""
    from salve.types import UserError

    same = [edit for edit in held if edit.key == edit_file.key]
    if not same and not exactly:
        same = [edit for edit in held if edit.is_same_but_for_strength(edit_file)]
    if not same:
        raise UserError(f"{weights} does not hold this edit; it holds {'; '.join(_one_line(e) for e in held)}.")
    if len(same) > 1:
        alphas = ", ".join(f"{edit.edits[0].alpha:g}" for edit in same)
        raise UserError(f"{weights} holds this edit at several strengths ({alphas}); choose one with --alpha.")
    return edit_file if same[0].key == edit_file.key else edit_file.with_edits(same[0].edits)


def _refuse_out(paths: Paths) -> None:
    from salve.editing.files import is_originals
    from salve.types import UserError

    out = paths.out
    if out.suffix != ".safetensors":
        raise UserError(f"OUT must end in .safetensors, the only format that is written, but is {out}.")
    if is_originals(out.name):
        raise UserError(f"{out} has the name of a file of originals, which edit files need; give another OUT.")
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
            save_file(tensors, unfinished, metadata=dict(metadata) or None)
            unfinished.chmod(mode)  # safetensors makes files that only their owner can read
        except (SafetensorError, ValueError, RuntimeError) as error:  # a full disk, or tensors it cannot hold
            raise UserError(f"{path} could not be written: {reason(error)}.") from error


def _shown(path: Path) -> str:
    from salve.editing.files import held_in, load_edit_file, load_held, read_metadata
    from salve.editing.folders import edits_of

    if path.is_dir():
        lines = [f"{path} has these edits:"]
        lines += [f"  {file.name}: {_one_line(load_held(file))}" for file in edits_of(path)]
        return "\n".join(lines)
    if path.suffix == ".safetensors":
        held = held_in(read_metadata(path), path)
        return "\n".join([f"{path} holds {len(held) or 'no'} edit{'s' * (len(held) != 1)}.", *map(_described, held)])
    return f"{path}\n{_described(load_edit_file(path))}"


def _one_line(held: "HeldEdit") -> str:
    parts = [f"{edit.mode} latent {edit.latent} at α = {edit.alpha:g}" for edit in held.edits]
    return f"{held.name}: {', '.join(parts)}" if held.name else ", ".join(parts)


def _described(held: "HeldEdit") -> str:
    from salve.editing.edits import EditFile

    rows = [("edit", held.name)] if held.name else []
    for edit in held.edits:
        open_ = f"scale {edit.scale}, channels {edit.channels}" + (f", sign {edit.sign:+d}" * (edit.channels != "all"))
        rows.append((edit.mode, f"latent {edit.latent} at α = {edit.alpha:g} ({open_})"))
    gate = held.gates().prod(dim=0)
    rows.append(("channels", f"{int((gate != 1).sum())} of {len(gate)} scaled, {int((gate == 0).sum())} closed"))
    rows.append(("site", f"{held.site}, read by {', '.join(held.weights_scaled)}"))
    rows.append(("network", f"{held.backbone}, checksum {held.before[:12]}"))
    if isinstance(held, EditFile):
        rows.append(("edited", f"checksum {held.after[:12]}"))
    rows.append(("SAE", held.sae[:12]))
    return "\n".join(f"  {name:<9} {text}" for name, text in rows)


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
