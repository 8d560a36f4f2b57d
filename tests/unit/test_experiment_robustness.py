"""Robustness: what edits change of images under conditions, and what α_flip says of them; nothing is attacked here."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.beyond.composition.measures import Edits
from experiments.beyond.robustness import EXPERIMENT, analyse, measures, more_fragile, relations, summary_of, verdict_on
from experiments.beyond.robustness.measures import Moved, Seen
from experiments.claims import load_claims
from experiments.experiment import carry_out
from experiments.testbeds import TESTBEDS, Setup
from salve.artifacts import Store
from salve.backbones import Reader, Site
from salve.backbones.tail import LinearTail
from salve.data.corruptions import KINDS, SEVERITIES
from salve.metrics.correlation import partial_spearman_interval
from salve.report.intervals import Interval, t_interval
from salve.types import UserError

CLASSES = ["ant", "bee", "cow"]
COUNT = 60


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def edits() -> Edits:
    vectors = torch.nn.functional.normalize(drawn(3, 6, seed=1) * 0.2 + torch.eye(3).repeat_interleave(2, dim=1), dim=1)
    return Edits([0, 1, 2], [1.0, 1.2, 0.8], vectors, [0.0, 1.0])


@pytest.fixture(scope="module")
def study() -> Any:
    weight = torch.eye(3).repeat_interleave(2, dim=1) + 0.2 * drawn(3, 6, seed=2)
    tail = LinearTail(weight, torch.zeros(3))
    run = SimpleNamespace(flat_settings={"edit.images": 20}, artifact=lambda kind: kind, seed=0)
    test = SimpleNamespace(labels=torch.arange(COUNT) % 3)
    context = SimpleNamespace(cut=lambda classifier: None, evaluation=())
    facts = {"testbed": TESTBEDS["scenes"], "classes": CLASSES, "runs": [run], "context": context, "test": test}
    return SimpleNamespace(**facts, tail=tail)


def shown(noise: float = 0.4) -> list[Seen]:
    """Images as they are, and under all corruptions; the harsher, the more noise."""
    labels = torch.arange(COUNT) % 3
    clean = (torch.eye(3).repeat_interleave(2, dim=1)[labels] + noise * drawn(COUNT, 6, seed=3)).relu()
    found = [Seen("clean", 0, clean, labels)]
    for number, kind in enumerate(KINDS):
        for severity in SEVERITIES:
            more = (clean + 0.2 * severity * drawn(COUNT, 6, seed=10 + 7 * number + severity)).relu()
            found.append(Seen(kind, severity, more, labels))
    return found


def test_what_edits_change_is_counted_over_images_of_other_classes(study: Any, edits: Edits) -> None:
    """Against plain loops."""
    images = shown()[:2]
    moved = measures.moved_by(study, images, [edits, edits])
    for k, one in enumerate(images):
        for n in range(COUNT):
            before = bool(study.tail(one.activations[n : n + 1]).argmax() == one.labels[n])
            each = []
            for label, alpha, vector in zip(edits.labels, edits.alphas, edits.vectors, strict=True):
                if label != one.labels[n]:
                    gated = one.activations[n] * (1 - alpha * vector.abs()).clamp_min(0)
                    each.append(int(study.tail(gated[None]).argmax() == one.labels[n]) - before)
            assert moved.before[k, n] == before
            assert moved.change[k, n] == pytest.approx(np.mean(each))


def test_changes_are_shares_of_the_accuracy_that_there_is() -> None:
    # Half of the clean images are right, and edits take half of these; under the condition a quarter, and all of it.
    clean = Moved(torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[-1.0, 0, 0, 0]]))
    under = Moved(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[-1.0, 0, 0, 0], [0, 0, 0, 0]]))
    found = measures.change(clean, under)
    assert (found.clean.mean, found.changed.mean, found.beyond.mean) == (-0.5, -1.0, -0.5)
    # Where the network is always right, the ratio is a mean.
    change = drawn(1, 50)
    always = Moved(torch.ones(1, 50), change)
    plain = measures.change(always, always)
    assert plain.clean == pytest.approx(t_interval(change[0].tolist()), abs=1e-6)
    assert (plain.beyond.mean, plain.beyond.half) == (0, 0)
    apart = measures.change(always, always, same_images=False).beyond
    assert apart.half == pytest.approx(plain.clean.half * 2**0.5)
    unknown = Moved(torch.ones(1, 51), torch.cat([change, torch.full((1, 1), torch.nan)], dim=1))
    assert measures.change(unknown, unknown).clean.n == 50
    never = Moved(torch.zeros(1, 50), torch.ones(1, 50))
    assert np.isnan(measures.change(always, never, same_images=False).beyond.mean)


def test_findings(study: Any, edits: Edits, monkeypatch: pytest.MonkeyPatch) -> None:
    images, generator = shown(), np.random.default_rng(0)
    norm = generator.uniform(0.001, 0.01, COUNT)
    norm[0] = np.inf
    attacks = {"image": range(COUNT), "class": [CLASSES[k % 3] for k in range(COUNT)], "edit": "bee", "norm": norm}
    attacks["norm_edited"] = np.where(np.arange(COUNT) == 1, 0, norm / 2)
    table = pd.DataFrame(attacks).assign(testbed="scenes")
    monkeypatch.setattr(measures, "conditions", lambda *_: images)
    monkeypatch.setattr(measures, "attacked", lambda *_: table)
    monkeypatch.setattr("experiments.beyond.robustness.edits_of", lambda *_: edits)
    few = partial(partial_spearman_interval, draws=60)
    monkeypatch.setattr(relations, "partial_spearman_interval", few)
    found = analyse([study])
    values = {one.claim: one.value for one in found.measured}
    wanted = {name for name in load_claims() if name.startswith("robustness.")}
    assert values.keys() == wanted - {"robustness.shift"}  # no images from elsewhere were given
    assert values["robustness.adversarial"] == pytest.approx(-1)  # all that can be compared take half
    rows = found.tables["correlations"].set_index(["outcome", "measure", "given"])
    given = rows.loc[("adversarial", "alpha_flip", "margin")]
    assert values["robustness.flip_adversarial"] == given["low"]
    assert given["low"] < 0.1  # norms were drawn apart from the images
    assert "a null result" in found.paragraph
    # Corruptions take what has little margin, and α_flip is nearly that here.
    assert rows.loc[("corruption", "margin", "nothing"), "low"] > 0.1
    conditions = found.tables["conditions"]
    assert len(conditions) == 1 + len(KINDS) * len(SEVERITIES)
    summary = found.tables["summary"].set_index("condition")
    assert list(summary.index) == ["clean", "corruptions", "attack"]
    assert summary.loc["clean", "accuracy"] == conditions["original"][0]
    assert summary.loc["corruptions", "beyond"] == values["robustness.corruptions"]
    ends = summary.loc["attack", ["factor", "factor_low", "factor_high"]]
    assert ends.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert list(found.pictures) == ["robustness"]


def test_the_summary_has_a_row_for_images_from_elsewhere() -> None:
    one = measures.Change(Interval(-0.1, 0.01, 9), Interval(-0.3, 0.02, 9), Interval(-0.2, 0.03, 9))
    facts = {"clean_accuracy": 0.9, "corrupted_accuracy": 0.4, "shifted_accuracy": {"sketches": 0.6}}
    facts |= {"corrupted": one, "shifts": {"sketches": one._replace(changed=Interval(-0.5, 0.04, 9))}}
    summary = summary_of(facts | {"norm": 2.0, "factor": 1.0, "factor_span": (0.9, 1.1)}).set_index("condition")
    assert list(summary.index) == ["clean", "corruptions", "sketches", "attack"]
    assert summary.loc["clean", ["accuracy", "change", "change_half"]].tolist() == [0.9, -0.1, 0.01]
    assert summary.loc["corruptions", ["accuracy", "change", "beyond_half"]].tolist() == [0.4, -0.3, 0.03]
    assert summary.loc["sketches", ["accuracy", "change", "change_half"]].tolist() == [0.6, -0.5, 0.04]


def test_intervals_in_words() -> None:
    assert more_fragile(Interval(-0.1, 0.05, 9)) == "an edit makes the others more fragile"
    assert more_fragile(Interval(-0.1, 0.2, 9)).startswith("no sign")
    assert more_fragile(Interval(0.1, 0.05, 9)) == "an edit costs the others less there"
    assert more_fragile(Interval(0.1, float("nan"), 1)).startswith("too few")
    assert verdict_on(0.3, 0.1, 0.5) == "α_flip says more than the margin does"
    assert verdict_on(0.3, -0.1, 0.5).startswith("a null result")
    assert verdict_on(-0.3, -0.5, -0.1) == "beyond the margin it points the wrong way"
    assert EXPERIMENT.module == "experiments.beyond.robustness"


def test_what_is_missing_is_told_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.data.corruptions._PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"pip install 'salve\[robustness\]'"):
        carry_out(EXPERIMENT, [TESTBEDS["scenes"]], Setup(tmp_path, {}, {}))
    assert not list(tmp_path.iterdir())


def test_an_edited_copy_reads_as_if_the_activation_were_gated() -> None:
    model = torch.nn.Linear(6, 3)
    cut = SimpleNamespace(model=model, site=Site("last", (Reader("weight"),), 6))
    gate, rows, before = torch.rand(6), drawn(4, 6), model.weight.clone()
    copy = measures.edited(cut, gate)  # type: ignore[arg-type]
    torch.testing.assert_close(copy(rows), model(rows * gate))
    assert torch.equal(model.weight, before)


class Halves:
    """In place of an attack: breaks an image within its margin over twice the number of pixels. Counts how often."""

    count = 0

    def __init__(self, logits: Any, pixels: Tensor, labels: Tensor, classes: int, **_: int) -> None:
        two = logits(pixels).topk(2, dim=1).values
        self.needed = (two[:, 0] - two[:, 1]).double() / 24

    def __call__(self, rows: Tensor, norms: Tensor) -> Tensor:
        Halves.count += 1
        return norms >= self.needed[rows]


def test_attacks_are_kept_and_images_that_are_taken_wrongly_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "Attack", Halves)
    linear, weight = torch.nn.Linear(12, 3, bias=False), torch.eye(3).repeat_interleave(4, dim=1)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = torch.nn.Sequential(torch.nn.Flatten(), linear)

    def cut_of(network: torch.nn.Module) -> Any:
        site = Site("last", (Reader("1.weight"),), 12)
        return SimpleNamespace(model=network, site=site, logits=network, order=[0, 1, 2], of=cut_of)

    labels = torch.tensor([0, 1, 2, 0])
    pixels = 0.1 + 0.5 * torch.tensor([0.2, 0.4, 0.8, 1.0])[:, None] * weight[labels]
    pixels[3, 4:8] = 0.9  # the last image is taken for the second class
    preprocess = SimpleNamespace(denormalise=lambda images: images, mean=[0.0] * 3, std=[1.0] * 3)
    data = SimpleNamespace(preprocess=preprocess, dataset=lambda split: [(one.view(3, 2, 2), 0) for one in pixels])
    classifier = SimpleNamespace(kind="classifier", digest="d")
    context = SimpleNamespace(data=data, device="cpu", on_device=lambda one: one, store=Store(tmp_path))
    of_images = SimpleNamespace(kind="activations", digest="a")
    run = SimpleNamespace(artifact=lambda kind: classifier if kind == "classifier" else of_images)
    test = SimpleNamespace(labels=labels)
    study: Any = SimpleNamespace(
        context=context, runs=[run], test=test, classes=CLASSES, testbed=SimpleNamespace(name="toy")
    )
    vectors = weight[:2] / 2  # α = 2 closes the channels of the class
    edits = Edits([0, 1], [2.0, 2.0], vectors, [0.0])

    first = measures.attacked(study, cut_of(model), range(4), edits)
    asked = Halves.count
    assert asked > 0
    pd.testing.assert_frame_equal(measures.attacked(study, cut_of(model), range(4), edits), first)
    assert Halves.count == asked
    # The same numbers of other images are attacked.
    of_images.digest = "another"
    measures.attacked(study, cut_of(model), range(4), edits)
    assert Halves.count == 2 * asked
    assert list(first["image"]) == [0, 1, 2]
    margins = 4 * 0.5 * np.array([0.2, 0.4, 0.8]) / 24
    finest = (measures.LARGEST / measures.SMALLEST) ** (2.0**-measures.HALVINGS)
    ratio = first["norm"].to_numpy() / margins
    assert ((ratio >= 1 - 1e-5) & (ratio <= finest)).all()
    # The first image is edited for the second class, the second one for the first, the third for the first again.
    assert (first["edit"] != first["class"]).all()
    assert (first["norm_edited"] > 0).all()
