"""Plan sweeps, launch their runs, and summarise what came of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salve.sweep.summary import SweepSummary, print_summary, summarise_sweep

_MODULES = {"SweepSummary": "summary", "print_summary": "summary", "summarise_sweep": "summary"}

__all__ = ["SweepSummary", "print_summary", "summarise_sweep"]


def __getattr__(name: str) -> Any:
    # matplotlib and pandas take seconds to import, and `salve-sweep --help` needs neither.
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
