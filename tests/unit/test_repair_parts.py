"""Parts of a repair that a whole run does not show."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.repairs import by_labels
from salve.repair_settings import RepairSettings
from salve.stages.audit import _rows
from salve.stages.candidates import Candidate, chosen_of
from salve.stages.grouped import Grouped
from salve.stages.repair import groups_without_images, small_groups
from salve.stages.repair_suspects import check_repair, checked_suspects, suspects_of
from salve.stages.repairing import Search
from salve.types import UserError


def test_what_does_not_pay_is_not_chosen_and_the_network_stays_as_it_was() -> None:
    def candidate(name: str, score: float, allowed: bool, pays: bool) -> Candidate:
        return Candidate(name, (), 1.0, None, torch.zeros(2), (score,), 0.9, allowed, pays)

    untouched = candidate("nothing", 0.5, True, False)
    tried = [candidate("a", 0.9, False, True), candidate("b", 0.8, True, False), candidate("c", 0.7, True, True)]
    assert chosen_of(tried, untouched).method == "c"
    assert chosen_of(tried[:2], untouched) is untouched


class Crossed(Search):
    """A search among 12 images of 2 groups, in which an edit says to which images it was fitted."""

    def __init__(self, objects: Tensor) -> None:
        labels, zero = torch.arange(12) % 2, torch.zeros(12, dtype=torch.long)
        self._known = Grouped("tag", ("absent",), labels, zero, torch.arange(12), (), zero, False, objects)
        self._context, self._halves = SimpleNamespace(seed=0), {}  # type: ignore[assignment]
        self._on_known = SimpleNamespace(logits=lambda which: which.double().expand(12, 12))  # type: ignore[assignment]

    def _fitted_to(self, method: str, which: Tensor) -> Any:
        return SimpleNamespace(at=lambda alpha: which)

    def _usable(self, change: Any) -> Any:
        return change


def test_no_image_judges_an_edit_that_was_fitted_to_it_or_to_its_object() -> None:
    objects = torch.arange(12) // 2  # two images of each
    search = Crossed(objects)
    whole: Any = search._fitted("leace", 0).at(1.0)
    assert whole.all()
    used = search._of_known("leace", 1.0, None)  # [image, whether the edit that judges it was fitted to the other]
    assert not used[objects[:, None] == objects].any()
    assert (used.sum(dim=1) == 6).all()
    everything = torch.ones(12)
    assert torch.equal(search._of_known("gate", 1.0, everything), everything.double().expand(12, 12))  # type: ignore[arg-type]


def test_one_image_of_a_group_cannot_be_judged_by_halves() -> None:
    with pytest.raises(UserError, match="leace needs two labelled images of a group"):
        Crossed(torch.zeros(12, dtype=torch.long))._fitted("leace", 0)


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


def test_a_latent_that_does_not_exist_is_refused_before_any_work() -> None:
    context: Any = SimpleNamespace(classes=("ship", "bird"))
    settings = RepairSettings(["gate"], [1], [1.0], 0.1, 10, [], {"ship": [3, 6]})
    with pytest.raises(UserError, match="names 6; latents go from 0 to 5"):
        check_repair(context, settings, 0, torch.nn.Linear(2, 2), 6)


def test_a_latent_that_never_fires_is_the_last_suspect_even_where_no_latent_has_a_score() -> None:
    latents = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -2.0]])  # of two images; latent 0 is dead
    nothing = torch.zeros(2, 3)
    evidence: Any = SimpleNamespace(read=(latents, nothing), signs=torch.ones(2, 3), effects=nothing, lifts=nothing)
    context: Any = SimpleNamespace(classes=("ship", "bird"))
    for suspects in (2, 3):
        settings: Any = SimpleNamespace(suspects=suspects)
        found = pd.DataFrame(_rows(context, settings, nothing, evidence, evidence, None))
        assert found.groupby("class")["latent"].agg(list).map(sorted).tolist() == [sorted([1, 2, 0][:suspects])] * 2
        assert set(found.loc[found["rank"] <= 2, "latent"]) == {1, 2}


def test_groups_of_few_images_are_named_with_their_number() -> None:
    labels = torch.tensor([0] * 24 + [1] * 25 + [1] * 3)
    value = torch.tensor([0] * 24 + [0] * 25 + [1] * 3)
    every, zero = torch.arange(52), torch.zeros(52, dtype=torch.long)
    images = Grouped("tag", ("absent", "present"), labels, value, every, (), zero, False, every)
    context: Any = SimpleNamespace(classes=("ship", "bird"))
    assert small_groups(context, images) == {"ship, tag absent": 24, "bird, tag present": 3}
    assert groups_without_images(context, images) == ["ship, tag present"]
