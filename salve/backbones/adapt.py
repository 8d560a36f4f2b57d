"""Weights as they lie in the wild, under the names that the model gives them."""

from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from salve.types import UserError
from salve.untrusted import shown, some

#: Where a head is kept that was trained beside a backbone or put into the place of the model's own.
HEADS = ("fc", "head", "heads", "classifier", "linear")


def adapted(state: Mapping[str, Tensor], model: nn.Module, reader: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the model's own names, as far as that can be told, and what was done for it, in words.

    What stands before all names (``module.``, ``model.``, …) and what ``torch.compile`` adds within them is left out. A
    head that is one linear layer in a ``Sequential`` or under another name becomes the model's. BatchNorm's counts of
    batches, which some files lack and no model here reads, start at zero.

    Args:
        state: names to tensors. model: what they are meant for. reader: path of its head.
    """
    wanted = model.state_dict()
    names, left_out = bare_names(state, wanted)
    named = {names[name]: tensor for name, tensor in state.items()}
    done = [f"its names are read without {left_out}"] if left_out else []
    head = _other_head(named, wanted, reader)
    if head:
        for part in ("weight", "bias"):
            if f"{head}.{part}" in named:
                named[f"{reader}.{part}"] = named.pop(f"{head}.{part}")
        done.append(f"its {head} is taken as the head, {reader}")
    counts = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    return {**counts, **named}, done


def bare_names(names: Collection[str], wanted: Collection[str]) -> tuple[dict[str, str], str]:
    """Names of a file → the model's own names, and in words what is left out of them; "" if nothing is.

    Args:
        names: as a file has them, perhaps behind a prefix (``module.``, ``model.``, …), or with what ``torch.compile``
            adds within them. wanted: the model's own.

    Raises:
        UserError: two names of the file would be one.
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
    """What stands before most of the wanted names, with its dot; empty if that is not more than half of them."""
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
    """Path of the one linear layer that can only be the head; empty if the head is there or there is no such layer."""
    unknown = named.keys() - wanted
    paths = {name.rpartition(".")[0] for name in unknown}
    if len(paths) != 1 or any(f"{reader}.{part}" in named for part in ("weight", "bias")):
        return ""
    (path,) = paths
    weight = named.get(f"{path}.weight")
    linear = weight is not None and weight.ndim == 2 and unknown <= {f"{path}.weight", f"{path}.bias"}
    return path if linear and path.split(".")[0] in (*HEADS, reader.split(".")[0]) else ""


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load exactly the model's own tensors.

    Raises:
        UserError: one is missing, unknown, of another shape, NaN or infinite.
    """
    wanted = model.state_dict()
    shapes = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    for keys, complaint in (
        (wanted.keys() - state.keys(), "lacks"),
        (state.keys() - wanted.keys(), "has unknown"),
        (shapes, "has another shape for"),
    ):
        if keys:
            raise UserError(f"{origin} does not fit {type(model).__name__}: it {complaint} {some(sorted(keys))}.")
    bad = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(
            f"{origin} holds NaN or infinite values in {some(sorted(bad))}: the training that made it diverged, or the "
            "file is damaged."
        )
    model.load_state_dict(state)
