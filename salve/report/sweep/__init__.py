"""A sweep in one table and its standard pictures; reads nothing but the sweep's folder."""

from salve.report.sweep.summary import SweepSummary, print_summary, summarise_sweep

__all__ = ["SweepSummary", "print_summary", "summarise_sweep"]
