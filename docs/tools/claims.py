"""Take claims that were measured into the docs: python -m docs.tools.claims outputs/paper/claims.csv.

``experiments.reproduce`` and every experiment write such a file of what lies in their folder. Its rows take the place
of those of the same claims and networks in docs/paper/claims.csv; all others stay. The table of the docs is made of
both: run docs.tools.results afterwards.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from docs.tools.results import DOCS
from experiments.claims import Measured, judged, load_claims
from experiments.page import claims_markdown
from experiments.runs import PUBLISHED
from experiments.testbeds import TESTBEDS
from salve.artifacts import read_table, write_table
from salve.types import UserError

CLAIMS = DOCS / "paper" / "claims.csv"
#: The column of what was found in the published sense.
_PUBLISHED = PUBLISHED.replace(" ", "_")


def merged(known: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The rows of both tables, in the order of the claims and the networks; of the same claim and network the new one.

    Raises:
        UserError: a new row is of a small run that only shows that everything works.
    """
    if bool(new["quick"].any()):
        raise UserError("These claims are of --quick runs, which are too small to be published.")
    both = pd.concat([known, new], ignore_index=True).drop_duplicates(["id", "testbed"], keep="last")
    claims, testbeds = list(load_claims()), list(TESTBEDS)
    place = both["id"].map(claims.index) * len(testbeds) + both["testbed"].map(testbeds.index)
    return both.iloc[place.argsort(kind="stable")].reset_index(drop=True)


def as_markdown(table: pd.DataFrame) -> str:
    """The table of the docs, of all claims."""
    rows = table.to_dict("records")
    found = [
        Measured(
            *(str(row["id"]), str(row["testbed"]), float(row["value"]), str(row["measured"])),
            "" if pd.isna(row[_PUBLISHED]) else str(row[_PUBLISHED]),
        )
        for row in rows
    ]
    testbeds = [name for name in TESTBEDS if name in set(table["testbed"])]
    return claims_markdown(judged(load_claims(), found), testbeds)


def main(arguments: Sequence[str]) -> None:
    """Take in the claims of each file."""
    table = read_table(CLAIMS)
    for path in arguments:
        if not Path(path).is_file():
            raise UserError(f"There is no {path}; give the claims.csv that an experiment has written.")
        table = merged(table, read_table(Path(path)))
    write_table(CLAIMS, table)
    CLAIMS.with_suffix(".md").write_text(as_markdown(table), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"docs.tools.claims: {error}")
