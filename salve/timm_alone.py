# SPDX-License-Identifier: MIT
"""Import timm without Weights & Biases; everything in salve imports timm from here.

If W&B is installed, timm imports it for a logger of its own. That takes a second and makes temporary folders, which
stay behind if the process is killed. Only a run that logs to W&B needs it.
"""

import sys
from importlib import import_module
from typing import Any


def _alone(name: str, parts: tuple[str, ...], without: str) -> Any:
    """Import a package and parts of it, while another package cannot be imported unless it is already."""
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
