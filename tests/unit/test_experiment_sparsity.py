"""Sparsity and dictionary size: what is read from runs, and what the claims are measured by."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments.claims import load_claims
from experiments.salve2025.sparsity import DEFAULT, analyse, falling, grid_figure, runs_of, settings_of
from experiments.testbeds import TESTBEDS
from salve.run.explain import conf_dir
from tests.unit.edit_examples import verdicts

CLASSES = ["church", "golf ball", "tench"]
ALPHAS = np.array([0.0, 1, 2, 4])
FLAT = [[0.9, 0.8, 0.7]] * 4
#: Its class goes to 0 between α = 1 and 2, by then tench has lost a point.
CHURCH = [[0.9, 0.8, 0.7], [0.5, 0.8, 0.7], [0.0, 0.8, 0.69], [0.0, 0.8, 0.69]]
GOLF = [[0.9, 0.8, 0.7], [0.9, 0.4, 0.7], [0.9, 0.0, 0.7], [0.9, 0.0, 0.7]]


Curves = dict[str, list[list[float]]]


class OneRun:
    """An SAE's run with curves and metrics that are given; select has the curves of test unless it is given others."""

    def __init__(
        self, curves: Curves, strict: list[str], setting: tuple[float, int] = DEFAULT, seed: int = 0,
        select: Curves | None = None, **metrics: Any,
    ) -> None:  # fmt: skip
        self.seed = seed
        self.flat_settings = {"sae.sparsity": setting[0], "sae.dictionary_size": setting[1], "sae.epochs": 25}
        self.metrics = {"fve": 0.7, "l0": 9.0, "test_accuracy": 0.8, "select_fve": 0.7, "downstream_accuracy": None}
        self.metrics |= {"select_fve": metrics.get("fve", 0.7), **metrics}
        self._curves = {"test": curves, "select": curves | (select or {})}
        rows = {
            "latent": [3.0 if name in curves else np.nan for name in CLASSES],
            "share": [0.6 if name in curves else np.nan for name in CLASSES],
        }
        self.selected = pd.DataFrame(rows, index=CLASSES)
        self.verdicts = verdicts(CLASSES, list(curves), strict)

    def curves(self, split: str, mode: str, target: str) -> tuple[Any, Any]:
        assert mode == "suppress"
        return ALPHAS, np.array(self._curves[split][target])


def a_study(*runs: OneRun) -> Any:
    test = SimpleNamespace(labels=torch.tensor([0] * 20 + [1] * 20 + [2] * 10))
    return SimpleNamespace(testbed=TESTBEDS["scenes"], classes=CLASSES, runs=runs, test=test)


def test_a_row_averages_the_edits_of_an_sae() -> None:
    [row] = runs_of(a_study(OneRun({"church": CHURCH, "golf ball": FLAT}, ["church"]))).to_dict("records")
    # Of church 5 % lie 9/10 of the way from α = 1 to 2; golf ball is never reached, and tench has no latent.
    assert row["alpha"] == pytest.approx(1.9)
    assert row["drift"] == pytest.approx(0.009 / 2)
    assert row["selectivity"] == pytest.approx((0.85 - 0.009 / 2) / 3)
    assert (row["reached"], row["separating"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert row["share"] == pytest.approx((0.6 + 0.6 + 0) / 3)
    assert (row["fve"], row["sparsity"], row["size"]) == (0.7, 5.0, 256)
    assert math.isnan(row["downstream_accuracy"])


def test_a_class_that_is_lost_without_an_edit_does_not_count() -> None:
    lost = [[0.9, 0.8, 0.02]] * 4
    curves = {"church": [[0.9, 0.8, 0.02], [0.0, 0.8, 0.02], *lost[2:]], "tench": lost, "golf ball": FLAT}
    [row] = runs_of(a_study(OneRun(curves, ["church"]))).to_dict("records")
    assert row["separating"] == pytest.approx(1 / 2)


def test_settings_are_means_over_seeds_with_students_interval() -> None:
    runs = [OneRun({"church": CHURCH}, ["church"], seed=seed, fve=fve) for seed, fve in enumerate((0.6, 0.7, 0.8))]
    [row] = (
        settings_of(runs_of(a_study(*runs, OneRun({"church": CHURCH}, ["church"], (1.0, 64), fve=0.9))))
        .tail(1)
        .to_dict("records")
    )
    assert (row["sparsity"], row["size"], row["seeds"]) == (5.0, 256, 3)
    # Student's 97.5 % quantile for two degrees of freedom, from tables.
    assert (row["fve"], row["fve_half"]) == (pytest.approx(0.7), pytest.approx(4.302653 * 0.1 / math.sqrt(3)))


def test_steps_are_counted_along_lambda_at_one_size_and_seed() -> None:
    def row(sparsity: float, size: int, l0: float, fve: float) -> dict[str, float]:
        return {"sparsity": sparsity, "size": size, "seed": 0, "l0": l0, "fve": fve}

    # Not in order. At 64 both fall in the first step and FVE alone in the second; at 128 L0 alone.
    table = [row(2, 64, 5, 0.8), row(1, 64, 9, 0.9), row(5, 64, 5, 0.7), row(1, 128, 8, 0.5), row(5, 128, 7, 0.6)]
    assert falling(pd.DataFrame(table)) == pytest.approx(1 / 3)
    assert math.isnan(falling(pd.DataFrame(table[:1])))


def test_claims_are_measured() -> None:
    best = OneRun({"church": CHURCH, "golf ball": GOLF}, ["church", "golf ball"], (1.0, 64), l0=20.0, fve=0.9)
    good = OneRun({"church": CHURCH}, ["church"], l0=9.0, fve=0.7)
    found = analyse([a_study(best, good)])
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() <= load_claims().keys()
    assert math.isnan(values.get("sparsity.trade", math.nan))  # of no size are there two λ
    assert values["sparsity.plateau"] == 0
    # Golf ball falls by 75 points and takes nothing along; of three classes.
    assert values["sparsity.default"] == pytest.approx(0.75 / 3)
    every = OneRun({"church": CHURCH, "golf ball": GOLF, "tench": FLAT}, CLASSES, (1.0, 64))
    values = {one.claim: one.value for one in analyse([a_study(every, good)]).measured}
    assert values["sparsity.plateau"] == 0.5


def test_the_best_setting_is_chosen_on_select_and_compared_on_test() -> None:
    # On select the first SAE takes golf ball, too; on test no strength that is chosen there takes anything.
    lucky = OneRun({"church": CHURCH, "golf ball": FLAT}, ["church"], (1.0, 64), select={"golf ball": GOLF})
    good = OneRun({"church": CHURCH}, ["church"])
    runs = runs_of(a_study(lucky, good)).set_index("size")
    church = 0.85 - 0.009 / 2
    assert runs["select_selectivity"].tolist() == pytest.approx([(church + 0.75) / 3, church / 3])
    assert runs["selectivity"].tolist() == pytest.approx([church / 3, church / 3])
    found = analyse([a_study(lucky, good)])
    [default] = [one for one in found.measured if one.claim == "sparsity.default"]
    assert default.value == pytest.approx(0)
    assert default.text == "0.0 points below the best of 2 on select images (λ 1, d 64)"
    # Chosen, though test has half of church left: then the default is the better of the two, and that is said.
    half = [[0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.4, 0.8, 0.7], [0.4, 0.8, 0.7]]
    promised = {"church": CHURCH, "golf ball": GOLF}
    worse = OneRun({"church": half, "golf ball": FLAT}, [], (1.0, 64), select=promised)
    [default] = [one for one in analyse([a_study(worse, good)]).measured if one.claim == "sparsity.default"]
    assert default.value == pytest.approx((0.9 * 0.5 - church) / 3)
    assert default.text == f"{100 * (church - 0.45) / 3:.1f} points above the best of 2 on select images (λ 1, d 64)"


def test_without_the_default_it_is_not_judged() -> None:
    found = analyse([a_study(OneRun({"church": CHURCH}, ["church"], (1.0, 64)))])
    assert [one.claim for one in found.measured] == ["sparsity.plateau"]


def test_the_default_is_what_the_project_has() -> None:
    conf = yaml.safe_load((conf_dir() / "sae" / "linear_l1.yaml").read_text(encoding="utf-8"))
    assert (conf["sparsity"], conf["dictionary_size"]) == DEFAULT


def test_a_panel_has_a_line_per_size() -> None:
    runs = [
        OneRun({"church": CHURCH}, ["church"], (sparsity, size), fve=1 / (sparsity * size))
        for sparsity in (1.0, 5.0)
        for size in (64, 256)
    ]
    study = a_study(*runs)
    panel = grid_figure(study, settings_of(runs_of(study))).axes[0]
    drawn: Any = panel.lines
    lines = [line.get_ydata() for line in drawn if len(line.get_xdata()) == 2]
    assert [list(line) for line in lines] == [pytest.approx([1 / 64, 1 / 320]), pytest.approx([1 / 256, 1 / 1280])]
