# SPDX-License-Identifier: MIT
"""The report of a run: ``write_report`` makes the page, ``summary_table`` the terminal's summary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salve.report.page import write_report
    from salve.report.terminal import answers, repair_ending, summary_table

_MODULES = {"answers": "terminal", "repair_ending": "terminal", "summary_table": "terminal", "write_report": "page"}

__all__ = ["answers", "repair_ending", "summary_table", "write_report"]


def __getattr__(name: str) -> Any:
    # matplotlib and pandas take seconds to import, and `salve-sweep --help` needs neither.
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
