# SPDX-License-Identifier: MIT
"""Sweeps: plan and make their runs (``salve -m``), and sum them up (``salve-sweep``)."""

from typing import TYPE_CHECKING

from salve.lazy import lazy

if TYPE_CHECKING:
    from salve.sweep.summary import SweepSummary, print_summary, summarise_sweep

_MODULES = {"SweepSummary": "summary", "print_summary": "summary", "summarise_sweep": "summary"}

__all__ = ["SweepSummary", "print_summary", "summarise_sweep"]

__getattr__, __dir__ = lazy(__name__, _MODULES)
