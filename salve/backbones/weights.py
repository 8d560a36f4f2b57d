# SPDX-License-Identifier: MIT
"""Read files of weights, without unpickling code.

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

#: Entries under which checkpoints hold their weights. The first that exists is read. Averaged weights come first, as
#: in timm.
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

#: Bytes of tensors in memory per byte of their file, at most; tensors in a file may share the same numbers.
MOST_TIMES = 16
#: Letters of a tensor's name, at most.
MOST_LETTERS = 1000
#: Dtypes that weights may have.
KINDS = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
    *("uint8", "int8", "int16", "int32", "int64"),
)

_ADVICE = (
    "Where it was made, save only its weights: torch.save(model.state_dict(), 'weights.pt'), or the state_dict of a "
    "checkpoint."
)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """Read the ``state_dict`` of a file, perhaps out of a checkpoint; nothing is unpickled.

    Of several entries the first in :data:`ENTRIES` is read.

    Returns:
        The tensors as they are; and the checkpoint's entry, such as ``state_dict`` or ``ema.model``, "" if the file
        holds nothing else.

    Raises:
        UserError: there is no file, or it holds no ``state_dict``, or one that is much larger in memory than the file.
    """
    path = Path(os.path.expanduser(path))
    state, entry = _found(_content(path), path)
    check_tensors(state, path)
    return dict(state), entry


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """As :func:`read_tensors`; half precision becomes float32."""
    state, entry = read_tensors(path)
    return {key: value.float() if _is_half(value) else value for key, value in state.items()}, entry


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def is_state_dict(content: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether something maps names to tensors."""
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
                f"{path} holds several state_dicts ({some(known, 5)}); save the one you mean in a file of its own."
            )
        entry.append(known[0])
        content = inner[known[0]]
    return content, ".".join(entry)


def _content(path: Path) -> Any:
    """Load a file without running code from it."""
    missing = f"There is no file of weights {path}."
    if path.suffix == ".safetensors":
        check_safetensors(path, missing)
    else:
        check_torch(path, missing)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training checkpoints often hold the command line (timm's do), or the best accuracy as a NumPy number.
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_SCALARS]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript")  # the error below says the same
            return torch.load(path, "cpu", weights_only=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise UserError(f"{path} could not be read as a state_dict: {reason(error)}.") from error
        raise UserError(f"{path} was not loaded: it holds a TorchScript model. {_ADVICE}") from error
    except (SafetensorError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} could not be read as a state_dict: {reason(error)}.") from error
    except Exception as error:  # UnpicklingError for code in the file, anything for a damaged one
        named = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
        if named is None:
            raise UserError(f"{path} was not loaded: it is damaged, or holds more than tensors. {_ADVICE}") from error
        raise UserError(
            f"{path} was not loaded: it holds a pickled {shown(named[1])}, and salve never unpickles. {_ADVICE}"
        ) from error


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors are plain arrays of numbers of a plausible size.

    Args:
        state: names to tensors. path: their file.

    Raises:
        UserError: a tensor is no plain array of numbers, its name is too long, or the tensors are much larger in memory
            than the file, because they share the same numbers.
    """
    for name, tensor in state.items():
        if len(name) > MOST_LETTERS:
            raise UserError(f"{path} holds a tensor whose name has {len(name):,} letters ({shown(name, 20)}).")
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or kind not in KINDS:
            raise UserError(
                f"{path} holds {shown(name)}, which is no plain array of numbers ({kind}, {tensor.layout}); save it as "
                "floating-point numbers."
            )
        if tensor.is_neg():
            raise UserError(f"{path} holds {shown(name)} as a view with negated values; save a copy of it.")
    in_memory = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if in_memory > MOST_TIMES * max(path.stat().st_size, 2**20):
        raise UserError(
            f"{path} was not loaded: its tensors share the same numbers, and would take {in_memory:,} bytes in memory, "
            f"more than {MOST_TIMES} times the size of the file."
        )
