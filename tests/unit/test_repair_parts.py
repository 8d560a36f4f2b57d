"""Parts of a repair that a whole run does not show."""

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.repairs import by_labels
from salve.repair_settings import RepairSettings
from salve.stages.candidates import Candidate, chosen_of
from salve.stages.grouped import Grouped
from salve.stages.repair import groups_without_images
from salve.stages.repair_suspects import checked_suspects, suspects_of
from salve.stages.repairing import Search
from salve.types import UserError


class Judging(Search):
    """A search that knows the groups of some images, and nothing else."""

    def __init__(self, labels: Tensor, value: Tensor) -> None:
        every, zero = torch.arange(len(labels)), torch.zeros_like(labels)
        self._known = Grouped("tag", ("absent", "present"), labels, value, every, (), zero, False, every)


def test_what_gains_the_worst_group_less_than_its_standard_error_does_not_pay() -> None:
    count = 20  # images of each of four groups; the network is right on 10 of the worst
    labels, value = torch.arange(4).repeat_interleave(count) // 2, torch.arange(4).repeat_interleave(count) % 2
    right_before = {0: 10, 1: 20, 2: 18, 3: 15}
    search = Judging(labels, value)

    def logits(right: dict[int, int]) -> Tensor:
        is_right = torch.cat([torch.arange(count) < right[group] for group in range(4)])
        predicted = torch.where(is_right, labels, 1 - labels)
        return torch.nn.functional.one_hot(predicted, 2).float()

    before = logits(right_before)
    for right in range(21):
        after = {**right_before, 0: right}
        worst = min(after.values()) / count
        error = math.sqrt(worst * (1 - worst) / count)
        assert search._pays(before, logits(after)) == (worst - 0.5 > error), right
    assert not search._pays(before, before)


def test_what_does_not_pay_is_not_chosen_and_the_network_stays_as_it_was() -> None:
    def candidate(name: str, score: float, allowed: bool, pays: bool) -> Candidate:
        return Candidate(name, (), 1.0, None, torch.zeros(2), (score,), 0.9, allowed, pays)

    untouched = candidate("nothing", 0.5, True, False)
    tried = [candidate("a", 0.9, False, True), candidate("b", 0.8, True, False), candidate("c", 0.7, True, True)]
    assert chosen_of(tried, untouched).method == "c"
    assert chosen_of(tried[:2], untouched) is untouched


class Failing(Search):
    """A search in which one method cannot be fitted."""

    def __init__(self) -> None:
        self.left_out = []

    def _fitted(self, method: str, size: int) -> Any:
        if method == "gate":
            raise UserError("latent 3 never fires")
        return "fitted"


def test_a_method_that_cannot_be_fitted_is_left_out_and_the_others_go_on() -> None:
    search = Failing()
    assert search._fitted_or_none("gate", 1) is None
    assert search._fitted_or_none("ablation", 1) == "fitted"
    assert search.left_out == ["latent 3 never fires"]


def test_groups_without_images_are_named() -> None:
    labels, value, numbers = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.arange(3)
    images = Grouped("tag", ("absent", "present"), labels, value, numbers, (), torch.zeros(3).long(), False, numbers)
    context: Any = SimpleNamespace(classes=("ship", "bird", "car"))
    found = groups_without_images(context, images)
    assert found == ["bird, tag absent", "car, tag absent", "car, tag present"]


class Audited:
    """An audit of two classes and six signed latents, of which it lists four."""

    def table(self, _: str) -> pd.DataFrame:
        rows = [("ship", 1, 4, -1, 2.0), ("ship", 2, 0, 1, 0.0), ("bird", 1, 2, 1, 1.0), ("bird", 2, 4, 1, 0.5)]
        return pd.DataFrame(rows, columns=["class", "rank", "latent", "sign", "score"])

    def record(self, _: str) -> dict[str, Any]:
        return {"labels": 0}

    def tensors(self, _: str) -> dict[str, Tensor]:
        return {"signs": torch.tensor([[1, 1, -1, -1, -1, 1], [1, -1, 1, 1, 1, 1]], dtype=torch.int8)}


@pytest.mark.parametrize(
    ("named", "latents", "signs"),
    [
        ({"ship": [3, 4]}, (3, 4), (-1, -1)),  # 3 is not listed, and has a sign all the same
        ({"bird": [1]}, (1,), (-1,)),
        ({"ship": "audit"}, (4,), (-1,)),  # what has no score does not push images towards the class
        ({"bird": "audit"}, (2, 4), (1, 1)),
    ],
)
def test_suspects_that_a_person_names_have_the_audits_signs(
    named: dict[str, Any], latents: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    context: Any = SimpleNamespace(classes=("ship", "bird"))
    settings = RepairSettings(["gate"], [1], [1.0], 0.1, 10, [], named)
    audit: Any = Audited()
    found = suspects_of(context, settings, audit, 6)
    assert (found.latents, found.signs) == (latents, signs)


def test_suspects_are_latents_or_all_that_the_audit_lists() -> None:
    for wrong in ("all", [], ["4"], 3):
        settings = RepairSettings(["gate"], [1], [1.0], 0.1, 10, [], {"ship": wrong})
        with pytest.raises(UserError, match="must be a list of latents, or audit for all that it lists"):
            checked_suspects(settings, ("ship", "bird"), 6)


def test_runs_are_told_apart_by_their_labels() -> None:
    def run(labels: int, labelled: int) -> Any:
        record = {"labels": labels, "labelled": labelled, "could_be_labelled": 1000}
        return SimpleNamespace(record=lambda *_: record)

    found = by_labels([run(100_000, 1000), run(25, 500), run(0, 0), run(25, 500)])
    assert [(name, len(own)) for name, own in found.items()] == [("0", 1), ("25 a group", 2), ("all", 1)]
