"""Parts of a repair that a whole run does not show."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.repairs import by_labels
from salve.data.groups import Groups
from salve.editing.recalibrate import fairest_shift, group_accuracies, recalibrated
from salve.repair_settings import RepairSettings
from salve.stages.audit import _rows
from salve.stages.candidates import Candidate, beyond_budget, chosen_of
from salve.stages.grouped import Grouped, labels_remark, train_shares
from salve.stages.judging import Judge, Judgement
from salve.stages.repair import _images, few_objects, groups_without_images, small_groups
from salve.stages.repair_suspects import check_repair, checked_suspects, suspects_of
from salve.stages.repairing import Search
from salve.types import UserError


def test_what_does_not_pay_is_not_chosen_and_the_network_stays_as_it_was() -> None:
    def candidate(name: str, score: float, allowed: bool, pays: bool) -> Candidate:
        return Candidate(name, (), 1.0, None, torch.zeros(2), (score,), 0.9, 0.0, allowed, pays)

    untouched = candidate("nothing", 0.5, True, False)
    tried = [candidate("a", 0.9, False, True), candidate("b", 0.8, True, False), candidate("c", 0.7, True, True)]
    assert chosen_of(tried, untouched).method == "c"
    assert chosen_of(tried[:2], untouched) is untouched
    assert beyond_budget(tried, tried[2]) is tried[0]
    assert beyond_budget(tried, tried[0]) is None


def judge_of(known: Grouped, before: Tensor | None = None, **others: Any) -> Judge:
    """Of two classes; without logits given all images are taken for the first one."""
    before = torch.zeros(len(known), 2) if before is None else before
    settings = {"seed": 0, "shares": None, "max_loss": 0.1, **others}
    return Judge(known, known, True, before, before, (0,), 2, **settings)


class Crossed(Search):
    """A search among 12 images of 2 groups, in which an edit says to which images it was fitted."""

    def __init__(self, objects: Tensor) -> None:
        labels, zero = torch.arange(12) % 2, torch.zeros(12, dtype=torch.long)
        known = Grouped("tag", ("absent",), labels, zero, torch.arange(12), (), zero, False, objects)
        self._known, self._judge, self._halves = known, judge_of(known), {}
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


def test_few_objects_are_told_where_images_share_them() -> None:
    labels, zero = torch.tensor([0] * 60 + [1] * 60 + [2] * 10), torch.zeros(130, dtype=torch.long)
    every = torch.arange(130)
    objects = torch.cat([every[:60] // 7, every[60:120] // 2, every[120:]])  # 9 of ship, 30 of bird, 10 of bee
    context: Any = SimpleNamespace(classes=("ship", "bird", "bee"))
    images = Grouped("place", ("land",), labels, zero, every, (), zero, False, objects)
    assert few_objects(context, images) == {"ship": 9}  # every image of bee shows another one
    assert few_objects(context, None) == {}


def grouped_by_class(count: int) -> Grouped:
    """So many images of each of two classes, every image of an object of its own."""
    labels = torch.arange(2).repeat_interleave(count)
    every, zero = torch.arange(2 * count), torch.zeros(2 * count, dtype=torch.long)
    return Grouped("tag", ("absent",), labels, zero, every, (), zero, False, every)


def test_new_biases_that_only_fit_chance_are_not_kept_though_they_seem_to_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on the images that they fit, biases gain on noise as a rule; judged by halves they do not."""
    known, fitted, halves = grouped_by_class(12), 0.0, 0.0

    def worst(logits: Tensor) -> float:
        return float(group_accuracies(logits.argmax(dim=1) == known.labels, known.group, 2).min())

    for seed in range(40):
        logits = torch.randn(24, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        judge = judge_of(known, logits)
        assert not judge.with_new_biases(logits)[1].any()
        best = logits + recalibrated(logits, known.labels, known.group, (0,), fairest_shift)
        with monkeypatch.context() as patch:
            patch.setattr("salve.stages.judging.gains_by_groups", lambda *_: True)
            by_halves, _ = judge.with_new_biases(logits)
        fitted += (worst(best) - worst(logits)) / 40
        halves += (worst(by_halves) - worst(logits)) / 40
    assert fitted > 0.05
    assert halves < fitted / 2


def test_new_biases_that_help_are_kept_and_each_half_is_judged_by_the_others() -> None:
    known, draw = grouped_by_class(40), torch.Generator().manual_seed(0)
    logits = torch.nn.functional.one_hot(known.labels, 2) * 4 + torch.randn(80, 2, generator=draw)
    judge = judge_of(known, logits - torch.tensor([5.0, 0.0]))  # the first class is hardly ever said
    judged, shifts = judge.with_new_biases(judge.before)
    assert shifts[0] > 2
    assert shifts[1] == 0
    own = known.labels[judge.first], known.group[judge.first]
    expected = fairest_shift(judge.before[judge.first].double(), *own, 0)
    moved = (judged - judge.before)[~judge.first]
    torch.testing.assert_close(moved, torch.tensor([[expected, 0.0]], dtype=torch.float64).expand(40, 2))
    assert judge.of(judged, judge.before + shifts).score[0] > 0.8


def test_the_budget_also_holds_for_the_average_that_weighs_groups_as_the_train_images_have_them() -> None:
    known = grouped_by_class(20)
    right = torch.nn.functional.one_hot(known.labels, 2).double()
    before, after = right.clone(), right.clone()
    before[20:30] = right[:10]  # half of the second class is wrong before
    after[:8] = right[20:28]  # afterwards all of it is right, and eight of the first class are wrong
    alike, mostly_first = torch.tensor([1.0, 1.0]), torch.tensor([95.0, 5.0])
    assert judge_of(known, before, shares=alike).of(after, after).allowed
    assert not judge_of(known, before, shares=mostly_first).of(after, after).allowed
    assert judge_of(known, before, shares=mostly_first, max_loss=0.4).of(after, after).allowed


def test_a_table_of_images_keeps_its_columns_whatever_the_attribute_is_called() -> None:
    groups = SimpleNamespace(name="split", values=("no", "yes"), of_image=torch.tensor([1, -1]))
    data = SimpleNamespace(
        labels=lambda _: [0, 1], groups=lambda _: groups, files=lambda split: (f"{split}/a.png", f"{split}/b.png")
    )
    context: Any = SimpleNamespace(classes=("ship", "bird"), data=data)
    found = _images(context, {1})
    assert list(found) == ["split", "image", "file", "class", "value", "labelled"]
    assert found["split"].tolist() == ["select", "select", "test", "test"]
    assert found["value"].tolist() == ["yes", "", "yes", ""]
    assert found["labelled"].tolist() == [False, True, False, False]


def test_shares_of_the_train_images_are_unknown_where_no_train_image_has_the_attribute() -> None:
    groups = Groups("tag", ("absent",), torch.tensor([-1, -1]))
    data = SimpleNamespace(labels=lambda _: torch.tensor([0, 1]), groups=lambda _: groups)
    context: Any = SimpleNamespace(classes=("ship", "bird"), data=data)
    assert train_shares(context, grouped_by_class(1)) is None


def test_without_labels_an_edit_is_kept_only_if_the_network_is_less_sure_by_more_than_chance() -> None:
    known = grouped_by_class(20)  # the second twenty come near to the first class, and are not of it
    before = torch.zeros(40, 2, dtype=torch.float64)
    judge = replace(judge_of(known, before, max_loss=1.0), labelled=False)

    def judged(*moves: float) -> Judgement:
        """With the first class's logit moved in the twenty images, over and over by these numbers."""
        logits = before.clone()
        logits[20:, 0] += torch.tensor(moves, dtype=torch.float64).repeat(20 // len(moves))
        return judge.of(logits, logits)

    assert not judged(0.0).pays
    assert judged(-1.0).pays
    assert judged(-1.0).score[0] == pytest.approx(-1 / (1 + math.e))
    assert not judged(1.0).pays
    # Falls of ±0.46 and a little: the error is 0.46 / √20 = 0.10, and of two images of each object 0.46 / √10 = 0.15.
    assert not judged(-3.0, 3.0).pays
    falls = judged(-3.0, -3.0, -3.0, 3.0, 3.0)  # the mean falls by 0.09
    assert not falls.pays
    falls = judged(-3.0, -3.0, 3.0, -3.0)  # by 0.23, with an error of 0.09
    assert falls.pays
    few = replace(judge, plain=replace(known, object=torch.arange(40) // 20))  # all of one object: an error of 0.39
    logits = before.clone()
    logits[20:, 0] += torch.tensor([-3.0, -3.0, 3.0, -3.0], dtype=torch.float64).repeat(5)
    assert not few.of(logits, logits).pays
    # All images of one object fall alike: how much others would is not known.
    logits[20:, 0] = -1.0
    assert judge.of(logits, logits).pays
    assert not few.of(logits, logits).pays


def context_of(images: Grouped, classes: tuple[str, ...]) -> Any:
    groups = Groups(images.name, images.values, images.value)
    data = SimpleNamespace(
        labels=lambda _: images.labels,
        groups=lambda _: groups,
        pairs=lambda _: None,
        objects=lambda _: None,
        raw=lambda _: (),
    )
    return SimpleNamespace(classes=classes, data=data)


def test_groups_on_whose_few_labels_a_repair_is_chosen_are_named_before_it() -> None:
    labels, value = torch.tensor([0] * 12 + [1] * 30), torch.tensor([0] * 11 + [1] + [0] * 9 + [1] * 21)
    every, zero = torch.arange(42), torch.zeros(42, dtype=torch.long)
    images = Grouped("tag", ("absent", "present"), labels, value, every, (), zero, False, every)
    context = context_of(images, ("ship", "bird"))
    said = labels_remark(context, 25)
    assert said.startswith(
        "In 2 of 4 groups, suspects and repairs are chosen on fewer than 10 labelled select images: "
    )
    assert "images: ship, tag present (1); bird, tag absent (9). What so few" in said
    assert "In 4 of 4 groups" in labels_remark(context, 1)  # one label a group
    assert "bird, tag present (1)" in labels_remark(context, 1)
    assert labels_remark(context, 0) == ""
    many = context_of(images.at(torch.arange(42).repeat(10), paired=False), ("ship", "bird"))
    assert labels_remark(many, 25) == ""
    without = context_of(images, ("ship", "bird", "car"))
    assert "car, tag absent (0); car, tag present (0); ship, tag present (1)" in labels_remark(without, 25)
