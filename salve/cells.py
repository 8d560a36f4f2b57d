# SPDX-License-Identifier: MIT
"""Tables that are safe to open in a spreadsheet, although names in them may begin like formulas."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the import takes a second
    import pandas as pd

#: First letters by which spreadsheets recognise formulas, also in full width; formulas run when a table is opened.
_FORMULA = tuple("=+-@\t\n＝＋－＠")
#: Put before such a text, so that spreadsheets show it as text.
_MARK = "'"


def for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Put an apostrophe before every text, in cells and column names, that begins like a formula.

    Numbers stay as they are, also as texts. Line ends in texts become line feeds, because a carriage return could end
    the row.
    """
    return _with_texts(frame, _marked)


def from_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Remove the apostrophes that :func:`for_spreadsheets` added."""
    return _with_texts(frame, _unmarked)


def _marked(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.startswith((*_FORMULA, _MARK)):
        return text
    try:
        float(text)
    except ValueError:
        return _MARK + text
    return text


def _unmarked(text: str) -> str:
    return text[1:] if text.startswith(_MARK) and text[1:].startswith((*_FORMULA, _MARK)) else text


def _with_texts(frame: "pd.DataFrame", change: Callable[[str], str]) -> "pd.DataFrame":
    """Apply a function to all texts of a table, column names included."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    texts = {name: column for name, column in frame.items() if column.dtype.kind == "O"}
    # Columns without a change are not touched, so that they keep their types.
    other = {
        name: column.map(one)
        for name, column in texts.items()
        if any(value is not one(value) for value in column.tolist())
    }
    return frame.assign(**other).rename(columns=one)
