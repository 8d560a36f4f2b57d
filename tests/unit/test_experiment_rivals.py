"""The study of rivals, on edits that are made up."""

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from experiments.beyond.rivals import EXPERIMENT, findings
from experiments.claims import load_claims
from experiments.testbeds import TESTBEDS, Setup

TOOK = {
    "gate": 0.8,
    "random_gate": 0.1,
    "random_latent": 0.2,
    "random_decoder": 0.7,
    "rank_one": 0.85,
    "head_row": 0.75,
}
STUDY: Any = SimpleNamespace(
    testbed=TESTBEDS["resnet18"], test=SimpleNamespace(labels=[0] * 8), runs=[1], classes=["a"]
)


def edits(sites: dict[str, float]) -> pd.DataFrame:
    """Edits of one class, whose gate takes as much more or less at a site as is said."""
    rows = []
    for site, more in sites.items():
        for seed in (0, 1, 2):
            for method, took in TOOK.items():
                selectivity = took + (more + 0.01 * (seed - 1) if method == "gate" else 0)
                reached = selectivity > 0.05
                row: dict[str, Any] = {"backbone": "net", "site": site, "seed": seed, "method": method, "class": "a"}
                row |= {"selectivity": selectivity if reached else 0.0, "reached": reached, "after": 0.0, "drift": 0.01}
                row |= {"worst_loss": 0.0, "kl_others": 0.1, "permanent": True, "parameters": 3, "reason": math.nan}
                rows.append(row | {"images": 0 if method == "head_row" else 90, "labels": 0})
    return pd.DataFrame(rows)


def test_claims_are_measured_at_the_last_site_and_inside() -> None:
    found = findings(STUDY, edits({"fc": 0.0, "inner": -0.8, "other": 0.1}), ("fc", "last"))
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() == {name for name in load_claims() if name.startswith("rivals.")}
    assert values["rivals.controls"] == pytest.approx(0.8 - 0.7)  # random_decoder comes closest
    assert values["rivals.anywhere"] == pytest.approx(0.9 - 0.85)  # at the other inner site
    assert values["rivals.inside"] == pytest.approx(0.5)
    texts = {one.claim: one.text for one in found.measured}
    # Student's 97.5 % quantile for two degrees of freedom: 4.303 · 0.01 / √3.
    assert texts["rivals.controls"] == "+10.0 ± 2.5 points, of random_decoder"
    assert "rank_one is the most selective (85.0 points), 5.0 ± 2.5 points more than gate" in found.paragraph
    assert "read 90 images and 0 labels. At the last site at least as selective are: rank_one." in found.paragraph
    assert list(found.pictures) == ["rivals-resnet18"]


def test_only_what_is_there_is_measured() -> None:
    alone = edits({"last": 0.0})
    assert len(findings(STUDY, alone[alone["method"] == "gate"], ("fc", "last")).measured) == 0
    assert [one.claim for one in findings(STUDY, alone, ("last",)).measured] == ["rivals.controls", "rivals.anywhere"]


def test_inner_sites_belong_to_a_network_and_not_to_a_quick_pass(tmp_path: Any) -> None:
    setup = Setup(tmp_path, {}, {})
    first, inner = EXPERIMENT.sweeps_for(setup, TESTBEDS["scenes"])
    assert (first, inner[0].partition("=")[0]) == ((), "layer")
    assert EXPERIMENT.sweeps_for(setup, TESTBEDS["cifar100"]) == [()]
    quick = Setup(tmp_path, {}, {}, quick=True)
    assert [EXPERIMENT.quick] == EXPERIMENT.sweeps_for(quick, TESTBEDS["scenes"])
