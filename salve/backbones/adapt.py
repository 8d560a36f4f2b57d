# SPDX-License-Identifier: MIT
"""Rename the tensors of a file to what the model calls them, and load them."""

from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from salve.types import UserError
from salve.untrusted import shown, some

#: First part of the path of a head under another name than the model's own.
HEADS = ("fc", "head", "heads", "classifier", "linear")
#: What ``torch.optim.swa_utils.AveragedModel`` keeps beside the weights.
AVERAGED = "n_averaged"


def adapted(state: Mapping[str, Tensor], model: nn.Module, reader: str) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors to the model's own names, as far as these can be recognised.

    A prefix of all names (``module.``, ``model.``, …) and what ``torch.compile`` adds within names are removed. A head
    that is one linear layer in a ``Sequential``, or has another name, becomes the model's head. BatchNorm's counts of
    batches, which some files lack and no model here reads, start at zero; the count of averaged models is left out.

    Args:
        state: names to tensors. model: which they are for. reader: path of its head; empty if it has no single one.

    Returns:
        The tensors under their new names, and what was done, in parts of a sentence.
    """
    wanted = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if name != AVERAGED}
    names, left_out = bare_names(state, wanted)
    named = {names[name]: tensor for name, tensor in state.items()}
    done = [f"{left_out} is removed from the names of its tensors"] if left_out else []
    head = _other_head(named, wanted, reader) if reader else ""
    if head:
        for part in ("weight", "bias"):
            if f"{head}.{part}" in named:
                named[f"{reader}.{part}"] = named.pop(f"{head}.{part}")
        done.append(f"its {head} is used as the head, {reader}")
    counts = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    return {**counts, **named}, done


def bare_names(names: Collection[str], wanted: Collection[str]) -> tuple[dict[str, str], str]:
    """Find the model's names for the names in a file.

    Args:
        names: as a file has them, perhaps with a prefix (``module.``, ``model.``, …), or with what ``torch.compile``
            adds within them. wanted: the model's own.

    Returns:
        Names in the file → the model's names; and what is removed, for a sentence, "" if nothing.

    Raises:
        UserError: two names of the file become the same.
    """
    plain = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in names}
    prefix = _prefix(plain.values(), wanted)
    bare = {name: short.removeprefix(prefix) for name, short in plain.items()}
    first: dict[str, str] = {}
    for name, short in bare.items():
        if short in first:
            raise UserError(f"The weights hold {shown(short)} twice, as {some([first[short], name])}.")
        first[short] = name
    compiled = any(name != short for name, short in plain.items())
    return bare, " and ".join(["'_orig_mod.'"] * compiled + [f"'{shown(prefix)}'"] * bool(prefix))


def _prefix(names: Collection[str], wanted: Collection[str]) -> str:
    """The prefix of most of the wanted names, with its dot; empty if fewer than half of them have it."""
    found: Counter[str] = Counter()
    for name in names:
        start = 0
        while True:
            if name[start:] in wanted:
                found[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    best = max(found, key=lambda prefix: (found[prefix], prefix == ""), default="")
    counts = sum(name.endswith("num_batches_tracked") for name in wanted)
    return best if 2 * found[best] > len(wanted) - counts else ""


def _other_head(named: Mapping[str, Tensor], wanted: Collection[str], reader: str) -> str:
    """Path of the one linear layer that must be the head; empty if the head is there or there is no such layer."""
    unknown = named.keys() - wanted
    paths = {name.rpartition(".")[0] for name in unknown}
    if len(paths) != 1 or any(f"{reader}.{part}" in named for part in ("weight", "bias")):
        return ""
    (path,) = paths
    weight = named.get(f"{path}.weight")
    linear = weight is not None and weight.ndim == 2 and unknown <= {f"{path}.weight", f"{path}.bias"}
    return path if linear and path.split(".")[0] in (*HEADS, reader.split(".")[0]) else ""


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load tensors into a model that has exactly these.

    Args:
        model: loaded in place. state: names to tensors. origin: where they are from, for messages.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, NaN or infinite.
    """
    wanted = model.state_dict()
    shapes = [name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape]
    for names, complaint in (
        (wanted.keys() - state.keys(), "lacks"),
        (state.keys() - wanted.keys(), "has unknown"),
        (shapes, "has another shape for"),
    ):
        if names:
            raise UserError(f"{origin} does not fit {type(model).__name__}: it {complaint} {some(sorted(names))}.")
    check_finite(state, origin)
    model.load_state_dict(state)


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        state: names to tensors. origin: where they are from, for the message.
    """
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(
            f"{origin} holds NaN or infinite values in {some(sorted(bad))}; either its training diverged, or the file "
            "is damaged."
        )
