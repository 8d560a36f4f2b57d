"""The report of a run: ``write_report`` makes the page, ``summary_table`` the terminal's summary."""

from salve.report.page import write_report
from salve.report.terminal import summary_table

__all__ = ["summary_table", "write_report"]
