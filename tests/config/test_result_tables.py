"""Tables of what was measured are those that docs/tools/results.py makes of the CSV files in docs/paper/data."""

import re
from pathlib import Path
from textwrap import indent
from typing import Any

import pandas as pd
import pytest

from docs.tools import claims, results
from docs.tools.results import Table, cell, markdown, shown_on, written
from salve.artifacts import read_table
from salve.report.text import Formatter
from salve.types import UserError

#: Pages all of whose tables hold what was measured; on the others those that are mostly numbers do.
PAGES = ("results.md", "sae_variants.md", "benchmarks.md", "explorer.md", "paper/three_splits.md")
#: Pages that other commands make.
MADE = ("backbones.md", "settings.md", "paper/claims.md", "notebooks/")
#: First rows of tables that hold no measurement: what a benchmark should reach, its limit, its parts, and
#: bytes that are computed.
NOT_MEASURED = (
    *("| goal |", "| limit |", "| what `salve` does |", "| `card` |"),
    *("| labels | 8 for each image", "| 196 positions of each image |"),
)
#: What stands between marks, of docs.tools.results and of the commands that sites.md and scale.md name.
MARKED = re.compile(
    r"<!-- (table: \S+|claims|families|scale:.*?) -->\n.*?<!-- (/table|/claims|/families|end) -->", re.DOTALL
)
#: A number as tables write it: 1,440; 24 %; **−1.9 ± 0.3**; 2.0 (7.3 ×); 0.821 / 0.819; 2, 5, 1; 2,000 of 10,000.
NUMBER = re.compile(r"[*+−~]*\d[\d,.]*( ?[%×A-Za-z]{1,5})?( ?[-–−±/(, ]*\d.*)?\**")
TABLES = results.tables_in()
TEXTS = {
    page: path.read_text(encoding="utf-8")
    for path in sorted(results.DOCS.rglob("*.md"))
    if not (page := path.relative_to(results.DOCS).as_posix()).startswith(MADE)
}


def outside(page: str) -> list[tuple[str, str]]:
    """Headings and first rows of the tables that stand outside of marks, but for those that hold no measurement."""
    found = re.findall(r"^ *(\|.*\|)\n *\|[ :|-]+\|\n *(.*)$", MARKED.sub("", page), re.MULTILINE)
    return [(heading, first) for heading, first in found if not first.startswith(NOT_MEASURED)]


def mostly_numbers(row: str) -> bool:
    """Whether at least half of a row's cells, but for the first and empty ones, are numbers."""
    cells = [cell for one in row.strip("|").split("|")[1:] if (cell := one.strip())]
    return bool(cells) and 2 * sum(NUMBER.fullmatch(cell) is not None for cell in cells) >= len(cells)


def unused(tables: dict[str, Table], pages: list[str], data: Path) -> set[str]:
    """The CSV files that no table on a page is of, and the tables that no page shows."""
    shown = {name for page in pages for name in shown_on(page)}
    used = {file for name in shown for file in tables[name].csv}
    return ({path.stem for path in data.glob("*.csv")} - used) | (set(tables) - shown)


@pytest.mark.parametrize("page", TEXTS)
def test_the_tables_are_those_that_the_command_makes(page: str) -> None:
    assert written(TEXTS[page], TABLES) == TEXTS[page], "run python -m docs.tools.results"
    assert len(shown_on(TEXTS[page])) == len(re.findall(r"<!-- /?table\b", TEXTS[page])) / 2


@pytest.mark.parametrize("page", TEXTS)
def test_no_measured_table_is_written_by_hand(page: str) -> None:
    by_hand = [heading for heading, first in outside(TEXTS[page]) if page in PAGES or mostly_numbers(first)]
    assert by_hand == [], "put its numbers into docs/paper/data (CONTRIBUTING.md, *Docs*)"


def test_every_file_is_in_a_table_and_every_table_on_a_page() -> None:
    pages = [path.read_text(encoding="utf-8") for path in results.DOCS.rglob("*.md")]
    assert unused(TABLES, pages, results.DATA) == set()


# -- each of these can fail


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"site": "first", "method": "gate", "value": 0.25, "half": 0.01, "share": 0.9},
        {"site": "first", "method": "rank_one", "value": -0.5, "half": 0.0, "share": 1.0},
        {"site": "last", "method": "gate", "value": None, "half": None, "share": 0.5},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "edits.csv", index=False)
    return tmp_path


COLUMNS: list[list[Any]] = [
    ["site", "`{site}`"],
    ["by gate", "{value:+±{half}}", {"method": "gate"}],
    ["rival", "{value:.1p}", {"method": "rank_one"}],
]
SITES = Table(["edits"], COLUMNS, rows="site", names={"last": "**last**"})
SHOWN = "| site | by gate | rival |\n|---|---|---|\n| `first` | +25.0 ± 1.0 | −50.0 |\n| **last** | – | – |\n"
PAGE = f"Text.\n\n<!-- table: sites -->\n{SHOWN}<!-- /table -->\n"


def test_a_table_has_a_row_for_each_value_and_a_dash_for_what_is_missing(data: Path) -> None:
    assert markdown(SITES, data) == SHOWN
    assert written(PAGE, {"sites": SITES}, data) == PAGE


def test_a_table_may_stand_in_a_list(data: Path) -> None:
    page = indent(PAGE, "  ")
    assert written(page.replace("25.0", "26.0"), {"sites": SITES}, data) == page


def test_a_number_that_was_edited_is_noticed(data: Path) -> None:
    assert written(PAGE.replace("25.0", "26.0"), {"sites": SITES}, data) == PAGE


def test_a_table_outside_of_marks_is_noticed() -> None:
    made = f"<!-- claims -->\n{SHOWN}<!-- /claims -->\n<!-- scale: --cores 16 -->\nRates.\n\n{SHOWN}<!-- end -->\n"
    assert outside(f"{PAGE}\n{made}") == []
    listed = f"{PAGE}\n- in a list:\n\n  | a | b |\n  | --- | :-: |\n  | 1 | 2 |\n"
    assert outside(listed) == [("| a | b |", "| 1 | 2 |")]
    assert outside(f"| | |\n|---|---|\n| 1 | 2 |\n\n{PAGE}") == [("| | |", "| 1 | 2 |")]
    assert outside("| | |\n|---|---|\n| goal | twice the best peer |\n") == []


@pytest.mark.parametrize("name", ["explorer-idle", "sae-steps", "sae-each_variant", "sites-pool", "benchmark-ensemble"])
def test_what_was_measured_is_told_by_its_numbers(name: str) -> None:
    assert all(mostly_numbers(row) for row in markdown(TABLES[name]).splitlines()[2:])


@pytest.mark.parametrize(
    "row",
    [
        "| `fve` • | 1 − Σ(a − â)² / Σ(a − ā)² | ≤ 1 | 0: the mean activation | `sae.json` |",
        "| `a` | `[N, M]` | activations at the site, one row per image |",
        "| accumulate | yes | no |",
        "| a run raises | 1 of them is listed, and the others go on |",
        "| `data.root` | | |",
    ],
)
def test_what_explains_is_no_measurement(row: str) -> None:
    assert not mostly_numbers(row)


def test_a_file_that_no_table_is_of_is_noticed(data: Path) -> None:
    assert unused({"sites": SITES}, [PAGE], data) == set()
    assert unused({"sites": SITES, "more": SITES}, [PAGE], data) == {"more"}
    (data / "idle.csv").write_text("a\n1\n")
    assert unused({"sites": SITES}, [PAGE], data) == {"idle"}


def test_a_mark_that_names_no_table_or_file_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match=r"the table sites, which tables\.yaml does not have"):
        written(PAGE, {}, data)
    (data / "edits.csv").unlink()
    with pytest.raises(UserError, match=r"Table sites: There is no edits\.csv in"):
        written(PAGE, {"sites": SITES}, data)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table(["edits"], [["a", "{nothing}"]], rows="site"), "no column nothing .* site, method, value, half, share"),
        (Table(["edits"], [["a", "{value}", {"method": "gates"}]], rows="site"), "No record has method: gates"),
        (Table(["edits"], [["a", "{value}"]], rows="site"), "not one cell but 2: 0.25; -0.5"),
        (Table(["edits"], COLUMNS, rows="place"), "no column place; there are site"),
        (Table(["edits"], COLUMNS, rows="site", sort="size"), "no column size; there are site"),
        (Table(["edits"], COLUMNS, rows="site", only=["middle"]), "No record has site: middle; there are first, last"),
        (Table(["edits"], COLUMNS, rows="site", names={"middle": "m"}), "no row middle to give a name to"),
    ],
)
def test_what_is_misspelt_is_refused(data: Path, table: Table, message: str) -> None:
    with pytest.raises(UserError, match=message):
        markdown(table, data)


def test_rows_by_size_and_lines_of_one_record(data: Path) -> None:
    by_size = Table(["edits"], [["{share:of 10} at the least", "{method}"]], "method", where={"site": "first"})
    with pytest.raises(UserError, match="not one cell"):
        markdown(by_size, data)
    sort = Table(
        ["edits"], [["method", "{method}"], ["", "{share:.0%}"]], "method", where={"site": "first"}, sort="share"
    )
    assert markdown(sort, data) == "| method | |\n|---|---|\n| rank_one | 100 % |\n| gate | 90 % |\n"
    lines = [["gate", "{share:of 10}", {"method": "gate"}], ["rival", "{value:.2f}[ ± {half}]", {"method": "rank_one"}]]
    table = Table(["edits"], [["first {site}", {"site": "first"}]], lines=lines, where={"site": "first"})
    assert markdown(table, data) == "| | first first |\n|---|---|\n| gate | 9 of 10 |\n| rival | −0.50 |\n"


def test_parts_in_brackets_are_left_out_where_a_number_is_missing_or_zero() -> None:
    template = "{a:.1%}[ ({b:+.1p}[ of {c}])]"
    assert cell(template, [{"a": 0.5, "b": 0.1, "c": 3}]) == "50.0 % (+10.0 of 3)"
    assert cell(template, [{"a": 0.5, "b": 0.1, "c": None}]) == "50.0 % (+10.0)"
    assert cell(template, [{"a": 0.5, "b": 0.0, "c": None}]) == "50.0 %"
    assert cell(template, [{"a": float("nan"), "b": 0.1, "c": 3}]) == "–"
    assert cell("{text}", [{"text": "|cosine|"}]) == r"\|cosine\|"


@pytest.mark.parametrize(
    ("template", "value", "text"),
    [
        ("{0:.1p}", -0.0004, "0.0"),
        ("{0:+.1p}", 0.0123, "+1.2"),
        ("{0:+.3f}", -0.0246, "−0.025"),
        ("{0:±0.004}", 0.788, "78.8 ± 0.4"),
        ("{0:±1e-18}", 0.788, "78.8"),
        ("{0:±nan}", 0.788, "78.8"),
        ("{0:±}", 0.788, "78.8"),
        ("{0:~±0.08}", 0.648, "65 ± 8"),
        ("{0:~±0.012}", 0.831, "83.1 ± 1.2"),
        ("{0:of 10}", 0.96, "9.6 of 10"),
        ("{0:yes}", True, "yes"),
        ("{0:.2n}", float("inf"), "∞"),
        ("{0:,}", 24825, "24,825"),
    ],
)
def test_formats(template: str, value: object, text: str) -> None:
    assert Formatter().format(template, value).replace("\u00a0", " ") == text


def test_the_table_of_claims_is_made_of_their_file_and_a_new_measurement_takes_the_place_of_the_old_one() -> None:
    known = read_table(claims.CLAIMS)
    assert claims.as_markdown(known) == claims.CLAIMS.with_suffix(".md").read_text(encoding="utf-8")
    assert claims.merged(known, known).equals(known)
    new = known.iloc[[5]].assign(measured="3 of 10, anew")
    both = claims.merged(known, new)
    assert len(both) == len(known)
    assert both.iloc[5]["measured"] == "3 of 10, anew"
    assert both.drop(5).equals(known.drop(5))
    assert "3 of 10, anew" in claims.as_markdown(both)
    with pytest.raises(UserError, match="--quick"):
        claims.merged(known, new.assign(quick=True))
