# SPDX-License-Identifier: MIT
"""A table of a comparison is of one network."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest

from salve.results import Sweep
from salve.sweep import compared
from salve.sweep.compare import statement

VARYING = ("sae.seed", "seed", "data.root", "compare.methods")


def sweep(monkeypatch: pytest.MonkeyPatch, *runs: Mapping[str, Any]) -> Sweep:
    """A sweep whose runs found a selectivity of each method; other facts are all alike."""

    def rows(run: Any) -> Iterator[pd.DataFrame]:
        own = {"backbone": "net", "site": "last", "seed": run.flat_settings["sae.seed"], "class": "ant"}
        same = {"reached": True, "after": 0.0, "drift": 0.0, "worst_loss": 0.0, "kl_others": 0.0, "permanent": True}
        facts = {**own, **same, "parameters": 1, "images": 1, "labels": 1, "reason": "", "fit_seconds": run.seconds}
        yield pd.DataFrame([{**facts, "method": name, "selectivity": found} for name, found in run.found.items()])

    monkeypatch.setattr(compared, "edits_of_run", rows)
    finished = [
        SimpleNamespace(
            flat_settings={
                **{"sae.seed": run["seed"], "seed": run.get("of", 0)},
                **{"data.root": run["root"], "compare.methods": [*run["found"]]},
            },
            **{"found": run["found"], "seconds": k},
        )
        for k, run in enumerate(runs)
    ]
    return cast(Sweep, SimpleNamespace(finished=finished, folder="sweep"))


def test_runs_on_other_images_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = sweep(
        monkeypatch,
        *({"seed": seed, "root": "mine", "found": {"gate": 0.5 + seed / 10, "bias": 0.8}} for seed in (0, 1)),
        {"seed": 0, "root": "yours", "found": {"gate": 0.1}},
    )
    table = compared.table_of(compared.edits_of(here, VARYING)).set_index(["backbone", "method"])
    assert table["selectivity"].to_dict() == {
        ("net, root=mine", "gate"): pytest.approx(0.55),
        ("net, root=mine", "bias"): pytest.approx(0.8),
        ("net, root=yours", "gate"): pytest.approx(0.1),
    }
    said = statement(table.reset_index())
    assert "At last of net, root=mine, over 2 SAEs: bias is the most selective (80.0 points)" in said
    assert "At last of net, root=yours, over 1 SAE: gate is the most selective (10.0 points)." in said


def test_more_methods_of_the_same_network_are_one_table_in_which_an_edit_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = sweep(
        monkeypatch,
        {"seed": 0, "root": "mine", "found": {"gate": 0.5}},
        {"seed": 0, "root": "mine", "found": {"gate": 0.5, "bias": 0.8}},
    )
    edits = compared.edits_of(here, ("compare.methods",))
    assert edits[["backbone", "method"]].to_numpy().tolist() == [["net", "gate"], ["net", "bias"]]
    assert "At last, over 1 SAE: bias" in statement(compared.table_of(edits))


def test_networks_of_other_seeds_count_each_even_where_they_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [0.2, 0.2, 0.8]
    here = sweep(
        monkeypatch, *({"seed": 0, "of": k, "root": "a", "found": {"gate": one}} for k, one in enumerate(found))
    )
    (row,) = compared.table_of(compared.edits_of(here, VARYING[:2])).itertuples()
    assert row.selectivity == pytest.approx(0.4)
