"""Suppression and enhancement curves: their intervals, and what is read from runs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from experiments.claims import load_claims
from experiments.grounds import GROUNDS
from experiments.salve2025.suppression import analyse, curves_figure, edits_of, wilson

CLASSES = ["church", "golf ball", "tench"]
ALPHAS = np.array([0.0, 1, 2, 4])


@pytest.mark.parametrize("right", [0, 1, 37, 50])
def test_the_interval_over_images_is_wilsons(right: int) -> None:
    low, high = wilson(np.array([right / 50]), 50)
    known = stats.binomtest(right, 50).proportion_ci(0.95, method="wilson")
    assert (low[0], high[0]) == (pytest.approx(known.low, abs=1e-12), pytest.approx(known.high))


class OneRun:
    """An SAE's run with curves that are given."""

    def __init__(
        self, seed: int, suppress: dict[str, list[list[float]]], enhance: dict[str, list[list[float]]]
    ) -> None:
        self.seed = seed
        self._curves = {"suppress": suppress, "enhance": enhance}
        rows = {"latent": [3.0 if name in suppress else np.nan for name in CLASSES], "sign": 1.0, "kind": "diffuse"}
        self.selected = pd.DataFrame(rows, index=CLASSES)

    def curves(self, mode: str, target: str) -> tuple[Any, Any]:
        return ALPHAS, np.array(self._curves[mode][target])


def a_study(*runs: OneRun) -> Any:
    val = SimpleNamespace(labels=torch.tensor([0] * 20 + [1] * 20 + [2] * 10))
    return SimpleNamespace(ground=GROUNDS["scenes"], classes=CLASSES, runs=runs, val=val)


FLAT = [[0.9, 0.8, 0.7]] * 4
#: Church goes to 0 between α = 1 and 2, and takes two points of tench with it.
CLEAN = [[0.9, 0.8, 0.7], [0.5, 0.8, 0.7], [0.0, 0.8, 0.68], [0.0, 0.8, 0.5]]
#: Golf ball only goes with everything else.
DIRTY = [[0.9, 0.8, 0.7], [0.5, 0.6, 0.7], [0.1, 0.3, 0.2], [0.0, 0.05, 0.0]]
GAIN = [[0.9, 0.8, 0.7], [0.92, 0.8, 0.7], [0.95, 0.8, 0.66], [1.0, 0.8, 0.1]]


def test_a_row_says_what_an_edit_takes_and_costs() -> None:
    curves = {"church": CLEAN, "golf ball": DIRTY}
    rows = edits_of(a_study(OneRun(0, curves, {"church": GAIN, "golf ball": FLAT}))).set_index("class")
    assert list(rows.index) == ["church", "golf ball"]  # tench has no latent
    church = rows.loc["church"]
    # 5 % lies 9/10 of the way from 0.5 at α = 1 to 0 at α = 2; there tench has lost 9/10 of its 2 points.
    assert church["alpha"] == pytest.approx(1.9)
    assert church["drift"] == pytest.approx(0.018 / 2)
    assert church["separates"]
    assert church["lowest"] == 0
    assert church["enhance_alpha"] == 2
    assert church["enhance_own"] == pytest.approx(0.05)
    assert church["enhance_worst"] == pytest.approx(0.04)
    assert not rows.loc["golf ball", "separates"]
    assert rows.loc["golf ball", "enhance_worst"] == 0


def test_claims_are_measured_from_all_saes() -> None:
    good = OneRun(0, {"church": CLEAN, "golf ball": CLEAN}, {"church": FLAT, "golf ball": GAIN})
    bad = OneRun(1, {"church": FLAT, "golf ball": DIRTY}, {"church": FLAT, "golf ball": FLAT})
    found = analyse([a_study(good, bad)])
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() <= load_claims().keys()
    assert values["suppression.church"] == 0.9  # the worst SAE's lowest
    # Golf ball is never at 5 % in the first SAE's curve, which is church's: enhanced at the grid's last strength there.
    assert values["suppression.golf_ball"] == pytest.approx((0.6 + 0) / 2)
    assert values["suppression.separates"] == pytest.approx((1 + 0) / 2 / 3)
    table = found.tables["curves"]
    # Two modes, two edited classes, two SAEs, four strengths, three classes.
    assert len(table) == 2 * 2 * 2 * 4 * 3
    one = table[(table["mode"] == "enhance") & (table["target"] == "golf ball") & (table["seed"] == 0)]
    assert one[(one["class"] == "tench") & (one["alpha"] == 4)]["accuracy"].item() == 0.1


def test_a_panel_shows_the_class_and_the_others() -> None:
    figure = curves_figure(a_study(OneRun(0, {"church": CLEAN}, {})), "suppress")
    ball, tench, own, others = figure.axes[0].lines
    assert list(ball.get_ydata()) == [0.8] * 4
    assert list(tench.get_ydata()) == [0.7, 0.7, 0.68, 0.5]
    assert list(own.get_ydata()) == [0.9, 0.5, 0.0, 0.0]
    assert list(others.get_ydata()) == pytest.approx([0.75, 0.75, 0.74, 0.65])
