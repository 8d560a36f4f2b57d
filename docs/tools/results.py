"""Write the tables of what was measured into the docs: python -m docs.tools.results.

The numbers lie in docs/paper/data as CSV files, as experiments write them; tables.yaml beside them says what each table
shows. On a page a table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``. A new result is a CSV copied
there, an entry in tables.yaml where there is none, and these two marks.
"""

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

import pandas as pd
import yaml

from salve.artifacts import read_table
from salve.report.text import MISSING, Formatter, is_missing
from salve.types import UserError

DOCS = Path(__file__).resolve().parents[1]
DATA = DOCS / "paper" / "data"
SPECS = DATA / "tables.yaml"

#: The indentation, the name and the lines of a table; a table may stand in a list.
_TABLE = re.compile(r"^( *)<!-- table: (\S+) -->\n(.*?)^ *<!-- /table -->$", re.DOTALL | re.MULTILINE)
_CLAIMS = re.compile(r"(<!-- claims -->\n).*?(<!-- /claims -->)", re.DOTALL)
#: A part of a cell that is left out where one of its numbers is missing or 0.
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """What a table shows of one or several CSV files, whose rows are put one below the other.

    A cell is a template, ``{drift:.1p}``, filled in with the one record that the cell is of. What stands in ``[ ]`` is
    left out where a number in it is missing or 0. A cell whose number is missing is –.

    Attributes:
        csv: names of files in docs/paper/data, without their ending.
        columns: heading and template of each, and perhaps which records it is of, as ``{column: value}``; with
            ``lines``, heading and records. Headings are templates, too.
        rows: the column of the CSV whose every value is a row. only: these values, in this order.
        lines: in place of rows: label, template and perhaps records of each.
        where: which records the table is of. sort: the column by which rows stand, the largest first.
        names: what stands in the first cell of a row, where that is not the template of the first column.
    """

    csv: list[str]
    columns: list[list[Any]]
    rows: str = ""
    lines: list[list[Any]] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    only: list[Any] = field(default_factory=list)
    sort: str = ""
    names: dict[Any, str] = field(default_factory=dict)


def tables_in(path: Path = SPECS) -> dict[str, Table]:
    """The tables by name."""
    return {name: Table(**one) for name, one in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


def markdown(table: Table, data: Path = DATA) -> str:
    """A table in Markdown.

    Raises:
        UserError: a file, a column or a row that the table names is not there, or a cell could be of several records.
    """
    records = among(records_of(table, data), table.where)
    if table.lines:
        heads = ["", *(head(column[0], records) for column in table.columns)]
        rows = [
            [label, *(cell(template, among(records, *which, *column[1:])) for column in table.columns)]
            for label, template, *which in table.lines
        ]
    else:
        heads = [head(column[0], records) for column in table.columns]
        rows = [*rows_of(table, records)]
    return "\n".join([line(heads), f"|{'---|' * len(heads)}", *map(line, rows)]) + "\n"


def line(cells: Sequence[str]) -> str:
    """A row in Markdown."""
    return " ".join(f"| {one}".strip() for one in cells) + " |"


def records_of(table: Table, data: Path) -> list[Record]:
    """The rows of the table's files, in its order."""
    for name in table.csv:
        if not (data / f"{name}.csv").is_file():
            raise UserError(f"There is no {name}.csv in {data}, which tables.yaml names.")
    frame = pd.concat([read_table(data / f"{name}.csv") for name in table.csv], ignore_index=True)
    if unknown := {table.rows, table.sort} - {"", *frame}:
        raise UserError(f"There is no column {', '.join(sorted(unknown))}; there are {', '.join(frame)}.")
    if table.sort:
        frame = frame.sort_values(table.sort, ascending=False, kind="stable")
    return frame.to_dict("records")


def among(records: Sequence[Record], *wanted: Mapping[str, Any]) -> list[Record]:
    """The records whose columns have these values; an empty value is a missing one.

    Raises:
        UserError: no record has one of these values, so that it must be misspelt.
    """
    pairs = [pair for one in wanted for pair in one.items()]
    for name, value in pairs:
        known = {as_text(record.get(name)) for record in records}
        if as_text(value) not in known:
            raise UserError(f"No record has {name}: {value}; there are {', '.join(sorted(known))}.")
    return [record for record in records if all(as_text(record.get(name)) == as_text(value) for name, value in pairs)]


def as_text(value: Any) -> str:
    """A value by which records are told apart; whole numbers are the same with and without a point."""
    return "" if is_missing(value) else str(value).removesuffix(".0")


def rows_of(table: Table, records: Sequence[Record]) -> Iterator[list[str]]:
    """The cells of each row."""
    values = table.only or list(dict.fromkeys(record[table.rows] for record in records))
    if unknown := {as_text(name) for name in table.names} - {as_text(value) for value in values}:
        raise UserError(f"There is no row {', '.join(sorted(unknown))} to give a name to.")
    for value in values:
        own = among(records, {table.rows: value})
        first, *others = (cell(template, matching(own, records, *which)) for _, template, *which in table.columns)
        yield [table.names.get(value, first), *others]


def matching(own: Sequence[Record], records: Sequence[Record], *which: Mapping[str, Any]) -> list[Record]:
    """The records of a row that a column is of, of which there may be none; no column is of none in any row."""
    kept = [id(record) for record in among(records, *which)]
    return [record for record in own if id(record) in kept]


def cell(template: str, records: Collection[Record]) -> str:
    """The template filled in with the record that has its numbers; – where none has.

    Raises:
        UserError: several records have them, and differ; or none has such a column.
    """
    texts = dict.fromkeys(text for record in records if (text := filled(template, record)) is not None)
    if len(texts) > 1:
        raise UserError(f"{template} is not one cell but {len(texts)}: {'; '.join(texts)}.")
    return next(iter(texts), MISSING)


def head(template: str, records: Collection[Record]) -> str:
    """A heading, which may be a template, too."""
    return cell(template, records) if template else ""


def filled(template: str, record: Record) -> str | None:
    """The template filled in with a record; None where a number is missing."""

    def optional(part: re.Match[str]) -> str:
        kept = all(not is_missing(value) and value != 0 for value in values_in(part[1], record))
        return Formatter().format(part[1], **record) if kept else ""

    while _OPTIONAL.search(template):
        template = _OPTIONAL.sub(optional, template)
    if any(is_missing(value) for value in values_in(template, record)):
        return None
    return Formatter().format(template, **record).replace("|", "\\|").replace("\u00a0", " ")


def values_in(template: str, record: Record) -> list[Any]:
    """The values of the template's fields, but for those within a format."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    if unknown := [name for name in names if name not in record]:
        raise UserError(f"There is no column {unknown[0]} for {template}; there are {', '.join(record)}.")
    return [record[name] for name in names]


def written(page: str, tables: Mapping[str, Table], data: Path = DATA) -> str:
    """A page with its tables made anew; that of the claims is the one which experiments.reproduce wrote.

    Raises:
        UserError: a mark names no table, or see :func:`markdown`.
    """

    def made(found: re.Match[str]) -> str:
        if found[2] not in tables:
            raise UserError(f"A page has a mark for the table {found[2]}, which tables.yaml does not have.")
        try:
            marked = f"<!-- table: {found[2]} -->\n{markdown(tables[found[2]], data)}<!-- /table -->"
        except UserError as error:
            raise UserError(f"Table {found[2]}: {error}") from None
        return indent(marked, found[1])

    claims = (DOCS / "paper" / "claims.md").read_text(encoding="utf-8")
    return _CLAIMS.sub(lambda found: found[1] + claims + found[2], _TABLE.sub(made, page))


def shown_on(page: str) -> list[str]:
    """The names of the tables that a page has marks for."""
    return [name for _, name, _ in _TABLE.findall(page)]


def main() -> None:
    """Write the tables of every page."""
    tables = tables_in()
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := written(before, tables)) != before:
            page.write_text(after, encoding="utf-8")
            print(page.relative_to(DOCS.parent))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"docs.tools.results: {error}")
