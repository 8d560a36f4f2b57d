"""What docs/results.md says of the paper is what was measured, and the verdicts follow from the expected directions."""

from pathlib import Path

import pandas as pd
import pytest

from experiments.catalogue import EXPERIMENTS
from experiments.claims import load_claims
from experiments.compare import WORDS
from experiments.page import SIGNS

ROOT = Path(__file__).parents[2]
MEASURED = pd.read_csv(ROOT / "docs" / "paper" / "claims.csv", keep_default_na=False, na_values=[""])
CLAIMS = load_claims()
#: Claims that no published run has measured yet, since they need CIFAR-100.
NOT_YET = {"cifar100.separates", "cifar100.sharing"}


def test_the_results_show_the_table_that_was_written() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = (ROOT / "docs" / "paper" / "claims.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 2 + len(CLAIMS)
    assert table in results


def test_the_results_say_what_was_not_measured() -> None:
    results = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    assert set(CLAIMS) - set(MEASURED["id"]) == NOT_YET
    assert "CIFAR-100 was *not*" in results


@pytest.mark.parametrize("page", ["results.md", "sae_variants.md"])
def test_the_pages_name_the_limits_of_an_edit_that_separates(page: str) -> None:
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    wanted = ["to {level} accuracy or less", "less than {mean} in the mean", "loses more than {loss}."]
    if page == "sae_variants.md":
        wanted = ["fallen to {level} of its select images"]
    for words in wanted:
        assert words.format(**WORDS) in text


@pytest.mark.parametrize("row", MEASURED.to_dict("records"), ids=lambda row: f"{row['id']}-{row['testbed']}")
def test_a_verdict_follows_from_the_expected_direction(row: dict[str, object]) -> None:
    claim = CLAIMS[str(row["id"])]
    assert row["claim"] == claim.claim
    assert claim.verdict(float(str(row["value"]))) == row["verdict"]
    assert not row["quick"]


def test_every_claim_that_needs_no_download_was_measured() -> None:
    needs = {name for name, experiment in EXPERIMENTS.items() if experiment.testbeds == ("cifar100",)}
    wanted = {name for name, claim in CLAIMS.items() if claim.experiment not in needs} - NOT_YET
    assert wanted <= set(MEASURED["id"])
    assert set(MEASURED["verdict"]) <= set(SIGNS)
