"""Files of weights, read without unpickling.

Imports neither torchvision nor timm, so that ``salve-edit`` starts fast.
"""

import argparse
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from salve.backbones.scalars import NUMPY_SCALARS
from salve.types import UserError
from salve.untrusted import check_safetensors, check_torch, reason, shown, some

#: Where training scripts put the weights among other things, the first that is there; as timm does, averages first.
ENTRIES = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "module",
)

#: Bytes of a file's tensors, of which several may share the same numbers, for each byte of the file.
MOST_TIMES = 16
#: Of a tensor's name.
MOST_LETTERS = 1000
#: Types of numbers that weights have.
KINDS = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
    *("uint8", "int8", "int16", "int32", "int64"),
)

_ADVICE = (
    "Where it was made, save its weights alone: torch.save(model.state_dict(), 'weights.pt'), or of a checkpoint its "
    "entry state_dict."
)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """The ``state_dict`` of a file, its tensors as they are, and the entry of the checkpoint that it was.

    Of several entries that :data:`ENTRIES` names the first is read, such as ``state_dict`` or, in an entry,
    ``ema.model``; the entry is empty where the file holds nothing else.

    Raises:
        UserError: no such file, or it holds no ``state_dict``, or one that would be much larger in memory than the file
            is. Nothing is ever unpickled.
    """
    path = Path(os.path.expanduser(path))
    state, entry = _found(_content(path), path)
    check_tensors(state, path)
    return dict(state), entry


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The ``state_dict`` of a file, also of a checkpoint that holds it among other things, in float32 where it is half.

    Raises:
        UserError: no such file, or it holds no ``state_dict``. Nothing is ever unpickled.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """As :func:`read_tensors`, in float32 where it is half."""
    state, entry = read_tensors(path)
    return {key: value.float() if _is_half(value) else value for key, value in state.items()}, entry


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def is_state_dict(content: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether these are names with tensors."""
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _found(content: object, path: str | os.PathLike[str]) -> tuple[Mapping[str, Tensor], str]:
    entry: list[str] = []
    while not is_state_dict(content):
        inner = (
            {key: value for key, value in content.items() if value and isinstance(value, Mapping)}
            if isinstance(content, Mapping)
            else {}
        )
        known = [key for key in ENTRIES if key in inner] or [
            key for key, value in inner.items() if is_state_dict(value)
        ]
        if not known:
            held = f"; its entries are {some(content, 5)}" if isinstance(content, Mapping) and content else ""
            raise UserError(f"{path} holds no state_dict (parameter names to tensors){held}.")
        if known[0] not in ENTRIES and len(known) > 1:
            raise UserError(
                f"{path} holds several state_dicts ({some(known, 5)}); save the one that is meant by itself."
            )
        entry.append(known[0])
        content = inner[known[0]]
    return content, ".".join(entry)


def _content(path: Path) -> Any:
    """What a file holds, read without running anything in it."""
    missing = f"There is no file {path} with weights."
    if path.suffix == ".safetensors":
        check_safetensors(path, missing)
    else:
        check_torch(path, missing)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # timm's own training checkpoints, and others', hold the command line; many the best accuracy, as numpy has it.
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_SCALARS]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript")  # the error below says it too
            return torch.load(path, "cpu", weights_only=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise UserError(f"{path} could not be read as a state_dict: {reason(error)}.") from error
        raise UserError(f"{path} was not loaded: it holds a TorchScript model. {_ADVICE}") from error
    except (SafetensorError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} could not be read as a state_dict: {reason(error)}.") from error
    except Exception as error:  # UnpicklingError for code in the file, and anything for a damaged one
        named = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
        if named is None:
            raise UserError(f"{path} was not loaded: it is damaged, or holds more than tensors.") from error
        raise UserError(
            f"{path} was not loaded: it holds a pickled {shown(named[1])}, and salve never unpickles. {_ADVICE}"
        ) from error


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what no network's weights are, so that whatever looks at tensors may take them for arrays of numbers.

    Raises:
        UserError: a tensor is no plain array of numbers, its name is no name, or the tensors repeat the few numbers of
            their file so often that they would not fit into memory.
    """
    for name, tensor in state.items():
        if len(name) > MOST_LETTERS:
            raise UserError(f"{path} holds a tensor whose name has {len(name):,} letters ({shown(name, 20)}).")
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or kind not in KINDS:
            raise UserError(
                f"{path} holds {shown(name)}, which is no plain array of numbers ({kind}, {tensor.layout}): save it as "
                "floating-point numbers."
            )
        if tensor.is_neg():
            raise UserError(f"{path} holds {shown(name)} as a view that changes signs when it is read: save a copy.")
    in_memory = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if in_memory > MOST_TIMES * max(path.stat().st_size, 2**20):
        raise UserError(
            f"{path} was not loaded: its tensors repeat the same numbers, and would take {in_memory:,} bytes, more "
            f"than {MOST_TIMES} times those of the file."
        )
