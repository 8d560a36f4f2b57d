"""The gate against its rivals: matched strengths by exact crossings, seeds in pairs, and what the figure shows."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from experiments.compare import LEVEL
from experiments.salve2025.baselines import (
    FINE,
    LOOKS,
    PANELS,
    Chosen,
    Reader,
    at_matched_effect,
    baselines_figure,
    compare_methods,
    methods,
    summarise,
)
from salve.editing import rank_one_logits, rank_one_rows, rank_one_weight, steered_logits

CLASSES = ("a", "b", "c")
PER_CLASS = 200


def reader(classes: int = 3, per_class: int = PER_CLASS) -> Reader:
    """Classes of three channels each, which all images have some of; the head reads each class's own."""
    generator = torch.Generator().manual_seed(0)
    own = torch.eye(classes, dtype=torch.float64).repeat_interleave(3, dim=1)  # [C, M]
    splits = []
    for _ in range(2):
        labels = torch.arange(classes * per_class) % classes
        noise = torch.randn(len(labels), own.shape[1], generator=generator, dtype=torch.float64)
        splits.append(((3 * own[labels] + 1.5 * noise).relu(), labels))
    weight = own + 0.1 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    return Reader(weight, torch.zeros(classes, dtype=torch.float64), *splits)


def accuracies(logits: Tensor, labels: Tensor) -> list[float]:
    return [float((logits[labels == k].argmax(dim=1) == k).double().mean()) for k in range(3)]


@pytest.mark.parametrize("method", ["steering", "rank-one edit"])
def test_a_class_is_taken_to_the_level_at_its_exact_strength(method: str) -> None:
    given = reader()
    weight, bias, (activations, labels) = given.weight, given.bias, given.val
    direction, row = F.normalize(weight[1], dim=0), rank_one_rows(*given.train, 3)[1]
    # Own logit falls against every other: an image is lost where the first of the other lines crosses its own.
    logits = F.linear(activations, weight, bias)
    slope = (weight @ direction).expand_as(logits) if method == "steering" else torch.zeros_like(logits)
    if method != "steering":
        slope[:, 1] = activations @ row
    lost_at = []
    for y, v, label in zip(logits, slope, labels, strict=True):
        if label == 1:
            assert v[1] > max(v[0], v[2])
            lost_at.append(max(0.0, min(float((y[1] - y[m]) / (v[1] - v[m])) for m in (0, 2))))
    exact = sorted(lost_at, reverse=True)[int(LEVEL * PER_CLASS)]  # the last image that must go

    def logits_at(block: Tensor, strengths: Tensor) -> Tensor:
        if method == "steering":
            return steered_logits(weight, bias, block, direction, strengths)
        return rank_one_logits(weight, bias, block, row, 1, strengths)

    found = at_matched_effect(given, logits_at, 1)
    assert found["reached"]
    step = 10 ** (1 / 6) - 1  # of the coarse grid, relative
    assert found["alpha"] == pytest.approx(exact, rel=2 * step / (FINE - 1))
    if method == "steering":
        edited = F.linear(activations - exact * direction, weight, bias)
    else:
        edited = F.linear(activations, rank_one_weight(weight, row, 1, exact), bias)
    before, after = accuracies(logits, labels), accuracies(edited, labels)
    change = [abs(after[k] - before[k]) for k in (0, 2)]
    assert found["drop"] == pytest.approx(before[1] - LEVEL)
    assert found["drift"] == pytest.approx(sum(change) / 2, abs=2 / PER_CLASS)
    assert found["worst"] == pytest.approx(max(change), abs=2 / PER_CLASS)
    each = F.kl_div(edited.log_softmax(1), logits.softmax(1), reduction="none").sum(1)
    assert found["kl"] == pytest.approx(float((each[labels == 0].mean() + each[labels == 2].mean()) / 2), rel=0.03)
    assert found["kl"] > 1e-3


def test_an_edit_that_cannot_be_had_is_worth_nothing() -> None:
    given = reader()

    def nothing(block: Tensor, strengths: Tensor) -> Tensor:
        return F.linear(block, given.weight, given.bias).expand(len(strengths), -1, -1)

    found = at_matched_effect(given, nothing, 0)
    assert (found["reached"], found["selectivity"]) == (False, 0)
    assert math.isnan(found["kl"])


def test_classes_that_are_lost_or_empty_before_the_edit_do_not_count() -> None:
    given = reader()
    activations, labels = given.val
    empty = given._replace(val=(activations[labels != 2], labels[labels != 2]))
    lost = given._replace(bias=torch.tensor([0.0, -1e3, 0.0], dtype=torch.float64))
    for one, own in ((empty, 2), (lost, 1)):
        edit = methods(one)[1].edit(own, one.weight[own])
        found = at_matched_effect(one, edit, own)
        assert not found["reached"]
        assert math.isnan(found["selectivity"])
    # A class without images does not count among the others either.
    found = at_matched_effect(empty, methods(empty)[1].edit(0, empty.weight[0]), 0)
    assert found["drift"] == found["worst"]
    assert math.isfinite(found["kl"])


def compared(**changes: Chosen) -> pd.DataFrame:
    given = reader()
    own = Chosen(F.normalize(torch.eye(3).repeat_interleave(3, dim=1), dim=1).double(), torch.ones(3, dtype=torch.long))
    return compare_methods(given, {0: changes.get("first", own), 1: own}, CLASSES)


@pytest.fixture(scope="module")
def edits() -> pd.DataFrame:
    return compared()


def test_every_method_edits_every_class_with_every_sae(edits: pd.DataFrame) -> None:
    names = [method.name for method in methods(reader())]
    assert list(dict.fromkeys(edits["method"])) == names == list(LOOKS)
    counts = edits.groupby("method", sort=False).size()
    assert counts.to_dict() == {name: 3 if name == "rank-one edit" else 6 for name in names}
    table = edits.set_index(["method", "seed", "class"])["alpha"].sort_index()
    for name in ("suppress", "steering"):  # both SAEs have the same latents
        assert table[name, 0].tolist() == table[name, 1].tolist()
        random = f"{name}, random direction"
        assert table[random, 0].tolist() != table[random, 1].tolist()


def test_a_class_direction_beats_a_random_one(edits: pd.DataFrame) -> None:
    found = edits.groupby("method")["selectivity"].mean()
    for name in ("suppress", "steering"):
        assert found[name] > 0.8 > found[f"{name}, random direction"]


def test_a_latents_sign_turns_its_column_round(edits: pd.DataFrame) -> None:
    own = torch.eye(3).repeat_interleave(3, dim=1).double()
    turned = compared(first=Chosen(-F.normalize(own, dim=1), -torch.ones(3, dtype=torch.long)))
    pd.testing.assert_frame_equal(turned, edits)


def test_a_class_without_a_latent_is_reached_only_without_one(edits: pd.DataFrame) -> None:
    own = F.normalize(torch.eye(3).repeat_interleave(3, dim=1), dim=1).double()
    found = compared(first=Chosen(own, torch.tensor([1, 0, 1])))
    table = found.set_index(["method", "seed", "class"]).sort_index()
    for name in ("suppress", "steering"):
        assert not table.loc[(name, 0, "b"), "reached"]
        assert table.loc[(name, 0, "b"), "selectivity"] == 0
        assert table.loc[(name, 1, "b"), "reached"]
    whole = edits.set_index(["method", "seed", "class"]).sort_index()
    for name in set(LOOKS) - {"suppress", "steering"}:
        pd.testing.assert_frame_equal(table.loc[[name]], whole.loc[[name]])


def test_a_class_without_train_images_has_no_rank_one_edit() -> None:
    given = reader()
    activations, labels = given.train
    given = given._replace(train=(activations[labels != 2], labels[labels != 2]))
    none = Chosen(torch.zeros(3, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.long))
    found = compare_methods(given, {0: none}, CLASSES)
    rank_one = found[found["method"] == "rank-one edit"]
    assert rank_one["reached"].tolist() == [True, True, False]
    assert rank_one["selectivity"].iloc[2] == 0


def drawn() -> pd.DataFrame:
    """Made-up edits of two classes with four SAEs; some random directions reach nothing."""
    generator = np.random.default_rng(0)
    rows = []
    for at, name in enumerate(LOOKS):
        for seed in range(1 if name == "rank-one edit" else 4):
            for kind in "ab":
                reached = not ("random" in name and kind == "b" and seed < 2)
                drift = 0.02 * (at + 1) * generator.uniform(0.5, 1.5)
                row = {"method": name, "seed": seed, "class": kind, "reached": reached}
                row |= {"selectivity": 0.85 - drift if reached else 0.0, "drift": drift if reached else math.nan}
                row |= {"worst": 2 * drift if reached else math.nan, "kl": 3 * drift if reached else math.nan}
                rows.append(row)
    return pd.DataFrame(rows)


def test_a_summary_pairs_seeds() -> None:
    table = drawn()
    found = summarise(table).set_index("method")
    first = table[table["method"] == "suppress"].groupby("seed")["selectivity"].mean()
    for name in list(LOOKS)[1:]:
        mine = table[table["method"] == name].groupby("seed")["selectivity"].mean()
        test = stats.ttest_rel(mine, first) if len(mine) > 1 else stats.ttest_1samp(float(mine[0]) - first, 0)
        low, high = test.confidence_interval(1 - 0.05 / 4)  # four methods are compared with the first
        row = found.loc[name]
        assert row["difference"] - row["difference_half"] == pytest.approx(low)
        assert row["difference"] + row["difference_half"] == pytest.approx(high)
        assert row["selectivity"] == pytest.approx(mine.mean())
        # One edit has no interval over SAEs.
        high = stats.ttest_1samp(mine, 0).confidence_interval(0.95).high if len(mine) > 1 else math.nan
        assert row["selectivity"] + row["selectivity_half"] == pytest.approx(high, nan_ok=True)
    assert math.isnan(found.loc["suppress", "difference"])
    assert found["classes"].tolist() == [2] * 5
    assert found["reached"].tolist() == [2, 2, 2, 1.5, 1.5]
    # Drift is that of the classes that are reached, class by class, then seed by seed.
    random = table[(table["method"] == "suppress, random direction")]
    by_seed = [np.nanmean(rows["drift"]) for _, rows in random.groupby("seed")]
    assert found.loc["suppress, random direction", "drift"] == pytest.approx(np.mean(by_seed))


def test_the_figure_shows_the_summary_and_the_classes() -> None:
    table = pd.concat([drawn().assign(ground="x"), drawn().assign(ground="y")])
    figure = baselines_figure(table)
    assert len(figure.axes) == 2 * len(PANELS)
    expected = summarise(drawn())
    for axes, (measure, (_, unit)) in zip(figure.axes[: len(PANELS)], PANELS.items(), strict=True):
        means = [box[0].get_xdata()[0] for box in axes.containers]
        np.testing.assert_allclose(means, unit * expected[measure])
        by_class = drawn()[drawn()["method"] == "suppress"].groupby("class")[measure].mean()
        np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), unit * by_class)
    shown = [text.get_text() for text in figure.axes[len(PANELS) - 1].texts]
    assert shown == ["2 of 2", "2 of 2", "2 of 2", "1.5 of 2", "1.5 of 2"]
