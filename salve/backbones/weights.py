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

from salve.types import UserError

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

_ADVICE = (
    "Where it was made, save its weights alone: torch.save(model.state_dict(), 'weights.pt'), or of a checkpoint its "
    "entry state_dict."
)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a plain ``state_dict``, as they are in a safetensors or torch file.

    Raises:
        UserError: no such file, or it holds no plain ``state_dict``. Nothing is ever unpickled.
    """
    content = _content(path)
    if not is_state_dict(content):
        _, entry = _found(content, path)
        raise UserError(
            f"{path} is a checkpoint, not a plain state_dict (parameter names to tensors): save its entry {entry} by "
            "itself, with the names that the model itself gives its parameters."
        )
    return dict(content)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The ``state_dict`` of a file, also of a checkpoint that holds it among other things, in float32 where it is half.

    Raises:
        UserError: no such file, or it holds no ``state_dict``. Nothing is ever unpickled.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str]:
    """As :func:`read_state_dict`, and the entry of the checkpoint that it was, such as ``state_dict`` or ``ema.model``.

    Of several entries that :data:`ENTRIES` names the first is read; the entry is empty where the file holds nothing
    else.
    """
    state, entry = _found(_content(path), path)
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in state.items()}, entry


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
            held = f"; its entries are {_some(content)}" if isinstance(content, Mapping) and content else ""
            raise UserError(f"{path} holds no state_dict (parameter names to tensors){held}.")
        if known[0] not in ENTRIES and len(known) > 1:
            raise UserError(f"{path} holds several state_dicts ({_some(known)}); save the one that is meant by itself.")
        entry.append(known[0])
        content = inner[known[0]]
    return content, ".".join(entry)


def _content(path: str | os.PathLike[str]) -> Any:
    """What a file holds, read without running anything in it."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise UserError(f"There is no file {path} with weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # timm's own training checkpoints, and others', hold the command line.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
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
            f"{path} was not loaded: it holds a pickled {named[1]}, and salve never unpickles. {_ADVICE}"
        ) from error


def _some(keys: Any) -> str:
    keys = [str(key) for key in keys]
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def reason(error: Exception) -> str:
    """The first sentence of a library's message, on one line."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
