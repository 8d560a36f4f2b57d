"""SALVE: understand an image classifier with a sparse autoencoder, then change it for good.

For notebooks, functions on tensors: :func:`salve.metrics.fraction_of_variance_explained`,
:func:`salve.features.class_means`, :func:`salve.saliency.grad_fam`, :func:`salve.editing.gate`,
:func:`salve.editing.edited_logits`, :func:`salve.diagnosis.critical_strength`.
"""

from importlib import import_module
from typing import Any

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
    "sae",
    "saliency",
    "stages",
)


def __getattr__(name: str) -> Any:
    # `import salve` stays quick; a room is entered when it is first named.
    if name in _ROOMS:
        return import_module(f"salve.{name}")
    raise AttributeError(f"module 'salve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
