"""What classes share: the measures against plain loops, and what becomes of them in tables, figures and words."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from experiments.claims import load_claims
from experiments.salve2025.cifar100 import analyse, classes_figure, drift_figure, sharing_figure
from experiments.salve2025.cifar100 import survey as reading
from experiments.salve2025.cifar100.survey import (
    chosen_by,
    companions,
    falling,
    jaccard,
    kinship,
    loses_most,
    siblings,
    survey_of,
)
from experiments.testbeds import TESTBEDS
from tests.unit.edit_examples import verdict, verdicts


def test_companions_are_those_half_as_strong_on_a_class_s_own_latent() -> None:
    random = np.random.default_rng(0)
    means = random.normal(size=(7, 9))
    means[3] = np.nan  # a class without images, hence without a latent
    latents = random.integers(0, 9, 7)
    latents[3] = -1
    latents[5], means[5, 8] = 8, 0.0  # a latent that is dead for its own class
    latents[5] = 8
    expected = np.zeros((7, 7), dtype=bool)
    for k in range(7):
        for m in range(7):
            if k != m and k not in (3, 5) and m != 3:
                expected[k, m] = abs(means[m, latents[k]]) >= 0.5 * abs(means[k, latents[k]])
    found = companions(means, latents)
    assert found.any()
    np.testing.assert_array_equal(found, expected)


def test_companions_do_not_depend_on_how_many_classes_there_are() -> None:
    """A hundred classes' small means add up: shares fall, but nobody becomes a companion."""
    few = np.full((10, 10), 0.05) + np.eye(10)
    many = np.full((100, 100), 0.05) + np.eye(100)
    assert companions(few, np.arange(10)).sum() == companions(many, np.arange(100)).sum() == 0


def test_how_many_classes_chose_a_latent() -> None:
    assert chosen_by(np.array([4, 7, 4, -1, -1, 4, 2])).tolist() == [3, 1, 3, 0, 0, 3, 1]


def test_overlap_is_that_of_sets() -> None:
    has = np.random.default_rng(1).random((6, 12)) < 0.4
    has[4] = has[5] = False
    sets = [set(np.flatnonzero(row)) for row in has]
    found = jaccard(has)
    for k, one in enumerate(sets):
        for m, other in enumerate(sets):
            if one | other:
                assert found[k, m] == pytest.approx(len(one & other) / len(one | other))
            else:
                assert np.isnan(found[k, m])


#: Editing 0 takes 0.4 of class 1 and all of class 2; editing 1 nothing; editing 2 cannot be had; editing 3 takes the
#: same from 0 and 1.
CHANGE = np.array(
    [[-0.85, -0.4, -0.6, 0.1], [0.1, -0.75, 0.0, 0.0], [np.nan] * 4, [-0.2, -0.2, 0.0, -0.6]],
)
BEFORE = np.array([0.9, 0.8, 0.6, np.nan])


def test_who_falls_and_who_loses_most() -> None:
    falls = np.zeros((4, 4), dtype=bool)
    falls[0, 1] = falls[0, 2] = True  # 0.4 is half of 0.8
    np.testing.assert_array_equal(falling(CHANGE, BEFORE), falls)
    most = np.zeros((4, 4), dtype=bool)
    most[0, 2] = most[3, 0] = most[3, 1] = True
    np.testing.assert_array_equal(loses_most(CHANGE), most)


def test_kinship_counts_siblings_among_those_who_lose_most() -> None:
    kin = siblings(["tree", "tree", "fish", "tree"])
    assert kin.tolist() == [
        [False, True, False, True],
        [True, False, False, True],
        [False] * 4,
        [True, True] + [False] * 2,
    ]
    found = kinship(loses_most(CHANGE), kin)
    # Edit 0: class 2 is no sibling. Edit 3: both that lose most are. Two of three other classes are siblings of each.
    assert found.edits == 2
    assert found.share == pytest.approx((0 + 1) / 2)
    assert found.chance == pytest.approx(2 / 3)
    nothing = kinship(np.zeros((4, 4), dtype=bool), kin)
    assert nothing.edits == 0
    assert np.isnan([nothing.share, nothing.chance]).all()


def test_chance_is_what_random_victims_give() -> None:
    random = np.random.default_rng(2)
    kin = siblings([f"group {k % 5}" for k in range(20)])
    shares = []
    for _ in range(300):
        most = np.zeros((20, 20), dtype=bool)
        for k in range(20):
            most[k, random.choice([m for m in range(20) if m != k])] = True
        shares.append(kinship(most, kin).share)
    assert np.mean(shares) == pytest.approx(kinship(most, kin).chance, abs=4 * np.std(shares) / np.sqrt(300))


# -- from runs to findings

CLASSES = ["maple", "oak", "shark", "trout"]
GROUPS = ("trees", "trees", "fish", "fish")
ALPHAS = np.array([0.0, 1, 2])
FLAT = [[0.8, 0.8, 0.8, 0.8]] * 3


class Groups:
    """Stands for the data."""

    superclasses = GROUPS


def curve(own: int, **others: float) -> NDArray[np.float64]:
    """A class that goes from 80 % to 0 at α = 1, and others that go to given accuracies there."""
    found = np.array(FLAT)
    found[1:, own] = 0
    for name, accuracy in others.items():
        found[1:, CLASSES.index(name)] = accuracy
    return found


class OneRun:
    """An SAE's run with curves and class means that are given; a class that has no curve has no latent."""

    def __init__(self, seed: int, curves: dict[str, NDArray[np.float64]], means: NDArray[np.float64]) -> None:
        self.seed, self._curves, self._means = seed, curves, means.astype(np.float32)
        self.flat_settings = {"discover.threshold": 0.5}
        latents = [float(np.abs(means[k]).argmax()) if name in curves else np.nan for k, name in enumerate(CLASSES)]
        rows = {"latent": latents, "sign": 1.0, "kind": "diffuse", "share": 0.3}
        self.selected = pd.DataFrame(rows, index=CLASSES)
        self.verdicts = verdicts(CLASSES, list(curves), ["oak"], ["oak", "shark"])
        self.verdict = verdict(0, 2)

    def curves(self, split: str, mode: str, target: str) -> tuple[Any, Any]:
        assert split in ("select", "test")
        assert mode == "suppress"
        return ALPHAS, self._curves[target]

    def tensors(self, kind: str, name: str) -> dict[str, Any]:
        assert (kind, name) == ("features", "class_means.safetensors")
        return {"class_means": torch.from_numpy(self._means)}

    def table(self, kind: str, name: str) -> pd.DataFrame:
        names = list(self._curves)
        if name == "dominant.csv":
            size = np.abs(self._means[[CLASSES.index(one) for one in names]])
            top = np.argsort(-size, axis=1)[:, :2]
            return pd.DataFrame({"class": np.repeat(names, 2), "latent": top.flatten()})
        if name == "latents.csv":
            return pd.DataFrame({"kind": ["diffuse", "class-defining", "dead", "diffuse", "cross-class"]})
        assert (kind, name) == ("diagnose", "summary.csv")
        return pd.DataFrame({"class": names, "alpha_flip_median": 0.7, "alpha_flip_infinite": 0.0})


#: Maple and oak have one latent between them, shark is oak's half on latent 1; latent 2 is dead.
MEANS = np.array([[2.0, 0, 0, 0.1, 0.2], [1.5, 0.4, 0, 0, 0.3], [0, 3.0, 0, 1, 0], [0.1, 0, 0, 1, 0.4]])


def a_study(testbed: str, monkeypatch: pytest.MonkeyPatch, *runs: OneRun, groups: bool = True) -> Any:
    monkeypatch.setattr(reading, "Cifar100Data", Groups)
    context = SimpleNamespace(data=Groups() if groups else object())
    test = SimpleNamespace(labels=torch.zeros(40))
    return SimpleNamespace(testbed=TESTBEDS[testbed], classes=CLASSES, runs=runs, context=context, test=test)


def good(seed: int) -> OneRun:
    curves = {
        "maple": curve(0, oak=0.3, trout=0.7),
        "oak": curve(1, maple=0.8),
        "shark": curve(2, maple=0.6, trout=0.6),
        "trout": np.array(FLAT),
    }
    return OneRun(seed, curves, MEANS)


def test_a_row_says_what_an_edit_takes_and_whom_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey_of(a_study("cifar100", monkeypatch, good(0)))
    rows = found.classes.set_index("class")
    maple = rows.loc["maple"]
    share = 0.75 / 0.8  # 5 % lies there between α = 0 and 1
    assert maple["alpha"] == pytest.approx(share)
    assert maple["drift"] == pytest.approx(share * (0.5 + 0 + 0.1) / 3)
    assert (maple["loses_most"], maple["superclass"]) == ("oak", "trees")
    assert maple["worst_loss"] == pytest.approx(share * 0.5)
    assert maple["falls"] == 1
    assert not maple["separates"]
    assert rows["separates"].tolist() == [False, True, False, False]
    assert rows["companions"].tolist() == [1, 1, 0, 1]  # trout's latent is shark's second
    assert rows["chosen_by"].tolist() == [2, 2, 1, 1]
    assert rows["lose_as_much"].tolist() == [1, 0, 2, 0]
    assert not rows.loc["trout", "reached"]
    summary = found.summary.iloc[0]
    assert summary["with_companion"] == 3 / 4
    assert summary["not_alone"] == 2 / 4
    # Of maple's edit the sibling loses most; of shark's one of two. One of three others is a sibling.
    assert summary["sibling_share"] == pytest.approx((1 + 1 / 2) / 2)
    assert summary["sibling_chance"] == pytest.approx(1 / 3)
    # Dominant: {0,4}, {0,1}, {1,3}, {3,4}.
    assert summary["overlap_siblings"] == pytest.approx(1 / 3)
    assert summary["overlap_others"] == pytest.approx((0 + 1 / 3 + 1 / 3 + 0) / 4)
    assert (summary["dictionary_size"], summary["latents dead"]) == (5, 1)
    # Shares of a fourth or more: latent 0 has two classes, 1 one, 3 two, 4 all but shark (0.2, 0.3, 0.4 of 0.9: two).
    assert summary["latents_of_several"] == 3
    assert summary["owners_per_latent"] == pytest.approx((2 + 1 + 2 + 2) / 4)
    pairs = found.pairs.set_index(["class", "other"])
    assert len(pairs) == 12
    assert pairs.loc[("maple", "oak"), "change"] == pytest.approx(-share * 0.5)
    assert pairs.loc[("maple", "oak"), "same_superclass"]
    assert np.isnan(pairs.loc[("trout", "oak"), "change"])


def test_claims_are_about_cifar100_and_sharing_needs_fewer_classes_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = analyse([a_study("cifar100", monkeypatch, good(0), good(1))])
    values = {one.claim: one.value for one in alone.measured}
    assert values.keys() == {name for name in load_claims() if name.startswith("cifar100.")}
    assert values["cifar100.separates"] == 1 / 4
    assert alone.measured[0].text == "1.0 of 4 classes (1 to 1 over 2 SAEs; 95 % over test images: 0.0 to 2.0)"
    assert alone.measured[0].published == "2.0 of 4 classes"
    assert np.isnan(values["cifar100.sharing"])
    assert load_claims()["cifar100.sharing"].verdict(values["cifar100.sharing"]) == "not measured"
    beside = a_study("scenes", monkeypatch, good(0), groups=False)
    beside.classes = CLASSES[:3]
    beside.runs = tuple(three_classes(run) for run in beside.runs)
    both = analyse([a_study("cifar100", monkeypatch, good(0)), beside])
    # Maple and oak of three share; three of four did.
    assert {one.claim: one.value for one in both.measured}["cifar100.sharing"] == pytest.approx(3 / 4 - 2 / 3)
    assert {one.testbed for one in both.measured} == {"cifar100"}
    assert "4 classes share more than 3" in both.paragraph
    assert not analyse([a_study("scenes", monkeypatch, good(0), groups=False)]).measured


def three_classes(run: OneRun) -> Any:
    run._curves = {name: one[:, :3] for name, one in run._curves.items() if name != "trout"}
    run._means = run._means[:3]
    run.selected, run.verdicts = run.selected.iloc[:3], run.verdicts.iloc[:3]
    return run


def test_a_class_without_a_latent_and_without_superclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    means = MEANS.copy()
    means[3] = np.nan
    curves = {name: one for name, one in good(0)._curves.items() if name != "trout"}
    for one in curves.values():
        one[:, 3] = np.nan
    study = a_study("scenes", monkeypatch, OneRun(0, curves, means), groups=False)
    found = analyse([study])
    assert found.tables["classes"]["class"].tolist() == CLASSES[:3]
    assert "superclass in" not in found.paragraph
    assert "same_superclass" not in found.tables["pairs"]
    assert set(found.pictures) == {"sharing", "classes-scenes", "drift-scenes"}


def test_figures_show_the_most_harmful_first_and_superclasses_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey_of(a_study("cifar100", monkeypatch, good(0), good(1)))
    lost = classes_figure(found).axes[0]
    assert [tick.get_text() for tick in lost.get_yticklabels()] == ["maple", "shark", "oak", "trout"]
    assert [text.get_text() for text in lost.texts] == ["oak", "several", "none", "no strength"]
    assert [text.get_fontweight() for text in lost.texts] == ["bold", "normal", "normal", "normal"]
    drift = drift_figure(found).axes[0]
    assert [tick.get_text() for tick in drift.get_yticklabels()] == ["fish", "trees"]
    shown: Any = drift.images[0].get_array()
    # Fish first: row 0 is shark's edit, columns shark, trout, maple, oak; row 1 is trout's, which cannot be had.
    assert shown[0].tolist() == [None, *(pytest.approx(-100 * 0.9375 * loss) for loss in (0.2, 0.2, 0.0))]
    assert np.ma.getmaskarray(shown)[1].all()
    panels: Any = sharing_figure([found]).axes
    assert [line.get_ydata()[0] for line in panels[0].lines] == [3 / 4]
    assert panels[3].patches[0].get_height() == pytest.approx(3 / 4)
