# SPDX-License-Identifier: MIT
"""Pack arrays into text for the page, as small as what must be exact allows."""

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Root mean square of the error of a logit that rounding the activations may make: so far below the limit of 1e-4 that
#: none of millions of logits exceeds it. Where there is room, the first is taken.
FINE, COARSE = 5e-8, 1.6e-5
#: Bytes of a rounded activation.
BYTES = 3
_TO_TEXT = bytes.maketrans(b"<&", b",.")


@dataclass(frozen=True, eq=False)
class Rounded:
    """Activations in fixed point, ``a ≈ low + step · q``, each channel with a step of its own.

    Attributes:
        planes: ``[3, M, N]`` uint8, the bytes of ``q`` from the highest to the lowest, so that zlib finds the first
            nearly empty. low, step: ``[M]``.
    """

    planes: NDArray[np.uint8]
    low: NDArray[np.float64]
    step: NDArray[np.float64]

    def values(self) -> NDArray[np.float64]:
        """The activations ``[N, M]`` that the page computes with."""
        high, middle, last = self.planes.astype(np.int64)
        return (self.low[:, None] + self.step[:, None] * (high * 65536 + middle * 256 + last)).T


def rounded(activations: NDArray[np.floating], weight: NDArray[np.floating], error: float) -> Rounded:
    """Round activations as coarsely as the logits allow.

    A channel's step is the larger, the less its weights count. For a given error of the logits, this takes the fewest
    bits.

    Args:
        activations: ``[N, M]``. weight: ``[C, M]`` of the head. error: root mean square that each logit's may have.
    """
    wide, head = activations.astype(np.float64), weight.astype(np.float64)
    low = wide.min(axis=0)
    extent = np.maximum(wide.max(axis=0) - low, np.finfo(np.float32).tiny)
    counts = np.linalg.norm(head, axis=0)
    unit = 1 / np.maximum(counts, counts.max(initial=0) * 1e-6 + np.finfo(np.float32).tiny)
    # Rounding to a step of s errs by s / √12 in the root mean square.
    worst = np.sqrt((head**2 * unit**2 / 12).sum(axis=1)).max(initial=0)
    steps = unit * error / worst if worst > 0 else extent
    step = np.clip(steps, extent / (256**BYTES - 1), extent)
    levels = np.rint((wide - low) / step).astype(np.int64).T  # [M, N]
    return Rounded(np.stack([levels >> 16, levels >> 8, levels]).astype(np.uint8), low, step)


def packed(array: NDArray[Any]) -> str:
    """An array's bytes, little-endian, compressed by zlib, as text (:func:`text_of`)."""
    whole = np.ascontiguousarray(array)
    return text_of(zlib.compress(whole.astype(whole.dtype.newbyteorder("<")).tobytes(), 6))


def text_of(data: bytes) -> str:
    """Bytes in base 85, which takes 6 % less than base 64; of letters that mean nothing in HTML or JSON.

    It is the alphabet of :func:`base64.b85encode`, but for a comma and a full stop in place of ``<`` and ``&``.
    """
    return base64.b85encode(data).translate(_TO_TEXT).decode()


def json_for_script(value: Any) -> str:
    """JSON that is safe inside of a ``script`` element, whatever its texts say; NaN and infinity become null."""
    return json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
