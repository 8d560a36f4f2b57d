"""The gate against its rivals: matched strengths by exact crossings, seeds in pairs, and what the figure shows."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from experiments.claims import load_claims
from experiments.compare import LEVEL, Reader
from experiments.salve2025.baselines import PANELS, analyse, baselines_figure, chosen_by, measured_of, paragraph
from experiments.salve2025.baselines.methods import (
    ABLATION,
    BIAS,
    FINE,
    GATE,
    RANK_ONE,
    RIVALS,
    STEERING,
    Chosen,
    Rival,
    at_matched_effect,
    compare_methods,
    dictionary,
    fitting_of,
    logits_of,
    summarise,
)
from experiments.testbeds import TESTBEDS
from salve.backbones.tail import LinearTail
from salve.editing.curves import LogitsAt
from salve.editing.methods import Target, make_method
from salve.editing.methods.base import logits_at_head

CLASSES = ("a", "b", "c")
DIRECTED = (GATE, STEERING, ABLATION)
PER_CLASS = 200


def reader(classes: int = 3, per_class: int = PER_CLASS) -> Reader:
    """Classes of three channels each, which all images have some of; the head reads each class's own."""
    generator = torch.Generator().manual_seed(0)
    own = torch.eye(classes, dtype=torch.float64).repeat_interleave(3, dim=1)  # [C, M]
    splits = []
    for _ in range(3):
        labels = torch.arange(classes * per_class) % classes
        noise = torch.randn(len(labels), own.shape[1], generator=generator, dtype=torch.float64)
        splits.append(((3 * own[labels] + 1.5 * noise).relu(), labels))
    weight = own + 0.1 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
    return Reader(LinearTail(weight, torch.zeros(classes, dtype=torch.float64)), *splits)


def edit_of(given: Reader, name: str, own: int, direction: Tensor) -> LogitsAt | None:
    """A method's edit of a class, along a direction if it follows one."""
    rival = {one.name: one for one in RIVALS}[name]
    fitting = fitting_of(given).with_sae(dictionary(direction[None]), 0)
    return logits_of(rival, given.tail, fitting, Target("own", (own,), (0,), (1,), ("latent",)))


def stored_row(given: Reader, own: int) -> Tensor:
    """``r = C⁻¹k / (kᵀ C⁻¹ k)`` of the rank-one edit, which lowers the class's logit by ``s`` at its mean ``k``."""
    activations, labels = given.train
    key = activations[labels == own].mean(dim=0)
    moment = activations.T @ activations / len(activations)
    moment = moment + 1e-4 * moment.diagonal().mean() * torch.eye(len(key), dtype=torch.float64)
    solved = torch.linalg.solve(moment, key)
    return solved / (solved @ key)


def accuracies(logits: Tensor, labels: Tensor) -> list[float]:
    return [float((logits[labels == k].argmax(dim=1) == k).double().mean()) for k in range(3)]


@pytest.mark.parametrize("method", [STEERING, RANK_ONE, BIAS])
def test_a_class_is_taken_to_the_level_of_select_at_its_exact_strength(method: str) -> None:
    given = reader()
    weight, bias, (activations, labels) = given.tail.weight, given.tail.bias, given.select
    direction, row = F.normalize(weight[1], dim=0), stored_row(given, 1)
    # Own logit falls against every other: an image is lost where the first of the other lines crosses its own.
    logits = F.linear(activations, weight, bias)
    slope = (weight @ direction).expand_as(logits) if method == STEERING else torch.zeros_like(logits)
    if method != STEERING:
        slope[:, 1] = activations @ row if method == RANK_ONE else 1
    lost_at = []
    for y, v, label in zip(logits, slope, labels, strict=True):
        if label == 1:
            assert v[1] > max(v[0], v[2])
            lost_at.append(max(0.0, min(float((y[1] - y[m]) / (v[1] - v[m])) for m in (0, 2))))
    exact = sorted(lost_at, reverse=True)[int(LEVEL * PER_CLASS)]  # the last image that must go

    found = at_matched_effect(given, edit_of(given, method, 1, direction), 1)
    assert found["reached"]
    step = 10 ** (1 / 6) - 1  # of the coarse grid, relative
    assert found["alpha"] == pytest.approx(exact, rel=2 * step / (FINE - 1))
    # What is reported is what other images show at just this strength.
    activations, labels = given.test
    logits, alpha = F.linear(activations, weight, bias), found["alpha"]
    if method == STEERING:
        edited = F.linear(activations - alpha * direction, weight, bias)
    elif method == RANK_ONE:
        stored = weight - alpha * torch.outer(torch.eye(3, dtype=torch.float64)[1], row)
        edited = F.linear(activations, stored, bias)
    else:
        edited = F.linear(activations, weight, bias - alpha * torch.eye(3, dtype=torch.float64)[1])
    before, after = accuracies(logits, labels), accuracies(edited, labels)
    change = [after[k] - before[k] for k in (0, 2)]
    assert (found["before"], found["after"]) == pytest.approx((before[1], after[1]))
    assert found["drop"] == pytest.approx(before[1] - after[1])
    assert found["drift"] == pytest.approx(sum(map(abs, change)) / 2)
    assert found["worst_loss"] == pytest.approx(max(0, -min(change)))
    assert found["lost"] == pytest.approx(sum(max(0, -one) for one in change) / 2)
    each = F.kl_div(edited.log_softmax(1), logits.softmax(1), reduction="none").sum(1)
    assert found["kl"] == pytest.approx(float((each[labels == 0].mean() + each[labels == 2].mean()) / 2))
    assert found["kl"] > 1e-3


@pytest.mark.parametrize("turned", [1, -1])
@pytest.mark.parametrize("name", [rival.name for rival in RIVALS])
def test_strengths_have_the_methods_own_unit(name: str, turned: int) -> None:
    """Of steering, a shift along the unit direction whichever side the class lies on; of the head's edits, logits."""
    given = reader()
    (weight, bias), (activations, _) = (given.tail.weight, given.tail.bias), given.test
    unit = turned * F.normalize(weight[1] + 0.3 * weight[0], dim=0)
    assert turned * float(given.train[0][given.train[1] == 1].mean(dim=0) @ unit) > 0
    edit, strengths = edit_of(given, name, 1, unit), torch.tensor([0.0, 0.2, 0.8, 30.0], dtype=torch.float64)
    assert edit is not None
    found = edit(activations, strengths)
    if name != GATE:  # whose channels are added in another order
        assert torch.equal(found[0], given.tail(activations))
    lowered, row = torch.eye(3, dtype=torch.float64)[1], stored_row(given, 1)
    for strength, logits in zip(strengths.tolist(), found, strict=True):
        expected = {
            GATE: F.linear(activations * (1 - strength * unit.abs()).clamp_min(0), weight, bias),
            STEERING: F.linear(activations - strength * unit, weight, bias),
            ABLATION: F.linear(activations - strength * torch.outer(activations @ unit, unit), weight, bias),
            RANK_ONE: F.linear(activations, weight - strength * torch.outer(lowered, row), bias),
            BIAS: F.linear(activations, weight, bias - strength * lowered),
        }[name]
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [rival.name for rival in RIVALS])
def test_all_strengths_at_once_give_the_logits_of_the_registrys_changes(name: str) -> None:
    """In float32, too, and at the fitted edit's own strengths, whose unit is its full size."""
    given = reader()
    single = Reader(
        LinearTail(given.tail.weight.float(), given.tail.bias.float()),
        *((rows.float(), labels) for rows, labels in (given.train, given.select, given.test)),
    )
    rival, fitting = {one.name: one for one in RIVALS}[name], fitting_of(single)
    fitting = fitting.with_sae(dictionary(F.normalize(single.tail.weight, dim=1)), 0)
    target, activations = Target("own", (1,), (1,), (1,), ("latent",)), single.test[0]
    fitted, unit = rival.method.fit(fitting, target), rival.unit(fitting, target)
    edit, alphas = logits_of(rival, single.tail, fitting, target), [0.0, 0.3, 1.0, 4.0]
    assert edit is not None
    found = edit(activations, torch.tensor([alpha * unit for alpha in alphas], dtype=torch.float64))
    assert found.dtype == torch.float32
    for alpha, logits in zip(alphas, found, strict=True):
        exact = logits_at_head(fitting.cut, activations.double(), fitted.at(alpha))
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_an_edit_that_is_not_linear_in_its_strength_is_refused() -> None:
    given = reader()
    bent = Rival("bent", make_method("null_space", {"threshold": 2.0}))
    pruned = Rival("pruned", make_method("pruning"))
    target = Target("own", (1,), (), (), ())
    assert logits_of(bent, given.tail, fitting_of(given), target) is not None
    with pytest.raises(ValueError, match="pruned is not linear in its strength"):
        logits_of(pruned, given.tail, fitting_of(given), target)


@pytest.mark.parametrize("own", [0, 1, 2])
def test_lowering_a_bias_loses_no_image_of_another_class(own: int) -> None:
    given = reader()
    edit = edit_of(given, BIAS, own, torch.zeros(9, dtype=torch.float64))
    assert edit is not None
    before, after = edit(given.test[0], torch.tensor([0.0, 1.7], dtype=torch.float64))
    assert at_matched_effect(given, edit, own)["lost"] == 0
    right = (given.test[1] != own) & (before.argmax(dim=1) == given.test[1])
    assert (after.argmax(dim=1) == given.test[1])[right].all()
    assert not torch.equal(before.argmax(dim=1), after.argmax(dim=1))


def test_an_edit_that_cannot_be_had_is_worth_nothing() -> None:
    given = reader()
    found = at_matched_effect(given, None, 0)
    assert (found["reached"], found["selectivity"], found["alpha"]) == (False, 0, math.inf)
    assert math.isnan(found["kl"])
    assert math.isnan(found["lost"])
    useless = at_matched_effect(given, edit_of(given, STEERING, 0, torch.zeros(9, dtype=torch.float64)), 0)
    assert str(useless) == str(found)  # NaN differs from itself


def test_classes_that_are_lost_or_empty_before_the_edit_do_not_count() -> None:
    given = reader()
    without: Any = {split: (rows[labels != 2], labels[labels != 2])
               for split, (rows, labels) in (("select", given.select), ("test", given.test))}  # fmt: skip
    empty = given._replace(**without)
    lost = given._replace(tail=LinearTail(given.tail.weight, torch.tensor([0.0, -1e3, 0.0], dtype=torch.float64)))
    for one, own in ((empty, 2), (lost, 1)):
        for edit in (edit_of(one, STEERING, own, one.tail.weight[own]), None):
            found = at_matched_effect(one, edit, own)
            assert not found["reached"]
            assert math.isnan(found["selectivity"])
    # A class without images does not count among the others either.
    found = at_matched_effect(empty, edit_of(empty, STEERING, 0, empty.tail.weight[0]), 0)
    (rows, labels), weight = empty.test, empty.tail.weight
    edited = F.linear(rows - found["alpha"] * weight[0], weight)
    ones = labels == 1
    change = (edited.argmax(dim=1) == 1)[ones].double().mean() - (F.linear(rows, weight).argmax(dim=1) == 1)[
        ones
    ].double().mean()
    assert found["drift"] == pytest.approx(abs(float(change)))
    assert math.isfinite(found["kl"])


def compared(**changes: Chosen) -> pd.DataFrame:
    given = reader()
    own = Chosen(F.normalize(torch.eye(3).repeat_interleave(3, dim=1), dim=1).double(), torch.ones(3, dtype=torch.long))
    return compare_methods(given, {0: changes.get("first", own), 1: own}, CLASSES)


@pytest.fixture(scope="module")
def edits() -> pd.DataFrame:
    return compared()


def test_every_method_edits_every_class_with_every_sae(edits: pd.DataFrame) -> None:
    names = [rival.name for rival in RIVALS]
    assert list(dict.fromkeys(edits["method"])) == names
    counts = edits.groupby(["method", "direction"]).size().to_dict()
    both = {(name, direction): 6 for name in DIRECTED for direction in ("latent", "random")}
    assert counts == {**both, (RANK_ONE, "none"): 3, (BIAS, "none"): 3}
    table = edits.set_index(["method", "direction", "seed", "class"])["alpha"].sort_index()
    for name in DIRECTED:  # both SAEs have the same latents
        assert table[name, "latent", 0].tolist() == table[name, "latent", 1].tolist()
        assert table[name, "random", 0].tolist() != table[name, "random", 1].tolist()


def test_a_class_direction_beats_a_random_one(edits: pd.DataFrame) -> None:
    found = edits.groupby(["method", "direction"])["selectivity"].mean()
    for name in DIRECTED:
        assert found[name, "latent"] > 0.8 > found[name, "random"]


def test_a_latents_sign_turns_its_column_round(edits: pd.DataFrame) -> None:
    own = torch.eye(3).repeat_interleave(3, dim=1).double()
    turned = compared(first=Chosen(-F.normalize(own, dim=1), -torch.ones(3, dtype=torch.long)))
    pd.testing.assert_frame_equal(turned, edits)


def test_a_class_without_a_latent_is_reached_only_without_one(edits: pd.DataFrame) -> None:
    own = F.normalize(torch.eye(3).repeat_interleave(3, dim=1), dim=1).double()
    found = compared(first=Chosen(own, torch.tensor([1, 0, 1])))
    table = found.set_index(["method", "seed", "class"]).sort_index()
    by_latent = table[table["direction"] == "latent"]
    for name in DIRECTED:
        assert not by_latent.loc[(name, 0, "b"), "reached"]
        assert by_latent.loc[(name, 0, "b"), "selectivity"] == 0
        assert by_latent.loc[(name, 1, "b"), "reached"]
    whole = edits.set_index(["method", "seed", "class"]).sort_index()
    pd.testing.assert_frame_equal(table[table["direction"] != "latent"], whole[whole["direction"] != "latent"])


def test_a_class_without_train_images_has_no_rank_one_edit() -> None:
    given = reader()
    activations, labels = given.train
    given = given._replace(train=(activations[labels != 2], labels[labels != 2]))
    none = Chosen(torch.zeros(3, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.long))
    found = compare_methods(given, {0: none}, CLASSES)
    rank_one = found[found["method"] == RANK_ONE]
    assert rank_one["reached"].tolist() == [True, True, False]
    assert rank_one["selectivity"].iloc[2] == 0


#: What is compared, in its order.
ROWS = [*((name, direction) for name in DIRECTED for direction in ("latent", "random")),
        (RANK_ONE, "none"), (BIAS, "none")]  # fmt: skip


def drawn(seeds: int = 4, better: float = 0.0) -> pd.DataFrame:
    """Made-up edits of two classes; some random directions reach nothing. ``better``: the gate than its rivals."""
    generator = np.random.default_rng(0)
    rows = []
    for at, (name, direction) in enumerate(ROWS):
        for seed in range(1 if direction == "none" else seeds):
            for kind in "ab":
                reached = not (direction == "random" and kind == "b" and seed < 2)
                drift = 0.02 * (at + 1) * generator.uniform(0.5, 1.5)
                gain = better if (name, direction) == (GATE, "latent") else 0
                row = {"method": name, "direction": direction, "seed": seed, "class": kind, "reached": reached}
                row |= {"selectivity": 0.85 + gain - drift if reached else 0.0, "drift": drift if reached else math.nan}
                row |= {"lost": drift / 2 if reached else math.nan}
                row |= {"worst_loss": 2 * drift if reached else math.nan, "after": 0.04 if reached else math.nan}
                row |= {"kl": 3 * drift if reached else math.nan}
                rows.append({**row, "alpha": 0.7 if kind == "a" else 1.3})
    return pd.DataFrame(rows)


def test_a_summary_pairs_seeds() -> None:
    table = drawn()
    found = summarise(table).set_index(["method", "direction"])
    assert list(found.index) == ROWS
    by_seed = {key: rows.groupby("seed")["selectivity"].mean() for key, rows in table.groupby(["method", "direction"])}
    gate = by_seed[GATE, "latent"]
    for key in ROWS:
        row, mine = found.loc[key], by_seed[key]
        assert row["selectivity"] == pytest.approx(mine.mean())
        # One edit has no interval over SAEs.
        high = stats.ttest_1samp(mine, 0).confidence_interval(0.95).high if len(mine) > 1 else math.nan
        assert row["selectivity"] + row["selectivity_half"] == pytest.approx(high, nan_ok=True)
        if key == (GATE, "latent") or key[1] == "random":
            assert math.isnan(row["ahead"])
        else:
            test = stats.ttest_rel(gate, mine) if len(mine) > 1 else stats.ttest_1samp(gate - mine[0], 0)
            low, high = test.confidence_interval(1 - 0.05 / 4)  # the gate has four rivals
            assert row["ahead"] - row["ahead_half"] == pytest.approx(low)
            assert row["ahead"] + row["ahead_half"] == pytest.approx(high)
        if key[1] == "latent":
            low, high = stats.ttest_rel(mine, by_seed[key[0], "random"]).confidence_interval(1 - 0.05 / 3)
            assert row["over_random"] - row["over_random_half"] == pytest.approx(low)
            assert row["over_random"] + row["over_random_half"] == pytest.approx(high)
        else:
            assert math.isnan(row["over_random"])
    assert found["classes"].tolist() == [2] * len(ROWS)
    assert found["reached"].tolist() == [1.5 if direction == "random" else 2 for _, direction in ROWS]
    # Drift is that of the classes that are reached, class by class, then seed by seed.
    random = table[(table["method"] == GATE) & (table["direction"] == "random")]
    drifts = [np.nanmean(rows["drift"]) for _, rows in random.groupby("seed")]
    assert found.loc[(GATE, "random"), "drift"] == pytest.approx(np.mean(drifts))


def test_claims_are_decided_by_differences_to_the_gate_and_to_chance() -> None:
    summary = summarise(drawn())
    measured = {one.claim: one for one in measured_of("vit", summary)}
    assert measured.keys() == {name for name in load_claims() if name.startswith("baselines.")}
    means = (
        drawn().groupby(["method", "direction", "seed"])["selectivity"].mean().groupby(["method", "direction"]).mean()
    )
    gate = means[GATE, "latent"]
    assert measured["baselines.steering"].value == pytest.approx(gate - means[STEERING, "latent"])
    assert measured["baselines.rank_one"].value == pytest.approx(gate - means[RANK_ONE, "none"])
    over = {name: means[name, "latent"] - means[name, "random"] for name in DIRECTED}
    least = min(over, key=lambda name: over[name])
    assert measured["baselines.random"].value == pytest.approx(over[least])
    assert measured["baselines.random"].text.startswith(least)
    assert f"{100 * gate:.1f} against {100 * means[RANK_ONE, 'none']:.1f}" in measured["baselines.rank_one"].text


@pytest.mark.parametrize(
    ("seeds", "better", "says"),
    [
        (4, 0.3, ["the gate is cleaner than all of its rivals", "It is more selective than steering (+"]),
        (4, -0.3, ["the gate is not cleaner than its rivals", "It is less selective than steering (−"]),
        (4, -0.05, ["the gate is cleaner than 3 of its 4 rivals", "It is not told apart from steering (−"]),
        (1, -0.3, ["one SAE's gate is compared with its rivals", "without an interval, with steering (−"]),
    ],
)
def test_the_words_follow_the_numbers(seeds: int, better: float, says: list[str]) -> None:
    table = drawn(seeds, better)
    text = paragraph(summarise(table), table)
    for part in says:
        assert part in text
    assert (
        "no more than project the latent's direction out in 50 % of edits" in text
    )  # of the two classes' strengths one is at most 1
    assert "nan" not in text


def test_the_figure_shows_the_summary_and_the_classes() -> None:
    table = pd.concat([drawn().assign(testbed="x"), drawn().assign(testbed="y")])
    figure = baselines_figure(table)
    assert len(figure.axes) == 2 * len(PANELS)
    expected = summarise(drawn())
    classes = drawn().groupby(["method", "direction", "class"])[["selectivity", "drift", "kl"]].mean()
    gate, steering = classes.loc[GATE, "latent"], classes.loc[STEERING, "latent"]
    for axes, (measure, (_, unit, linear)) in zip(figure.axes[: len(PANELS)], PANELS.items(), strict=True):
        means = np.array([box[0].get_xdata()[0] for box in axes.containers])
        np.testing.assert_allclose(means, unit * expected[measure])
        dots: Any = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "."]
        wanted = gate["selectivity"] - steering["selectivity"] if measure == "ahead" else steering[measure]
        np.testing.assert_allclose(dots[ROWS.index((STEERING, "latent"))], unit * wanted)
        assert np.isnan(dots[0]).all() == (measure == "ahead")  # the gate is not compared with itself
        segments = [box[2][0].get_segments()[0] for box in axes.containers]  # of no points where there is nothing
        bars = np.array([segment[0, 0] if len(segment) else np.nan for segment in segments])
        low = unit * (expected[measure] - expected[f"{measure}_half"].fillna(0))
        np.testing.assert_allclose(bars, low if linear is None else low.clip(lower=0), atol=1e-9)
        left, right = axes.get_xlim()
        assert left < min(0, *means[~np.isnan(means)])
        assert right > means[~np.isnan(means)].max()
    names = [text.get_text().replace("\n", " ") for text in figure.axes[0].get_yticklabels()]
    assert names == [*DIRECTED, RANK_ONE, BIAS]
    shown = [text.get_text() for text in figure.axes[len(PANELS) - 1].texts]
    assert shown[:-1] == [f"{1.5 if direction == 'random' else 2} of 2: 4.0 %" for _, direction in ROWS]


def a_run(seed: int, latents: list[float], signs: list[float]) -> Any:
    """An SAE with a column for each class, the second one turned round, after one that is no class's."""
    own = F.normalize(torch.eye(3).repeat_interleave(3, dim=1), dim=1)
    decoder = torch.cat([torch.ones(1, 9) / 3, own * torch.tensor([[1.0], [-1.0], [1.0]])]).T
    selected = pd.DataFrame({"latent": latents, "sign": signs}, index=list(CLASSES))
    return SimpleNamespace(seed=seed, selected=selected, sae=SimpleNamespace(decoder=torch.nn.Parameter(decoder)))


def test_latents_are_read_from_a_run() -> None:
    run = a_run(0, [1, math.nan, 3], [1, math.nan, -1])
    columns, signs = chosen_by(run)
    assert signs.tolist() == [1, 0, -1]
    assert torch.equal(columns[[0, 2]], run.sae.decoder.detach().T[[1, 3]])
    assert not columns.requires_grad


@pytest.mark.parametrize("latents", [[1, 2, 3], [1, math.nan, 3]])
def test_findings_of_two_testbeds(latents: list[float]) -> None:
    given = reader()
    signs = [1, math.nan if math.isnan(latents[1]) else -1, 1]
    runs = (a_run(0, latents, signs), a_run(3, [1, 2, 3], [1, -1, 1]))
    tail = LinearTail(given.tail.weight.float(), given.tail.bias.float())
    single = Reader(tail, *((rows.float(), labels) for rows, labels in (given.train, given.select, given.test)))
    test = SimpleNamespace(labels=given.test[1])
    studies: Any = [
        SimpleNamespace(testbed=TESTBEDS[name], classes=list(CLASSES), runs=runs, reader=single, test=test)
        for name in ("resnet18", "scenes")
    ]
    found = analyse(studies)
    assert {one.claim for one in found.measured} == {name for name in load_claims() if name.startswith("baselines.")}
    assert {one.testbed for one in found.measured} == {"resnet18", "scenes"}
    edits = found.tables["edits"]
    assert len(edits) == 2 * 3 * (2 * 2 * len(DIRECTED) + 2)
    expected = compared()
    if latents == [1, 2, 3]:  # the decoder's columns are those of the tests above
        mine = edits[(edits["testbed"] == TESTBEDS["scenes"].title) & (edits["direction"] == "latent")]
        wanted = expected[expected["direction"] == "latent"]
        np.testing.assert_allclose(mine["selectivity"], wanted["selectivity"], atol=1e-6)
    assert found.paragraph.count("At a matched effect") == 2
    assert "600 of small ResNet, drawn scenes" in found.pictures["baselines"].caption
