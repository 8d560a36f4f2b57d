"""Numpy's numbers in torch files, such as ``{"best": np.float64(0.9)}``, read without calling numpy's own functions.

Torch refuses them by itself. What their pickles name is answered by the stand-ins here, which make plain numbers of a
few bytes: numpy's ``dtype`` and ``scalar`` would make values of any size.
"""

from typing import Any

import numpy as np

_KINDS, _MOST_BYTES = "biuf", 16


class _DType:
    """Stands for ``numpy.dtype``: letter and size, such as ``f8``, and with its state the order of the bytes."""

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _number(kind: _DType, content: bytes) -> float | int | bool:
    """Stands for ``numpy.core.multiarray.scalar``.

    Raises:
        ValueError: it is no number of at most 16 bytes, or not as long as it says.
    """
    if not isinstance(kind, _DType) or not isinstance(content, bytes) or not isinstance(kind.name, str):
        raise ValueError("a number of numpy's that is none")
    if kind.name[:1] not in _KINDS or not kind.name[1:].isdigit() or kind.order not in ("<", ">", "|", "="):
        raise ValueError(f"a value of numpy's that is no number ({kind.name[:20]!r})")
    if int(kind.name[1:]) > _MOST_BYTES or len(content) != int(kind.name[1:]):
        raise ValueError("a number of numpy's whose size is wrong")
    return np.frombuffer(content, np.dtype(kind.order + kind.name))[0].item()


def _named(stand_in: Any, module: str, name: str) -> Any:
    """The stand-in under the name that a file calls it by, which is how torch finds it."""
    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name
    return stand_in


#: For ``torch.serialization.safe_globals``: as numpy 1 and as numpy 2 name them.
NUMPY_SCALARS = (
    _named(type("dtype", (_DType,), {}), "numpy", "dtype"),
    _named(lambda kind, content: _number(kind, content), "numpy.core.multiarray", "scalar"),
    _named(lambda kind, content: _number(kind, content), "numpy._core.multiarray", "scalar"),
)
