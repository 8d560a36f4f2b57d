"""The package timm, without Weights & Biases: timm imports that wherever it is installed, for a logger of its own.

It takes a second, and at once makes folders for temporary files, which stay behind where a process is killed. Only a
run that logs to W&B needs them. Everything in salve takes timm from here.
"""

import sys
from importlib import import_module
from typing import Any


def _alone(name: str, parts: tuple[str, ...], without: str) -> Any:
    """A package and parts of it, while another that is not loaded yet cannot be imported: who can, does without it."""
    hidden = without not in sys.modules
    if hidden:
        sys.modules[without] = None  # type: ignore[assignment]
    try:
        package = import_module(name)
        for part in parts:
            import_module(f"{name}.{part}")
        return package
    finally:
        if hidden:
            del sys.modules[without]


timm = _alone("timm", ("data", "layers", "utils"), without="wandb")
