"""Tables that a spreadsheet opens without running anything: names of people's own may begin like formulas."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes a second
    import pandas as pd

#: What a spreadsheet takes a cell for a formula by, and runs when the table is opened; full width, too.
_FORMULA = tuple("=+-@\t\n＝＋－＠")
#: Put before such a text: spreadsheets then show it as text.
_MARK = "'"


def for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A table of which no name and no cell is a formula: texts that begin like one get an apostrophe before them.

    Numbers stay as they are, also those that are texts; :func:`from_spreadsheets` takes the apostrophe away. Every end
    of a line in a text is a line feed: a carriage return could end the row.
    """
    return _with_texts(frame, _marked)


def from_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The table that :func:`for_spreadsheets` was given."""
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
    """The same table with all its texts changed, names of columns among them."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    texts = {name: column for name, column in frame.items() if column.dtype.kind == "O"}
    # The usual table stays as it is, with the types of its columns.
    other = {
        name: column.map(one) for name, column in texts.items() if any(value is not one(value) for value in column)
    }
    return frame.assign(**other).rename(columns=one)
