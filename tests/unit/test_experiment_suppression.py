"""Suppression and enhancement curves: what is read from runs, chosen on select and reported on test."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.claims import load_claims
from experiments.salve2025.suppression import analyse, curves_figure, edits_of
from experiments.testbeds import TESTBEDS
from tests.unit.edit_examples import verdict, verdicts

CLASSES = ["church", "golf ball", "tench"]
ALPHAS = np.array([0.0, 1, 2, 4])


Curves = dict[str, list[list[float]]]


class OneRun:
    """An SAE's run with test curves that are given; on select they are the same unless others are given, too."""

    def __init__(
        self,
        seed: int,
        suppress: Curves,
        enhance: Curves,
        select: Curves | None = None,
        separates: tuple[str, ...] = (),
    ) -> None:
        self.seed = seed
        self._curves = {("test", "suppress"): suppress, ("test", "enhance"): enhance}
        self._curves["select", "suppress"] = suppress | (select or {})
        rows = {"latent": [3.0 if name in suppress else np.nan for name in CLASSES], "sign": 1.0, "kind": "diffuse"}
        self.selected = pd.DataFrame(rows, index=CLASSES)
        self.verdicts = verdicts(CLASSES, list(suppress), separates, [*separates, "golf ball"])
        self.verdict = verdict(0, 1 + seed)

    def curves(self, split: str, mode: str, target: str) -> tuple[Any, Any]:
        return ALPHAS, np.array(self._curves[split, mode][target])


def a_study(*runs: OneRun) -> Any:
    test = SimpleNamespace(labels=torch.tensor([0] * 20 + [1] * 20 + [2] * 10))
    return SimpleNamespace(testbed=TESTBEDS["scenes"], classes=CLASSES, runs=runs, test=test)


FLAT = [[0.9, 0.8, 0.7]] * 4
#: Church goes to 0 between α = 1 and 2, and takes two points of tench with it.
CLEAN = [[0.9, 0.8, 0.7], [0.5, 0.8, 0.7], [0.0, 0.8, 0.68], [0.0, 0.8, 0.5]]
#: Golf ball only goes with everything else.
DIRTY = [[0.9, 0.8, 0.7], [0.5, 0.6, 0.7], [0.1, 0.3, 0.2], [0.0, 0.05, 0.0]]
GAIN = [[0.9, 0.8, 0.7], [0.92, 0.8, 0.7], [0.95, 0.8, 0.66], [1.0, 0.8, 0.1]]


def test_a_row_says_what_an_edit_takes_and_costs() -> None:
    curves = {"church": CLEAN, "golf ball": DIRTY}
    up = {"church": GAIN, "golf ball": FLAT}
    rows = edits_of(a_study(OneRun(0, curves, up, separates=("church",)))).set_index("class")
    assert list(rows.index) == ["church", "golf ball"]  # tench has no latent
    church = rows.loc["church"]
    # 5 % lies 9/10 of the way from 0.5 at α = 1 to 0 at α = 2; there tench has lost 9/10 of its 2 points.
    assert church["alpha"] == pytest.approx(1.9)
    assert church["after"] == pytest.approx(0.05)
    assert church["drift"] == pytest.approx(0.018 / 2)
    assert church["separates"]
    assert (church["kept_alpha"], church["kept_after"]) == (2, 0.01)
    assert church["lowest"] == 0
    assert church["enhance_alpha"] == 2
    assert church["enhance_own"] == pytest.approx(0.05)
    assert church["enhance_worst"] == pytest.approx(0.04)
    assert not rows.loc["golf ball", "separates"]
    assert rows.loc["golf ball", "separates_published"]
    assert rows.loc["golf ball", "enhance_worst"] == 0


#: Select has church at 5 % at α = 1 already, and lowest at α = 2; test, if it were asked, at 1.9 and 4.
EARLY = [[0.9, 0.8, 0.7], [0.05, 0.8, 0.7], [0.0, 0.8, 0.7], [0.02, 0.8, 0.7]]
LATE = [[0.9, 0.8, 0.7], [0.5, 0.7, 0.7], [0.04, 0.8, 0.68], [0.0, 0.8, 0.5]]


def test_select_chooses_every_strength_and_test_says_what_it_does() -> None:
    curves, other = {"church": LATE}, {"church": EARLY}
    [row] = edits_of(a_study(OneRun(0, curves, {"church": GAIN}, other))).to_dict("records")
    assert (row["alpha"], row["after"]) == (1, 0.5)
    assert row["drop"] == pytest.approx(0.4)
    assert row["drift"] == pytest.approx(0.1 / 2)
    assert row["worst_loss"] == pytest.approx(0.1)
    assert (row["lowest_alpha"], row["lowest"]) == (2, 0.04)
    # Enhanced by the same strength: church gains two points, nobody loses.
    assert (row["enhance_alpha"], row["enhance_worst"]) == (1, 0)
    # The other way round test would have chosen: nothing is left of what looked matched.
    [turned] = edits_of(a_study(OneRun(0, other, {"church": GAIN}, curves))).to_dict("records")
    assert turned["alpha"] == pytest.approx(1 + 0.45 / 0.46)
    assert turned["lowest"] == 0.02


def test_claims_are_measured_from_all_saes() -> None:
    good = OneRun(0, {"church": CLEAN, "golf ball": CLEAN}, {"church": FLAT, "golf ball": GAIN}, separates=("church",))
    bad = OneRun(1, {"church": FLAT, "golf ball": DIRTY}, {"church": FLAT, "golf ball": FLAT})
    found = analyse([a_study(good, bad)])
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() <= load_claims().keys()
    assert values["suppression.church"] == 0.9  # the worst SAE's lowest
    # Golf ball is never at 5 % in the first SAE's curve, which is church's: enhanced at the grid's last strength there.
    assert values["suppression.golf_ball"] == pytest.approx((0.6 + 0) / 2)
    separates = found.measured[0]
    assert separates.value == pytest.approx((1 + 0) / 2 / 3)
    assert separates.text == "0.5 of 3 classes (0 to 1 over 2 SAEs; 95 % over test images: 0.0 to 1.5)"
    assert separates.published == "1.5 of 3 classes"  # golf ball under both
    assert "50 test images" in found.pictures["suppress-scenes"].caption
    table = found.tables["curves"]
    # Two modes, two edited classes, two SAEs, four strengths, three classes.
    assert len(table) == 2 * 2 * 2 * 4 * 3
    one = table[(table["mode"] == "enhance") & (table["target"] == "golf ball") & (table["seed"] == 0)]
    assert one[(one["class"] == "tench") & (one["alpha"] == 4)]["accuracy"].item() == 0.1


def test_a_panel_shows_the_class_and_the_others() -> None:
    figure = curves_figure(a_study(OneRun(0, {"church": CLEAN}, {}, {"church": EARLY})), "suppress")
    lines: Any = figure.axes[0].lines
    ball, tench, own, others = lines
    assert list(ball.get_ydata()) == [0.8] * 4
    assert list(tench.get_ydata()) == [0.7, 0.7, 0.68, 0.5]
    assert list(own.get_ydata()) == [0.9, 0.5, 0.0, 0.0]
    assert list(others.get_ydata()) == pytest.approx([0.75, 0.75, 0.74, 0.65])
