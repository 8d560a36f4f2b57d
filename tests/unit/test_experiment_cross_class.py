"""Cross-class latents: which latents count, who falls, is redundant or rises, and what the figures show of it."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import interpolate, optimize, stats

from experiments.claims import judged, load_claims
from experiments.compare import Reader, accuracy_at, margins, strength_to
from experiments.salve2025 import cross_class
from experiments.salve2025.cross_class import figures
from experiments.salve2025.cross_class.figures import images_figure, strips_of
from experiments.salve2025.cross_class.roles import (
    ALPHAS,
    DRAGGED,
    FALLS,
    NONE,
    REDUNDANT,
    RISES,
    STAYS,
    change_by_class,
    counting,
    gated_logits,
    role,
    weights,
)
from experiments.salve2025.cross_class.tables import cases_of, class_table, sae_table, telling, tower_table
from experiments.testbeds import TESTBEDS
from salve.backbones.tail import LinearTail

# -- pure functions


def test_a_latent_is_weighed_against_its_classs_average() -> None:
    means = torch.tensor([[3.0, -1.0, 0.0], [0.0, 0.0, 0.0], [torch.nan] * 3])
    assert weights(means).tolist() == [[9 / 4, 3 / 4, 0], [0, 0, 0], [0, 0, 0]]


def test_only_what_counts_is_shared() -> None:
    # Latent 0: shared and large. 1: shared and small. 2, 3: one class's own. 4: shared, but counts for one class only.
    means = torch.tensor([[1.0, 0.02, 2.0, 0, 0.3], [-1.0, 0.02, 0, 0, 0.3], [0.01, 0, 0, 0.3, 0]])
    kinds, depends = counting(means, 0.5)
    # Classes' averages: 0.664, 0.264, 0.062.
    assert kinds == ["cross-class", "idle", "class-defining", "class-defining", "diffuse"]
    assert depends.int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 0]]


def test_margins_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 4, generator=generator), torch.randint(0, 4, (20,), generator=generator)
    expected = [
        float(row[own]) - max(float(row[m]) for m in range(4) if m != own)
        for row, own in zip(logits, labels.tolist(), strict=True)
    ]
    assert margins(logits, labels).tolist() == pytest.approx(expected)
    assert torch.equal(margins(logits, labels) > 0, logits.argmax(dim=1) == labels)


def test_a_gate_on_the_activations_is_one_on_the_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    activations, gate = torch.randn(7, 5, generator=generator), torch.rand(5, generator=generator)
    expected = torch.stack([weight @ (gate * one) + bias for one in activations])
    torch.testing.assert_close(gated_logits(LinearTail(weight, bias), activations, gate), expected)


def test_a_curve_crosses_where_its_interpolation_does() -> None:
    alphas, curve = np.array([0.0, 1, 3, 4]), np.array([0.9, 0.8, 0.3, 0.35])
    at = optimize.brentq(lambda alpha: interpolate.interp1d(alphas, curve)(alpha) - 0.45, 0, 3)
    assert strength_to(alphas, curve, 0.45) == pytest.approx(at)
    assert strength_to(alphas, curve, 0.2) == math.inf
    assert math.isnan(strength_to(alphas, curve, 0.9))
    assert math.isnan(strength_to(alphas, np.full(4, np.nan), 0.5))


def test_the_interval_of_a_change_is_that_of_a_paired_t_test() -> None:
    generator = torch.Generator().manual_seed(2)
    before, after = torch.randn(30, generator=generator), torch.randn(30, generator=generator) + 1
    labels = torch.tensor([0] * 18 + [2] * 11 + [3])
    found = change_by_class(before, after, labels, 4)
    for k in (0, 2):
        mine = (labels == k).numpy()
        test = stats.ttest_rel(after.numpy()[mine], before.numpy()[mine])
        low, high = test.confidence_interval(0.95)
        assert found.mean[k] - found.half[k] == pytest.approx(low, rel=1e-5)
        assert found.mean[k] + found.half[k] == pytest.approx(high, rel=1e-5)
    assert np.isnan([found.mean[1], found.half[1], found.half[3]]).all()
    assert found.mean[3] == pytest.approx(float(after[-1] - before[-1]))


@pytest.mark.parametrize(
    ("depends", "change", "half", "usual", "backed", "expected"),
    [
        (True, -0.1, 0.02, 0.0, True, FALLS),
        (False, -0.1, 0.02, 0.0, False, DRAGGED),
        (True, -0.09, 0.02, 0.0, True, REDUNDANT),
        (True, -0.09, 0.02, 0.0, False, STAYS),
        (False, -0.09, 0.02, 0.0, False, NONE),
        (False, 0.05, 0.02, 0.0, False, RISES),
        (True, 0.05, 0.02, -0.2, True, RISES),
        (False, 0.05, 0.02, 0.04, False, NONE),  # no more than is usual
        (False, 0.05, 0.06, -0.2, False, NONE),  # perhaps no rise
        (False, 0.02, 0.001, -0.2, False, NONE),  # too little
        (True, math.nan, 0.0, 0.0, True, NONE),
    ],
)
def test_roles(depends: bool, change: float, half: float, usual: float, backed: bool, expected: str) -> None:
    assert role(depends, change, half, usual, backed) == expected


# -- a study with the paper's Tower in it

CLASSES = ["gas pump", "church", "chain saw", "tench"]
EACH = 60
#: Channel 0 is shared by gas pump and church; 1, 2 and 3 are church's, chain saw's and tench's own.
WEIGHT = torch.tensor([[3.0, -3, 0, 0], [1.2, 2.2, 0, 0], [0, 0, 1.7, 0], [0, 0, 0, 3.0]])
#: What no evidence is left for is taken for a tench.
BIAS = torch.tensor([0.0, 0, 0, 1.5])
#: Latents are the channels, with contributions so small that strengths in the middle of the grid close them.
SCALE = 0.05
#: The mean activation of each class. Half the chain saws also show what gas pumps show, and are taken for those.
MEANS = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0.4, 0, 1, 0], [0, 0, 0, 1]])


def split(seed: int, empty: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(EACH)
    activations = MEANS[labels] * (1 + 0.05 * torch.randn(4 * EACH, 4, generator=generator))
    saws = (labels == 2).nonzero()[:, 0]
    activations[saws, 0] *= torch.where(torch.arange(EACH) % 2 == 0, 2.0, 0.0)
    keep = labels != (-1 if empty is None else empty)
    return SimpleNamespace(activations=activations[keep], labels=labels[keep])


def study_of(seeds: tuple[int, ...] = (0,), names: list[str] = CLASSES, **more: Any) -> Any:
    train = split(0)
    means = torch.stack([train.activations[train.labels == k].mean(dim=0) for k in range(4)])
    sae = SimpleNamespace(decoder=SCALE * torch.eye(4), encode=lambda activations: activations)
    settings = {"sae.dictionary_size": 4, "sae.sparsity": 5.0, "discover.threshold": 0.5}
    read: Any = {"flat_settings": settings, "tensors": lambda *_: {"class_means": means}, "sae": sae}
    runs = tuple(SimpleNamespace(seed=seed, **read) for seed in seeds)
    testbed = TESTBEDS["scenes"]
    tail = LinearTail(WEIGHT, BIAS)
    splits = {"train": train, "select": more.get("select", split(2)), "test": more.get("test", split(1))}
    reader = Reader(tail, *((one.activations, one.labels) for one in splits.values()))
    return SimpleNamespace(testbed=testbed, classes=names, runs=runs, tail=tail, reader=reader, **splits)


def test_the_planted_tower_is_found_with_everyones_role() -> None:
    study = study_of()
    [reading], [case] = cases_of(study)
    assert reading.kinds == ["cross-class", "class-defining", "class-defining", "class-defining"]
    assert case.shared.latent == 0
    assert set(case.shared.classes) == {0, 1}
    assert case.roles.roles == [FALLS, REDUNDANT, RISES, NONE]
    # By the weights that an edit writes, image by image.
    edited = WEIGHT.clone()
    edited[:, 0] *= max(0.0, 1 - SCALE * case.shared.alpha)
    for k in range(4):
        mine = study.test.activations[study.test.labels == k]
        before = np.mean([int((WEIGHT @ one + BIAS).argmax()) == k for one in mine])
        after = np.mean([int((edited @ one + BIAS).argmax()) == k for one in mine])
        assert case.roles.accuracy[k] == pytest.approx(before)
        assert case.roles.change.mean[k] == pytest.approx(after - before)
    # Gas pumps are lost where 3 a falls below tench's bias.
    assert case.shared.alpha == pytest.approx(0.5 / SCALE, rel=0.2)


def test_a_reserve_is_seen_when_both_latents_go() -> None:
    study = study_of()
    [reading], [case] = cases_of(study)
    backing = case.roles.backing[1]
    church = study.test.activations[study.test.labels == 1]

    def accuracy(shared: float, own: float) -> float:
        weight = WEIGHT * torch.tensor([1 - SCALE * shared, 1 - SCALE * own, 1, 1]).clamp_min(0)
        return float(((church @ weight.T + BIAS).argmax(dim=1) == 1).double().mean())

    assert (backing.own, set(case.roles.backing)) == (1, {1})
    assert backing.alone == pytest.approx(accuracy(0, backing.alpha))
    assert backing.joint == pytest.approx(accuracy(case.shared.alpha, backing.alpha))
    assert backing.joint == 0
    assert 0 < backing.alone < 1
    # Only chain saw's own latent can be the control: tench is never lost, and it says nothing of churches.
    assert backing.control == backing.alone
    able = reading.able("class-defining")
    assert [reading.own_latent(k) for k in (2, 3) if reading.own_latent(k) in able] == [2]


def test_strengths_are_those_of_select_and_changes_those_of_test() -> None:
    weak = split(2)
    weak.activations[weak.labels == 0] *= 0.8  # such gas pumps are lost sooner
    [reading], [case] = cases_of(study_of(select=weak))
    [usual], _ = cases_of(study_of())
    assert case.shared.alpha < 0.9 * usual.alphas[0]
    # Tench's bias is what 3 a has to stay above: at each strength, who is lost is known.
    alphas = np.array(ALPHAS)
    shares = [
        np.mean([3 * float(a[0]) * max(0, 1 - SCALE * alpha) > 1.5 for a in weak.activations[:EACH]])
        for alpha in alphas
    ]
    assert case.shared.alpha == pytest.approx(strength_to(alphas, np.array(shares)))
    test = study_of().test
    left = [
        np.mean([3 * float(a[0]) * max(0, 1 - SCALE * alpha) > 1.5 for a in test.activations[:EACH]])
        for alpha in alphas
    ]
    found = accuracy_at(alphas, np.array(left)[:, None], case.shared.alpha)[0]
    assert reading.changes(0)[0] == pytest.approx(found - 1)
    assert found > 0.2  # test would have asked for more


def test_what_is_shown_is_chosen_without_the_test_images() -> None:
    blank = split(1)
    blank.activations[:] = 0
    _, cases = cases_of(study_of(test=blank))
    dull = cases[0]._replace(shared=cases[0].shared._replace(latent=2, classes=(2, 3)))
    assert not {FALLS, RISES} & set(cases[0].roles.roles)  # test shows nothing of either
    assert [case.shared.latent for case in telling([dull, cases[0]])] == [0, 2]


def test_what_is_usual_comes_from_the_own_latents_of_others() -> None:
    [reading], [case] = cases_of(study_of())
    # Tench's latent takes no class to the level, so that only church's and chain saw's are known.
    assert {latent for latent, alpha in reading.alphas.items() if math.isfinite(alpha)} == {0, 1, 2}
    changes = [reading.changes(1)[2], reading.changes(2)[1]]
    assert case.roles.usual[[2, 1]] == pytest.approx(changes)
    assert case.roles.usual[0] == pytest.approx(np.mean([reading.changes(1)[0], reading.changes(2)[0]]))


def test_tables_say_who_gains_from_whom() -> None:
    study = study_of()
    readings, cases = cases_of(study)
    rows = class_table(cases).set_index("class")
    saw = rows.loc["chain saw"]
    wrong = int((cases[0].roles.before[study.test.labels == 2] != 2).sum())
    # Every other chain saw is taken for a gas pump, and none of them when the shared latent goes.
    assert (saw["gained"], saw["taken"], saw["mistaken"]) == (wrong, 1.0, 1.0)
    assert wrong == EACH // 2
    assert saw["change"] == pytest.approx(0.5)
    assert not saw["depends"]
    assert rows.loc["church", "joint"] == 0
    counts = sae_table(readings, cases).iloc[0]
    assert counts[["in_use", "by_share", "shared", "clean", "falls_redundant", "falls_rises"]].tolist() == [
        4,
        1,
        1,
        1,
        1,
        1,
    ]


def test_the_papers_case_is_looked_for_by_name() -> None:
    study = study_of()
    row = tower_table(study, *cases_of(study)).iloc[0]
    assert (row["depend"], row["tower"], row["nearest"]) == (1, 1, 0)
    # Gas pump falls, church stays within 3 points and chain saw gains: the shared latent, and no other.
    assert (row["by_effect"], row["by_effect_defining"]) == (1, 0)
    other = study_of(names=["a", "b", "chain saw", "church"])
    assert tower_table(other, *cases_of(other)).empty


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's part of the images' figure."""

    def maps_of(_: Any, strip: Any) -> Any:
        count = len(strip.images)
        return np.zeros((count, 3, 8, 8), np.uint8), np.ones((count, 8, 8)), [0.5] * count

    monkeypatch.setattr(figures, "maps_of", maps_of)


def test_images_are_the_classes_strongest_and_those_that_are_gained(no_pictures: None) -> None:
    study = study_of()
    _, [case] = cases_of(study)
    pump, church, saw = strips_of(case)
    values, labels = study.test.activations[:, 0], study.test.labels
    for strip, k in ((pump, 0), (church, 1)):
        strongest = sorted((labels == k).nonzero()[:, 0].tolist(), key=lambda i: -float(values[i]))
        assert strip.images == strongest[:3]
    assert {int(labels[i]) for i in saw.images} == {2}
    assert all(int(case.roles.before[i]) == 0 and int(case.roles.after[i]) == 2 for i in saw.images)
    figure, table = images_figure(study, [case])
    assert len(figure.axes) == 2 * 9
    assert table["image"].tolist() == [*pump.images, *church.images, *saw.images]


def test_the_tower_holds_every_claim(no_pictures: None) -> None:
    found = cross_class.analyse([study_of(seeds=(0, 1))])
    assert {row.claim.id: row.verdict for row in judged(load_claims(), found.measured) if row.measured} == {
        "cross_class.shared": "holds",
        "cross_class.redundant": "holds",
        "cross_class.other_way": "holds",
        "cross_class.tower": "holds",
    }
    assert set(found.pictures) == {"counts", "roles-scenes", "images-scenes"}
    assert len(found.tables["classes"]) == 2 * 4
    # The same latent of two SAEs is shown once, with its curve at every strength.
    assert len(found.tables["curves"]) == len(ALPHAS) * 4


def test_where_nothing_is_shared_no_roles_are_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.MEANS", torch.eye(4) + 0.01)
    found = cross_class.analyse([study_of()])
    values = {one.claim: one.value for one in found.measured}
    assert values["cross_class.shared"] == 0
    assert math.isnan(values["cross_class.redundant"])
    assert math.isnan(values["cross_class.other_way"])
    assert set(found.pictures) == {"counts"}
    assert "no roles to tell" in found.paragraph


@pytest.mark.parametrize(("empty", "roles"), [(1, [FALLS, NONE, RISES, NONE]), (2, [FALLS, REDUNDANT, NONE, NONE])])
def test_a_class_without_test_images_has_no_role(no_pictures: None, empty: int, roles: list[str]) -> None:
    study = study_of(test=split(1, empty=empty))
    _, [case] = cases_of(study)
    assert case.roles.roles == roles
    found = cross_class.analyse([study])
    assert found.tables["classes"].set_index("class").loc[CLASSES[empty], ["change", "accuracy"]].isna().all()
    assert set(found.tables["images"]["class"]) == {CLASSES[k] for k in range(3) if k != empty}


def test_the_most_telling_come_first_and_no_classes_twice() -> None:
    study = study_of(seeds=(0, 1, 2))
    _, cases = cases_of(study)
    assert len(cases) == 3
    assert [case.reading.run.seed for case in telling(cases)] == [0]
    assert telling([]) == []
    dull = cases[1]._replace(shared=cases[1].shared._replace(latent=2, classes=(2, 3)))
    assert [case.shared.latent for case in telling([dull, cases[0]])] == [0, 2]
    assert isinstance(class_table([]), pd.DataFrame)
