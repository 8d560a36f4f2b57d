# SPDX-License-Identifier: MIT
"""Read NumPy numbers in torch files, such as ``{"best": np.float64(0.9)}``, without calling NumPy's own functions.

Torch refuses such files. Here stand-ins for the functions named in the pickle make plain numbers of a few bytes;
NumPy's own ``dtype`` and ``scalar`` could make values of any size.
"""

from typing import Any

import numpy as np

_KINDS, _MOST_BYTES = "biuf", 16


class _DType:
    """Stands in for ``numpy.dtype``: its letter and size, such as ``f8``, and the order of its bytes."""

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _number(kind: _DType, content: bytes) -> float | int | bool:
    """Stands in for ``numpy.core.multiarray.scalar``.

    Raises:
        ValueError: it is no number of at most 16 bytes, or has another length than it claims; the message is part of
            a sentence.
    """
    if not isinstance(kind, _DType) or not isinstance(content, bytes) or not isinstance(kind.name, str):
        raise ValueError("it holds a malformed NumPy number")
    if kind.name[:1] not in _KINDS or not kind.name[1:].isdigit() or kind.order not in ("<", ">", "|", "="):
        raise ValueError(f"it holds a NumPy value that is no number ({kind.name[:20]!r})")
    if int(kind.name[1:]) > _MOST_BYTES or len(content) != int(kind.name[1:]):
        raise ValueError("it holds a NumPy number of the wrong size")
    return np.frombuffer(content, np.dtype(kind.order + kind.name))[0].item()


def _named(stand_in: Any, module: str, name: str) -> Any:
    """Give a stand-in the name that files use; torch looks it up by that."""
    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name
    return stand_in


#: For ``torch.serialization.safe_globals``, under the names of NumPy 1 and NumPy 2.
NUMPY_SCALARS = (
    _named(type("dtype", (_DType,), {}), "numpy", "dtype"),
    _named(lambda kind, content: _number(kind, content), "numpy.core.multiarray", "scalar"),
    _named(lambda kind, content: _number(kind, content), "numpy._core.multiarray", "scalar"),
)
