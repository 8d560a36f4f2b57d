# SPDX-License-Identifier: MIT
"""Tables that say which images there are: CSV files, and CelebA's text files."""

import csv
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from salve.data.naming import listing
from salve.types import UserError
from salve.untrusted import check_file, reason, shown

#: What the columns of CelebA's text files are called where the files do not say so.
IMAGE, PARTITION = "image_id", "partition"

Table = dict[str, list[str]]


def table_files(root: Path, names: str | Sequence[str]) -> list[Path]:
    """The files of the setting ``data.table``, which start from the folder of the images.

    Raises:
        UserError: the folder or a file is not there.
    """
    files = [root / name for name in ([names] if isinstance(names, str) else names)]
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder; choose the one that holds the images and the table.")
    if not files:
        raise UserError("data.table is empty; name the CSV file that says which images there are.")
    for file in files:
        check_file(file, f"data.table={file} is no file; it starts from data.root.")
    return files


def read_table(key: str, path: Path, wanted: Collection[str] | None = None) -> Table:
    """Read a table's columns as texts.

    Args:
        key: the setting that names the file, for messages. path: a ``.csv`` file with names in its first row; or a
            ``.txt`` file as CelebA has them, whose columns are divided by blanks.
        wanted: columns to keep, those of them that there are; None keeps all.

    Raises:
        UserError: the file cannot be read, has no rows, a name twice, or a row of another length.
    """
    with _opened(key, path) as (names, rows):
        kept = [i for i, name in enumerate(names) if wanted is None or name in wanted]
        table: Table = {names[i]: [] for i in kept}
        count = 0
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(f"{key}={path} has {len(row)} values in row {number}, but {len(names)} columns.")
            count += 1
            for i in kept:
                table[names[i]].append(row[i])
    if not count:
        raise UserError(f"{key}={path} has no rows below the names of its columns.")
    return table


def joined(key: str, paths: Sequence[Path], wanted: Collection[str]) -> Table:
    """Read tables of the same images, and put their columns side by side.

    Args:
        key: the setting that names the files, for messages. paths: the files; all have the first column of the first.
        wanted: columns to keep.

    Raises:
        UserError: as :func:`read_table`; or there is no such column, or a file lacks an image of the first.
    """
    headers = []
    for path in paths:
        with _opened(key, path) as (names, _):
            headers.append(names)
    if absent := sorted(set(wanted).difference(*headers)):
        raise UserError(
            f"{key}={', '.join(map(str, paths))} has no column {listing(absent)}; its columns are "
            f"{listing(list(dict.fromkeys(chain(*headers))), 50)}."
        )
    by = headers[0][0]
    table = read_table(key, paths[0], {by, *wanted})
    for path, names in zip(paths[1:], headers[1:], strict=True):
        if by not in names:
            raise UserError(f"{key} names {path}, which has no column {by!r} as {paths[0].name} has.")
        other = read_table(key, path, {by, *wanted})
        row_of = {name: row for row, name in enumerate(other[by])}
        if missing := [name for name in table[by] if name not in row_of]:
            raise UserError(
                f"{path} has no row for {len(missing)} of the {len(table[by])} images of {paths[0].name}, such as "
                f"{listing(missing[:1])}."
            )
        rows = [row_of[name] for name in table[by]]
        table |= {name: [column[row] for row in rows] for name, column in other.items() if name not in table}
    return table


def ranked(values: Iterable[str]) -> tuple[str, ...]:
    """The different values: numbers by size, texts in alphabetical order."""
    different = set(values)
    try:
        return tuple(sorted(different, key=lambda value: (float(value), value)))
    except ValueError:
        return tuple(sorted(different))


@contextmanager
def _opened(key: str, path: Path) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """The names of a table's columns, and its rows."""
    where = f"{key}={shown(str(path), 300)}"
    check_file(path, f"{where} is no file.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _blanks(file) if path.suffix == ".txt" else csv.reader(file, strict=True)
            names = [name.strip() for name in next(rows, [])]
            if len(set(names)) < len(names):
                raise UserError(f"{where} has two columns of the same name: {listing(names, 10)}.")
            yield names, rows
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not a text in UTF-8.") from error
    except (csv.Error, OSError) as error:
        raise UserError(f"{where} cannot be read as a table ({reason(error)}).") from error


def _blanks(file: TextIO) -> Iterator[list[str]]:
    """The rows of a text file of CelebA's, the names of its columns first."""
    rows = (line.split() for line in file)
    first, second = next(rows, []), next(rows, [])
    if len(first) == 1 and first[0].isdigit():  # the number of images
        first, second = second, next(rows, [])
    if len(first) + 1 == len(second):
        first = [IMAGE, *first]
    elif len(first) == 2 and first[1].isdigit():
        yield [IMAGE, PARTITION]
    yield first
    yield second
    yield from rows
