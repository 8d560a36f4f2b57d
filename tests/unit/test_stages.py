"""What stages make of measurements: tables worked out by hand."""

import math
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from salve.backbones.tail import LinearTail
from salve.editing import edited_logits
from salve.editing.curves import edit_accuracies, edit_curves, edit_outcomes
from salve.editing.verdict import Effect, effect
from salve.stages import DiscoverSettings
from salve.stages.context import output_order
from salve.stages.curves import Measured
from salve.stages.diagnose import strengths
from salve.stages.diagnose import summarise as summarise_strengths
from salve.stages.discover import feature_tables
from salve.stages.outcome import choose, reason, summarise
from salve.stages.targets import Target
from salve.types import Split

STRENGTHS = [0.0, 1.0, 2.0, 4.0]
OWN = np.array([True, False, False, False])


def effects_of(*rows: list[float]) -> Effect:
    return effect(np.array(rows[0]), np.array(rows), OWN)


def edit(select: list[list[float]], test: list[list[float]] | None = None) -> dict[str, object]:
    target = Target("a", (0,), (7,), (-1,), ("class-defining",))
    effects: dict[Split, Effect] = {"select": effects_of(*select), "test": effects_of(*(test or select))}
    place, reached = choose(effects["select"])
    others = Effect(*(np.repeat(np.asarray(field), 5) for field in effects["test"].at(place)))
    return summarise(target, Measured(STRENGTHS[: len(select)], {}, effects), place, reached, others, 40)


def test_the_cleanest_strength_that_separates_is_chosen() -> None:
    found = edit([[0.9, 0.8, 0.8, 0.8], [0.05, 0.8, 0.79, 0.8], [0.0, 0.8, 0.79, 0.82], [0.0, 0.5, 0.5, 0.5]])
    assert (found["alpha"], found["alpha_used"]) == (2.0, 2.0)
    assert (found["separates"], found["separates_published"], found["select_separates"]) == (True, True, True)
    assert (found["accuracy_before"], found["accuracy_after"]) == (0.9, 0.0)
    assert found["others_mean_change"] == pytest.approx(0.01)
    assert found["others_signed_change"] == pytest.approx(0.01 / 3)
    assert found["others_worst_loss"] == pytest.approx(0.01)
    assert (found["latents"], found["sign"], found["reason"]) == ("7", "-1", "")
    assert found["accuracy_after_high"] == pytest.approx(stats.binomtest(0, 40).proportion_ci(method="wilson").high)


def test_strengths_are_chosen_on_select_and_reported_on_test() -> None:
    select = [[0.9, 0.8, 0.8, 0.8], [0.0, 0.8, 0.8, 0.8], [0.0, 0.5, 0.5, 0.5]]
    test = [[0.9, 0.8, 0.8, 0.8], [0.3, 0.8, 0.8, 0.8], [0.0, 0.8, 0.8, 0.8]]  # here the second strength is the best
    found = edit(select, test)
    assert found["alpha"] == 1.0
    assert (found["select_accuracy_after"], found["accuracy_after"]) == (0.0, 0.3)
    assert (found["select_separates"], found["separates"]) == (True, False)
    assert "leaves 30.0\u00a0% on test" in str(found["reason"])


def test_gains_that_make_up_for_losses_separate_in_the_published_sense_alone() -> None:
    found = edit([[0.9, 0.8, 0.8, 0.8], [0.0, 0.7, 0.9, 0.8]])
    assert (found["separates"], found["separates_published"]) == (False, True)
    assert "change by 6.7 points in the mean" in str(found["reason"])


def test_an_edit_that_takes_another_class_down_says_by_how_much() -> None:
    many = [0.8] * 9
    rows = [[0.9, *many], [0.0, 0.6, *many[1:]]]
    own = np.arange(10) == 0
    found = effect(np.array(rows[0]), np.array(rows), own)
    assert reason(found.at(1), 1.0, True) == "another class loses 20.0 points"


def test_an_edit_that_never_brings_the_class_down_has_no_strength() -> None:
    found = edit([[0.9, 0.8, 0.8, 0.8], [0.5, 0.8, 0.8, 0.8], [0.4, 0.8, 0.8, 0.8]])
    assert (found["alpha"], found["alpha_used"], found["separates"]) == (math.inf, 2.0, False)
    assert "is 40.0\u00a0% at α = 2, the strongest edit" in str(found["reason"])


def test_an_edit_without_a_strength_separates_nothing_whatever_test_shows() -> None:
    found = edit([[0.9, 0.8, 0.8, 0.8], [0.3, 0.8, 0.8, 0.8]], [[0.9, 0.8, 0.8, 0.8], [0.0, 0.8, 0.8, 0.8]])
    assert (found["alpha"], found["separates"], found["separates_published"]) == (math.inf, False, False)
    assert found["reason"] == "no strength takes it to 5\u00a0% on select"


def test_a_class_that_is_lost_without_an_edit_does_not_separate() -> None:
    found = edit([[0.05, 0.8, 0.8, 0.8], [0.0, 0.8, 0.8, 0.8]])
    assert (found["separates"], found["separates_published"], found["alpha"]) == (False, False, math.inf)
    assert found["reason"] == "without any edit its accuracy is only 5\u00a0%"


def test_a_class_without_images_has_no_verdict() -> None:
    found = edit([[0.9, math.nan, 0.8, 0.8], [0.0, math.nan, 0.8, 0.8]])
    assert (found["others_mean_change"], found["separates"]) == (0.0, True)
    found = edit([[math.nan, 0.8, 0.8, 0.8], [math.nan, 0.8, 0.8, 0.8]])
    assert (found["separates"], found["reason"]) == (False, "it has no test images")


def test_outputs_of_the_audited_classes_come_first() -> None:
    assert output_order([5, 2], 7).tolist() == [5, 2, 0, 1, 3, 4, 6]
    assert output_order(None, 3).tolist() == [0, 1, 2]


def test_curves_equal_a_loop_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, c = (torch.randn(*s, generator=generator).double() for s in ((3, 5), (3,), (5,)))
    activations, labels = torch.rand(31, 5, generator=generator).double(), torch.arange(31) % 2  # class 2 has none
    alphas = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    accuracy, kl = edit_curves(LinearTail(weight, bias), activations, labels, c, alphas)
    logits = edited_logits(LinearTail(weight, bias), activations, c, alphas)
    for k in range(3):
        for i in range(2):
            own = labels == i
            assert accuracy[k, i] == (logits[k, own].argmax(1) == i).double().mean()
            p, q = logits[0, own].softmax(1), logits[k, own].softmax(1)
            assert kl[k, i] == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert accuracy[:, 2].isnan().all()
    monkeypatch.setattr("salve.editing.curves._BLOCK", 30)
    again = edit_curves(LinearTail(weight, bias), activations, labels, c, alphas)
    torch.testing.assert_close(again, (accuracy, kl), equal_nan=True)


@pytest.mark.parametrize("mode", ["suppress", "enhance"])
@pytest.mark.parametrize("latents", [1, 2])
def test_accuracies_and_outcomes_are_those_of_the_curves(
    monkeypatch: pytest.MonkeyPatch, mode: Literal["suppress", "enhance"], latents: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias, c = (torch.randn(*s, generator=generator).double() for s in ((4, 6), (4,), (latents, 6)))
    activations, labels = torch.rand(41, 6, generator=generator).double(), torch.arange(41) % 3  # class 3 has none
    alphas = torch.tensor([5.0, 0.0, 0.3, 1e9], dtype=torch.float64)
    accuracy, kl = edit_curves(LinearTail(weight, bias), activations, labels, c, alphas, mode)
    monkeypatch.setattr("salve.editing.curves._BLOCK", 1)
    monkeypatch.setattr("salve.editing.curves._ROWS", 7)
    assert torch.equal(
        edit_accuracies(LinearTail(weight, bias), activations, labels, c, alphas, mode)[:, :3], accuracy[:, :3]
    )
    for k, alpha in enumerate(alphas.tolist()):
        right, drift = edit_outcomes(LinearTail(weight, bias), activations, labels, c, alpha, mode)
        for i in range(3):
            assert right[labels == i].double().mean() == accuracy[k, i]
            assert float(drift[labels == i].mean()) == pytest.approx(float(kl[k, i]), rel=1e-9, abs=1e-12)


def test_of_outputs_that_tie_the_first_is_predicted_on_every_path() -> None:
    weight, bias = torch.randn(3, 4), torch.zeros(3)
    activations, labels, c = torch.rand(6, 4), torch.arange(6) % 3, torch.ones(4)
    closed = torch.tensor([0.0, 0.5, 2.0])  # at the last no channel is open, and every logit is 0
    assert edit_accuracies(LinearTail(weight, bias), activations, labels, c, closed)[2].tolist() == [1.0, 0.0, 0.0]
    assert edit_outcomes(LinearTail(weight, bias), activations, labels, c, 2.0)[0].tolist() == [True, False, False] * 2


def test_strengths_agree_with_the_grid_they_are_compared_with() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, c = torch.randn(4, 6, generator=generator), torch.zeros(4), torch.randn(6, generator=generator)
    activations = torch.rand(200, 6, generator=generator)
    grid = [i / 10 for i in range(60)]
    table = strengths(LinearTail(weight, bias), activations, c, torch.arange(200) % 4, grid)
    right = table[table["correct"]]
    assert len(right) > 20
    assert right["flip_exact"].gt(0).all()
    # A prediction may leave the class and come back within one step of the grid; it cannot leave later than seen.
    assert (right["flip_exact"] <= right["flip_grid"] + 1e-5).all()
    found = summarise_strengths("a", table.assign(latent=3), grid)
    assert found["grid_agreement"] == pytest.approx(1.0, abs=0.05)
    assert found["images"] == 200
    assert found["alpha_flip_median"] in set(right["flip_exact"])


def test_feature_tables_of_a_class_without_images_and_a_dead_latent() -> None:
    means = torch.tensor([[0.9, -0.2, 0.0], [math.nan] * 3, [0.1, 0.8, 0.0]])
    tables = feature_tables(means, torch.tensor([0.5, 0.4, 0.0]), ("a", "b", "c"), DiscoverSettings(0.5, "margin", 2))
    selected = tables["selected"].set_index("class")
    assert selected.loc["a", "latent"] == 0
    assert selected.loc["c", "latent"] == 1
    assert pd.isna(selected.loc["b", "latent"])
    assert tables["latents"]["kind"].tolist() == ["class-defining", "class-defining", "dead"]
    assert set(tables["dominant"]["class"]) == {"a", "c"}
    assert tables["dominant"].query("`class` == 'a' and latent == 1")["sign"].tolist() == [-1]
