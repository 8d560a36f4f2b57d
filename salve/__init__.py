# SPDX-License-Identifier: MIT
"""SALVE: understand an image classifier with a sparse autoencoder, then change it for good.

What runs and sweeps left is read with :func:`salve.open_run` and :func:`salve.open_sweep`.

For notebooks, functions on tensors: :func:`salve.metrics.fraction_of_variance_explained`,
:func:`salve.features.class_means`, :func:`salve.saliency.grad_fam`, :func:`salve.editing.gate`,
:func:`salve.editing.edited_logits`, :func:`salve.diagnosis.critical_strength`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salve.results import open_run as open_run
    from salve.results import open_sweep as open_sweep

__version__ = "0.1.0"

_ROOMS = (
    "activations",
    "backbones",
    "data",
    "diagnosis",
    "editing",
    "features",
    "metrics",
    "report",
    "results",
    "sae",
    "saliency",
    "stages",
)
#: Functions that are used most, from their rooms.
_FUNCTIONS = ("open_run", "open_sweep")


def __getattr__(name: str) -> Any:
    # `import salve` stays quick; a room is entered when it is first named.
    if name in _ROOMS:
        return import_module(f"salve.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module("salve.results"), name)
    raise AttributeError(f"module 'salve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS, *_FUNCTIONS])
