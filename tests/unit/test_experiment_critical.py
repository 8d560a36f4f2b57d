"""Critical strengths compared: why the approximation errs, the numerical solution, tables, the edited network."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from experiments.claims import load_claims
from experiments.salve2025.critical import EXPERIMENT, analyse
from experiments.salve2025.critical.measures import (
    SCAN,
    agreement,
    closing,
    concordance,
    edited_outputs,
    given_way,
    median_of,
    numerical,
    rank_correlation,
    spread,
)
from experiments.testbeds import TESTBEDS
from salve.backbones import Site
from salve.backbones.site import Reader
from salve.backbones.tail import LinearTail
from salve.diagnosis import critical_strength
from salve.editing import gates
from salve.stages.diagnose import strengths

ALPHAS = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def a_head(signed: bool, images: int = 60, channels: int = 24, classes: int = 3) -> tuple[Tensor, ...]:
    """Weight, bias, activations and labels, where every image is classified rightly, and a contribution vector."""
    weight, bias = torch.randn(classes, channels), 0.1 * torch.randn(classes)
    activations = torch.randn(images, channels) if signed else torch.rand(images, channels)
    labels = (activations @ weight.T + bias).argmax(dim=1)
    return weight, bias, activations, labels, nn.functional.normalize(torch.randn(channels), dim=0)


@pytest.mark.parametrize("signed", [False, True])
def test_lift_and_drop_are_the_error_of_the_approximation(signed: bool) -> None:
    weight, bias, activations, labels, vector = (t.double() if t.is_floating_point() else t for t in a_head(signed))
    given = (LinearTail(weight, bias), activations, vector, labels)
    exact, linear = critical_strength(*given, "logit", "exact"), critical_strength(*given, "logit", "linear")
    crossing = exact.isfinite() & (exact > 0)
    assert (vector.abs().max() * exact[crossing] > 1).sum() >= 5  # or the law would be tried on no closed channel
    found = [closing(activations[labels == k], weight[k], vector.abs(), exact[labels == k]) for k in range(3)]
    by_class = torch.cat([one.lift - one.drop for one in found])
    order = torch.cat([(labels == k).nonzero()[:, 0] for k in range(3)])
    known = by_class.isfinite()
    assert torch.equal(order[known].sort().values, (crossing & linear.isfinite()).nonzero()[:, 0])
    torch.testing.assert_close(by_class[known], ((exact - linear) / exact)[order[known]])
    # One by one, as the sums are written.
    size = vector.abs().tolist()
    for k, one in enumerate(found):
        for place, n in enumerate((labels == k).nonzero()[:, 0].tolist()):
            if not (crossing[n] and linear[n].isfinite()):
                continue
            at, terms = float(exact[n]), [float(w) * float(a) for w, a in zip(weight[k], activations[n], strict=True)]
            shut = [j for j, s in enumerate(size) if at * s > 1]
            fall = at * sum(t * s for t, s in zip(terms, size, strict=True))
            push = {j: terms[j] * (at * size[j] - 1) / fall for j in shut}
            assert float(one.lift[place]) == pytest.approx(sum(p for p in push.values() if p > 0))
            assert float(one.drop[place]) == pytest.approx(-sum(p for p in push.values() if p < 0))
            turned = sum(p for j, p in push.items() if p > 0 and activations[n, j] < 0)
            assert float(one.negative[place]) == pytest.approx(turned)
            share = sum(abs(terms[j]) for j in shut) / sum(abs(t) for t in terms)
            assert float(one.closed[place]) == pytest.approx(share)
            assert float(one.reach[place]) == pytest.approx(at * max(size))


def test_without_a_crossing_there_is_no_reason() -> None:
    found = closing(torch.ones(3, 2), torch.ones(2), torch.tensor([0.6, 0.8]), torch.tensor([0.0, torch.inf, 1.0]))
    assert [bool(one) for one in found.reach.isnan()] == [True, True, False]
    assert all(bool(values[:2].isnan().all()) for values in found)
    # The approximation never falls where the terms that close are negative: it has no error, but the channels close.
    rising = closing(torch.tensor([[-1.0, 0.1]]), torch.ones(2), torch.tensor([0.8, 0.6]), torch.tensor([1.5]))
    assert rising.lift.isnan()
    assert rising.closed == pytest.approx(1 / 1.1)


@pytest.mark.parametrize("criterion", ["logit", "flip"])
@pytest.mark.parametrize("signed", [False, True])
def test_bisection_finds_the_exact_strengths(criterion: Any, signed: bool) -> None:
    weight, bias, activations, labels, vector = a_head(signed)
    exact = critical_strength(
        LinearTail(weight.double(), bias.double()), activations.double(), vector.double(), labels, criterion
    )
    # Between breakpoints the margin is concave: what holds at both holds between them, and no crossing is missed.
    scan = torch.cat([SCAN, 1 / vector.double().abs()]).sort().values
    found = numerical(LinearTail(weight, bias), activations, vector, labels, criterion, scan)
    assert exact.isfinite().any()
    torch.testing.assert_close(found, torch.where(exact > 1e4, torch.inf, exact), rtol=1e-9, atol=1e-12)


def test_bisection_in_cases_with_known_answers() -> None:
    # y = a (1 − α) + b over one channel: at 0 for α = 1 + b / a, which is past 1, so never, for b > 0.
    weight, vector, labels = torch.tensor([[1.0]]), torch.tensor([1.0]), torch.zeros(3, dtype=torch.long)
    activations = torch.tensor([[1.0], [2.0], [0.5]])
    found = numerical(LinearTail(weight, torch.tensor([-0.5])), activations, vector, labels, "logit")
    assert found.tolist() == pytest.approx([0.5, 0.75, 0.0])
    assert numerical(LinearTail(weight, torch.tensor([0.5])), activations, vector, labels, "logit").isinf().all()


def test_agreement_counts_what_it_says() -> None:
    inf = float("inf")
    exact = [1.0, 2.0, 4.0, 10.0, inf, inf, 5.0, 8.0]
    found = [1.0, 1.99, 4.1, 12.0, inf, 7.0, inf, 4.0]
    one = agreement(found, exact)
    assert one.n == 8
    assert one.bound == 5 / 8  # 4.1, 12 and the infinite one are above
    assert one.within_1 == 3 / 8
    assert one.within_5 == 4 / 8
    assert (one.infinite, one.exact_infinite) == (2 / 8, 2 / 8)
    assert one.median == pytest.approx(0.0)  # of −0.5, −0.005, 0, 0.025, 0.2
    assert (one.low, one.high) == pytest.approx((-0.401, 0.165))
    largest = [1e9 if np.isinf(x) else x for x in found], [1e9 if np.isinf(x) else x for x in exact]
    assert one.rank == pytest.approx(stats.spearmanr(*largest).statistic)
    assert agreement([1 + 1e-9], [1.0]).bound == 1  # rounding breaks no bound
    assert all(np.isnan(value) for value in agreement([], [])[1:])


def test_ranks_without_an_order_have_no_correlation() -> None:
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert np.isnan(rank_correlation([1], [1]))
    rows = np.array([[1.0, 2, 3, 4], [2.0, 1, 3, 4], [4.0, 3, 2, 1]])
    pairs = [stats.spearmanr(rows[a], rows[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    assert concordance(rows) == pytest.approx(np.mean(pairs))
    assert np.isnan(concordance(rows[:1]))


def test_distribution_and_median_count_infinity_as_a_value() -> None:
    values = [3.0, 1.0, float("inf"), 1.0]
    assert given_way(values, [0, 1, 2, 3, 100]).tolist() == [0, 0.5, 0.5, 0.75, 0.75]
    assert median_of(values) == 1.0
    assert median_of([2.0, float("inf"), float("inf")]) == float("inf")
    assert np.isnan(median_of([]))


def test_images_are_picked_over_the_whole_range() -> None:
    values = [float("inf"), 5.0, 0.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    assert [values[k] for k in spread(values, 3)] == [2.0, 4.0, 6.0]
    assert [values[k] for k in spread(values, 9)] == [1, 2, 3, 4, 5, 6]
    assert spread([0.0, float("inf")], 3) == []


class Network(nn.Module):
    """Rows of pixels to activations, and a head."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], len(weight))
        self.head.weight.data, self.head.bias.data = weight, bias

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


def test_the_network_is_edited_for_a_pass_and_left_as_it_was() -> None:
    weight, bias, activations, _, vector = a_head(signed=True)
    network = Network(weight.clone(), bias.clone()).requires_grad_(False)
    gate = gates(vector, torch.tensor([0.0, 2.0, 7.0]))
    site = Site("last", (Reader("head.weight"),), 24)
    found = edited_outputs(network, site, activations[0].view(3, 4, 2), gate)
    expected = torch.stack([(weight * one) @ activations[0] + bias for one in gate])
    torch.testing.assert_close(found, expected)
    assert torch.equal(network.head.weight, weight)


CLASSES = ["church", "gas pump", "tench"]


def _table(table: pd.DataFrame, *_: str) -> pd.DataFrame:
    return table


def a_study(signed: bool, seeds: int, without: str = "") -> Any:
    """Runs of SAEs on a random head, as stage ``diagnose`` would leave them."""
    weight, bias, activations, labels, _ = a_head(signed, images=90)
    network = Network(weight, bias).requires_grad_(False)
    images = [(row.view(3, 4, 2), int(k)) for row, k in zip(activations, labels, strict=True)]
    job = SimpleNamespace(
        cut=lambda _: SimpleNamespace(model=network, site=Site("last", (Reader("head.weight"),), 24)),
        data=SimpleNamespace(dataset={"test": images}.__getitem__),
        device=torch.device("cpu"),
    )
    runs = []
    for seed in range(seeds):
        decoder = nn.functional.normalize(torch.randn(24, 3), dim=0)
        latents = [np.nan if name == without else float(k) for k, name in enumerate(CLASSES)]
        tables = []
        for k, name in enumerate(CLASSES):
            own = (labels == k).nonzero()[:, 0]
            if name != without and len(own):
                rows = strengths(LinearTail(weight, bias), activations[own], decoder[:, k], labels[own], ALPHAS)
                tables.append(rows.assign(image=own.tolist(), latent=k, **{"class": name}))
        runs.append(
            SimpleNamespace(
                seed=seed,
                flat_settings={"edit.scale": "unit", "edit.channels": "all", "edit.alpha": ALPHAS},
                selected=pd.DataFrame({"latent": latents, "sign": 1.0}, index=CLASSES),
                sae=SimpleNamespace(decoder=decoder),
                table=partial(_table, pd.concat(tables)),
                artifact=lambda _: None,
            )
        )
    test = SimpleNamespace(activations=activations, labels=labels)
    return SimpleNamespace(
        testbed=TESTBEDS["scenes"],
        classes=CLASSES,
        runs=tuple(runs),
        test=test,
        tail=LinearTail(weight, bias),
        context=job,
    )


@pytest.mark.parametrize("signed", [False, True])
def test_what_is_found_agrees_with_the_network(signed: bool) -> None:
    study = a_study(signed, seeds=2)
    found = analyse([study])
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() == {claim for claim in load_claims() if claim.startswith("critical.")}
    assert values["critical.empirical"] == 1
    shares = found.tables["shares"]
    # Who has not yet given way at α is classified rightly at α, and only who comes back makes a difference.
    assert (shares["predicted"] <= shares["flip_exact"] + 1e-12).all()
    weight, bias = study.tail.weight, study.tail.bias
    for _, row in shares[shares["alpha"] > 1].iterrows():
        k = CLASSES.index(row["class"])
        own = (study.test.labels == k).nonzero()[:, 0]
        gate = (1 - row["alpha"] * study.runs[row["seed"]].sae.decoder[:, k].abs()).clamp_min(0)
        right = ((study.test.activations[own] * gate) @ weight.T + bias).argmax(dim=1) == k
        assert row["predicted"] == pytest.approx(1 - right.double().mean().item())
    table = found.tables["images"]
    one = table[table["image"] == 0].iloc[0]
    run, k = study.runs[0], CLASSES.index(one["class"])
    margin = _margins(study, run.sae.decoder[:, k], 0)
    if np.isfinite(one["flip_exact"]):
        assert margin(one["flip_exact"] * 0.999) > 0 >= margin(one["flip_exact"] * 1.001)


def _margins(study: Any, vector: Tensor, image: int) -> Callable[[float], float]:
    """The edited head's margin of an image, by α."""
    weight, bias, label = study.tail.weight, study.tail.bias, int(study.test.labels[image])

    def margin(alpha: float) -> float:
        gate = [max(0.0, 1 - alpha * abs(float(c))) for c in vector]
        logits = [
            float(b)
            + sum(float(w) * float(a) * s for w, a, s in zip(row, study.test.activations[image], gate, strict=True))
            for row, b in zip(weight, bias, strict=True)
        ]
        return logits[label] - max(value for k, value in enumerate(logits) if k != label)

    return margin


@pytest.mark.slow
def test_one_sae_and_a_class_without_a_latent_will_do() -> None:
    found = analyse([a_study(signed=False, seeds=1, without="tench"), a_study(signed=True, seeds=1)])
    assert "tench" not in found.tables["classes"]["class"].iloc[:2].tolist()
    assert "nan" not in found.paragraph
    assert set(found.pictures) == {"distributions-scenes", "approximation", "logit_flip"}


def test_a_claim_is_the_mean_over_saes() -> None:
    study = a_study(signed=True, seeds=3)
    found = analyse([study])
    value = next(one.value for one in found.measured if one.claim == "critical.lower_bound")
    by_hand = []
    for run in study.runs:
        rows = run.table("diagnose", "images.csv")
        rows = rows[rows["correct"] & (rows["logit_exact"] > 0)]
        by_hand.append(
            np.mean([x <= y * (1 + 1e-6) for x, y in zip(rows["logit_linear"], rows["logit_exact"], strict=True)])
        )
    assert value == pytest.approx(np.mean(by_hand))
    assert EXPERIMENT.name == "critical"
