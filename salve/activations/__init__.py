"""A site's activations: captured once, kept on disk in shards, and handed to a training in batches.

What is imported from here is loaded when it is first asked for: reading activations needs no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salve.activations.capture import captured
    from salve.activations.rows import ActivationsData, Block, WholeData
    from salve.activations.schedule import Schedule
    from salve.activations.shards import AnyRows, Captured, Shards, load_captured

_MODULES = {
    "ActivationsData": "rows",
    "AnyRows": "shards",
    "Block": "rows",
    "Captured": "shards",
    "Schedule": "schedule",
    "Shards": "shards",
    "WholeData": "rows",
    "captured": "capture",
    "load_captured": "shards",
}

__all__ = [
    "ActivationsData",
    "AnyRows",
    "Block",
    "Captured",
    "Schedule",
    "Shards",
    "WholeData",
    "captured",
    "load_captured",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
