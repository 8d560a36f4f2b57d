"""Measures against scikit-learn, scipy, torch, plain loops and hand-made cases."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, r2_score
from sklearn.metrics.pairwise import cosine_similarity, paired_distances
from torch import Tensor
from torchmetrics import Metric

from salve.metrics import (
    ActivationHistogram,
    BatchMean,
    Downstream,
    FractionOfVarianceExplained,
    LatentUsage,
    PredictiveDrift,
    ReconstructionCosine,
    downstream,
    firing,
    fraction_of_variance_explained,
    kl_divergence,
    match_columns,
    mean_max_cosine,
    per_class_accuracy,
    planted_recovery,
    random_stability,
    reconstruction_cosine,
    recovered_share,
    relative_magnitude_histogram,
    stability,
    usage_fractions,
)
from salve.types import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fve_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    # Means that differ between dimensions are what a single global mean would get wrong.
    x = torch.randn(50, 6, generator=generator).double() + 10 * torch.arange(6)
    x_hat = x + 0.3 * torch.randn(50, 6, generator=generator).double()
    expected = r2_score(x.numpy(), x_hat.numpy(), multioutput="variance_weighted")
    found = fraction_of_variance_explained(x, x_hat)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert found.dtype == torch.float64
    streaming = FractionOfVarianceExplained(6)
    for part in range(0, 50, 7):
        streaming.update(x[part : part + 7], x_hat[part : part + 7])
    assert float(streaming.compute()) == pytest.approx(expected, rel=1e-9)


def test_fve_of_the_mean_is_zero_and_of_the_truth_one() -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double() + 5
    assert float(fraction_of_variance_explained(x, x.mean(0).expand_as(x))) == pytest.approx(0, abs=1e-12)
    assert float(fraction_of_variance_explained(x, x)) == 1
    assert float(fraction_of_variance_explained(x, -x)) < 0


def test_fve_without_variance_follows_scikit_learn() -> None:
    constant = torch.ones(4, 2)
    assert float(fraction_of_variance_explained(constant, constant)) == 1
    assert float(fraction_of_variance_explained(constant, constant + 1)) == 0


def test_firing_counts_linear_latents_by_what_they_add() -> None:
    activations = torch.tensor([[3.0, 4.0]])  # norm 5
    latents = torch.tensor([[0.04, -0.06, 0.0]])
    assert firing(latents, activations).tolist() == [[True, True, False]]
    assert firing(latents, activations, firing_threshold=0.01).tolist() == [[False, True, False]]


def test_latent_usage_by_hand() -> None:
    usage = LatentUsage(3)
    usage.update(torch.tensor([[1.0, 0.0, 0.0], [2.0, -1.0, 0.0]]), torch.ones(2, 4))
    usage.update(torch.tensor([[0.0, 0.0, 0.0]]), torch.ones(1, 4))
    found = usage.compute()
    assert float(found["l0"]) == 1.0
    assert float(found["l1"]) == pytest.approx(4 / 3)
    assert float(found["dead_fraction"]) == pytest.approx(1 / 3)
    assert found["frequency"].tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_kl_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 9, 5, generator=generator).double().unbind()
    expected = torch.nn.functional.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    drift = PredictiveDrift(3)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])
    drift.update(p[:4], q[:4], labels[:4])
    drift.update(p[4:], q[4:], labels[4:])
    found = drift.compute()
    assert found[:2].tolist() == pytest.approx([float(expected[:3].mean()), float(expected[3:].mean())])
    assert math.isnan(found[2])  # a class without images


def test_per_class_accuracy_of_a_class_without_images_is_nan() -> None:
    found = per_class_accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3).tolist()
    assert found[:2] == [0.5, 1.0]
    assert math.isnan(found[2])


def test_an_accuracy_is_the_number_that_its_share_is() -> None:
    predictions = torch.tensor([0] * 2 + [1] * 38)
    assert per_class_accuracy(predictions, torch.zeros(40, dtype=torch.long), 2)[0] == 0.05


def test_mean_over_batches_is_weighted_by_their_rows_and_shows_a_divergence() -> None:
    values = np.random.default_rng(0).normal(size=11)
    batches = np.split(values, [4, 4, 10])  # of 4, 0, 6 and 1 rows
    metric = BatchMean()
    for batch in batches:
        metric.update(torch.tensor(batch.mean() if len(batch) else np.nan), len(batch))
    assert float(metric.compute()) == pytest.approx(values.mean(), rel=1e-5)
    metric.update(torch.tensor(torch.nan), 3)
    assert torch.isnan(metric.compute())


# -- usage


def test_usage_fractions_by_hand() -> None:
    frequency = torch.tensor([0.0, 0.0005, 0.001, 0.1, 0.5, 0.51, 1.0, 0.0], dtype=torch.float64)
    found = {name: float(value) for name, value in usage_fractions(frequency).items()}
    assert found == {"dead_fraction": 2 / 8, "almost_dead_fraction": 1 / 8, "dense_fraction": 2 / 8}
    strict = usage_fractions(frequency, almost_dead=0.2, dense=0.2)
    assert [float(value) for value in strict.values()] == [2 / 8, 3 / 8, 3 / 8]


def test_usage_over_no_images_is_unknown() -> None:
    usage = LatentUsage(3)
    usage.update(torch.zeros(0, 3), torch.zeros(0, 2))
    assert all(bool(value.isnan().all()) for value in usage.compute().values())


@pytest.mark.parametrize(("almost_dead", "dense"), [(-0.1, 0.5), (0.6, 0.5), (0.1, 1.1)])
def test_usage_thresholds_that_are_no_shares_are_refused(almost_dead: float, dense: float) -> None:
    with pytest.raises(UserError, match="0 ≤ almost_dead ≤ dense ≤ 1"):
        LatentUsage(3, almost_dead=almost_dead, dense=dense)


def test_histogram_equals_numpy() -> None:
    activations, latents = normal(200, 4), normal(200, 3, seed=1) * torch.tensor([1.0, 1e-3, 30.0])
    latents[normal(200, 3, seed=2) > 0.5] = 0.0
    latents[:, 2].relu_()
    edges = np.logspace(-3, 1, 13)
    ratios = latents.abs().numpy() / np.linalg.norm(activations.numpy(), axis=1, keepdims=True)
    found = relative_magnitude_histogram(latents, activations, torch.from_numpy(edges))
    for latent in range(3):
        ratio = ratios[:, latent][ratios[:, latent] > 0]
        expected = np.histogram(ratio, bins=[0, *edges, np.inf])[0]
        assert found[latent].tolist() == expected.tolist()
    streaming = ActivationHistogram(3, low=1e-3, high=10, bins=12)
    for rows in range(0, 200, 60):
        streaming.update(latents[rows : rows + 60], activations[rows : rows + 60])
    result = streaming.compute()
    np.testing.assert_allclose(result["edges"], edges, rtol=1e-12)
    assert torch.equal(result["counts"], found)


def test_histogram_counts_what_fires_and_edges_upwards() -> None:
    activations = torch.tensor([[2.0], [2.0], [0.0]])
    latents = torch.tensor([[2.0, 0.02], [-20.0, 0.2], [0.5, 0.0]])
    edges = torch.tensor([0.1, 1.0, 10.0])
    # A value on an edge lies above it; a latent that fires on an activation of zero is beyond every edge.
    assert relative_magnitude_histogram(latents, activations, edges).tolist() == [[0, 0, 1, 2], [1, 1, 0, 0]]
    found = relative_magnitude_histogram(latents, activations, edges, firing_threshold=0.05)
    assert found.tolist() == [[0, 0, 1, 2], [0, 1, 0, 0]]


@pytest.mark.parametrize("wrong", [{"low": 0.0}, {"low": 20.0}, {"bins": 0}])
def test_histogram_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="0 < low < high and bins ≥ 1"):
        ActivationHistogram(3, **wrong)


# -- reconstructions


def test_cosine_equals_scikit_learn() -> None:
    x, x_hat = normal(30, 5), normal(30, 5, seed=1)
    x_hat[3] = 0.0
    expected = 1 - paired_distances(x, x_hat, metric="cosine")
    expected[3] = 0.0  # scikit-learn's distance takes a row of zeros for something else
    np.testing.assert_allclose(reconstruction_cosine(x, x_hat), expected, atol=1e-12)
    metric = ReconstructionCosine()
    for rows in (slice(0, 4), slice(4, 4), slice(4, 30)):
        metric.update(x[rows], x_hat[rows])
    assert float(metric.compute()) == pytest.approx(expected.mean(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 5, 2051])
def test_measures_of_many_rows_have_the_bits_of_plain_formulas(dtype: torch.dtype, rows: int) -> None:
    """They spare memory; neither their sums nor what they are given may change by that."""
    given = normal(rows, 7).to(dtype), normal(rows, 7, seed=1).to(dtype)
    (x, x_hat), (a, b) = (one.clone() for one in given), (one.double() for one in given)
    fve, cosine, usage = FractionOfVarianceExplained(7), ReconstructionCosine(), LatentUsage(7)
    fve.update(x, x_hat)
    cosine.update(x, x_hat)
    usage.update(x, x_hat)
    assert torch.equal(fve.total, a.sum(dim=0))
    assert torch.equal(fve.squares, a.square().sum(dim=0))
    assert torch.equal(fve.residual, (a - b).square().sum())
    assert torch.equal(cosine.total, reconstruction_cosine(a, b).sum())
    assert torch.equal(usage.l1, a.abs().sum())
    assert torch.equal(x, given[0])
    assert torch.equal(x_hat, given[1])


def test_recovered_share_by_hand() -> None:
    value, original, ablated = torch.tensor(
        [[0.9, 1.0, 0.1], [0.05, 0.9, 0.1], [1.0, 0.9, 0.1], [0.9, 0.9, 0.9], [0.5, 0.9, 0.9], [2.0, 0.0, 8.0]]
    ).T
    found = recovered_share(value, original, ablated).tolist()
    assert found[:3] == pytest.approx([8 / 9, -1 / 16, 9 / 8])
    assert math.isnan(found[3])  # nothing to recover, whatever is reached
    assert math.isnan(found[4])
    assert found[5] == 0.75  # where less is better


def test_downstream_equals_scikit_learn_and_scipy() -> None:
    labels = torch.arange(40).clamp_max(23) % 4  # of one class more than of the others
    original = normal(40, 4) + 4 * torch.nn.functional.one_hot(labels, 4)
    reconstructed = original + 1.5 * normal(40, 4, seed=1)
    zero, mean = normal(1, 4, seed=2), torch.bincount(labels).log()[None].double()
    found = downstream(labels, original, reconstructed, zero, mean)

    def accuracy(logits: Tensor) -> float:
        return float(accuracy_score(labels, logits.expand(40, 4).argmax(1)))

    def kl(logits: Tensor) -> float:
        p, q = softmax(original.numpy(), 1), softmax(logits.expand(40, 4).numpy(), 1)
        return float(rel_entr(p, q).sum(1).mean())

    a, r, z, m = (accuracy(logits) for logits in (original, reconstructed, zero, mean))
    kl_r, kl_z, kl_m = (kl(logits) for logits in (reconstructed, zero, mean))
    expected = {
        "original_accuracy": a,
        "downstream_accuracy": r,
        "zero_accuracy": z,
        "mean_accuracy": m,
        "accuracy_recovered_from_zero": (r - z) / (a - z),
        "accuracy_recovered_from_mean": (r - m) / (a - m),
        "downstream_kl": kl_r,
        "zero_kl": kl_z,
        "mean_kl": kl_m,
        "kl_recovered_from_zero": 1 - kl_r / kl_z,
        "kl_recovered_from_mean": 1 - kl_r / kl_m,
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-9)
    assert 0 < found["accuracy_recovered_from_zero"] < 1  # the case is no corner
    assert z != m
    streaming = Downstream()
    for rows in (slice(0, 7), slice(7, 7), slice(7, 40)):
        part = original[rows]
        streaming.update(labels[rows], part, reconstructed[rows], zero, mean.expand_as(part))
    assert {name: float(value) for name, value in streaming.compute().items()} == pytest.approx(expected, rel=1e-9)


def test_downstream_at_its_anchors() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    original = 5 * torch.nn.functional.one_hot(labels, 3).double()
    zero, mean = torch.zeros(1, 3).double(), torch.tensor([[1.0, 0.0, 0.0]]).double()
    kept = downstream(labels, original, original, zero, mean)
    assert kept["downstream_kl"] == 0
    assert {float(value) for name, value in kept.items() if "recovered" in name} == {1.0}
    lost = downstream(labels, original, zero.expand(4, 3), zero, mean)
    assert (float(lost["accuracy_recovered_from_zero"]), float(lost["kl_recovered_from_zero"])) == (0.0, 0.0)
    assert float(lost["kl_recovered_from_mean"]) < 0  # worse than the mean
    # A classifier that does not look at the site loses nothing by any ablation.
    blind = downstream(labels, original, original, original, original)
    assert all(bool(value.isnan()) for name, value in blind.items() if "recovered" in name)


# -- dictionaries


def brute_force(cosine: np.ndarray) -> float:
    """The largest sum over one-to-one pairings, by trying them all."""
    if cosine.shape[0] > cosine.shape[1]:
        cosine = cosine.T
    rows = range(cosine.shape[0])
    return max(
        sum(cosine[row, column] for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(cosine.shape[1]), len(rows))
    )


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("d", "e"), [(5, 5), (3, 6), (6, 3), (1, 1)])
def test_matching_is_the_best_of_all(d: int, e: int, signed: bool) -> None:
    for seed in range(5):
        first, second = 3 * normal(4, d, seed=seed), normal(4, e, seed=100 + seed)
        cosine = cosine_similarity(first.T, second.T)
        matching = match_columns(first, second, signed)
        assert float(matching.cosines.sum()) == pytest.approx(brute_force(abs(cosine) if signed else cosine))
        assert len(set(matching.first.tolist())) == len(set(matching.second.tolist())) == min(d, e)
        pairs = cosine[matching.first, matching.second]
        np.testing.assert_allclose(matching.cosines * matching.signs, pairs, rtol=1e-9)
        best = (abs(cosine) if signed else cosine).max(axis=1).mean()
        assert float(mean_max_cosine(first, second, signed)) == pytest.approx(best)


def test_a_permuted_and_flipped_dictionary_is_the_same_to_signed_latents() -> None:
    first, order = normal(8, 6), torch.tensor([3, 0, 5, 1, 4, 2])
    flips = torch.tensor([1.0, -1, 1, -1, -1, 1]).double()
    second = 2 * (first * flips)[:, order]
    matching = match_columns(first, second, signed=True)
    assert order[matching.second].tolist() == list(range(6))
    assert matching.signs.tolist() == flips.tolist()
    found = {name: float(value) for name, value in stability(first, second, signed=True).items()}
    assert found == pytest.approx({"matched_cosine": 1, "shared_fraction": 1, "flipped_fraction": 0.5, "max_cosine": 1})
    assert float(stability(first, second)["matched_cosine"]) < 0.9
    assert float(stability(first, second)["flipped_fraction"]) == 0


def test_two_columns_may_not_share_a_partner_but_have_the_same_nearest() -> None:
    first = torch.tensor([[1.0, 1.0], [0.0, 0.1]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = stability(first, second)
    assert float(found["max_cosine"]) > 0.99
    assert float(found["shared_fraction"]) == 0.5
    assert float(found["matched_cosine"]) == pytest.approx((1 + 0.1 / math.sqrt(1.01)) / 2)


@pytest.mark.parametrize("width", [1, 2, 5, 64])
def test_chance_of_single_columns_is_the_mean_cosine_of_two_directions(width: int) -> None:
    """``E|cos| = Γ(M/2) / (√π Γ((M+1)/2))`` for two directions drawn evenly from the sphere in M dimensions."""
    expected = math.gamma(width / 2) / (math.sqrt(math.pi) * math.gamma((width + 1) / 2))
    found = random_stability(width, 1, 1, signed=True, pairs=400)
    assert float(found["matched_cosine"]) == pytest.approx(expected, abs=0.06)  # four standard errors at most
    assert float(found["flipped_fraction"]) == pytest.approx(0.5, abs=0.1)
    assert float(random_stability(width, 1, 1, pairs=400)["matched_cosine"]) == pytest.approx(0, abs=0.2)


def test_chance_grows_with_the_choice_of_partners() -> None:
    few, many = (float(random_stability(16, 8, size)["matched_cosine"]) for size in (8, 64))
    assert 0.2 < few < many < 0.8
    # As many draws as it takes, by the same rule: the mean over matched pairs.
    draws = [normal(16, 64, seed=seed) for seed in range(125)]
    cosines = [match_columns(normal(16, 8, seed=500 + i), draw).cosines.mean() for i, draw in enumerate(draws)]
    assert many == pytest.approx(float(torch.stack(cosines).mean()), abs=0.01)


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (0, 0)])
def test_a_dictionary_without_columns_has_no_stability(first: int, second: int) -> None:
    for found in (stability(normal(4, first), normal(4, second)), random_stability(4, first, second)):
        assert all(bool(value.isnan()) for value in found.values())


def test_planted_features_are_found_or_lost() -> None:
    truth = torch.eye(4).double()
    angle = math.acos(0.8)
    # e_0 exact and long, e_1 at cosine 0.8, e_2 negative, e_3 missing; and one column that is nothing.
    decoder = torch.zeros(4, 4).double()
    decoder[0, 2], decoder[2, 1] = 7.0, -1.0
    decoder[1, 3], decoder[0, 3] = math.cos(angle), math.sin(angle)
    assert float(planted_recovery(decoder, truth)["mcc"]) == pytest.approx((1 + 0.8) / 4)
    assert float(planted_recovery(decoder, truth)["recovered_fraction"]) == 1 / 4
    found = planted_recovery(decoder, truth, signed=True, threshold=0.75)
    assert float(found["mcc"]) == pytest.approx((1 + 0.8 + 1) / 4)
    assert float(found["recovered_fraction"]) == 3 / 4
    # Fewer columns than features: what has no column is lost.
    assert float(planted_recovery(truth[:, :1], truth)["mcc"]) == 1 / 4


def test_dictionaries_that_cannot_be_compared_are_refused(unchecked_shapes: None) -> None:
    with pytest.raises(UserError, match="widths 3 and 4"):
        match_columns(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(UserError, match="second dictionary holds values that are not finite"):
        stability(torch.ones(3, 2), torch.full((3, 2), torch.nan))


# -- several ranks


Update = Callable[[Any, slice], None]


def over_ranks(make: Callable[[], Metric], update: Update, parts: list[slice]) -> Any:
    """What the first of several ranks computes, each of which saw a part, by torchmetrics' own reduction."""
    ranks = [make() for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        update(rank, part)
    leader = ranks[0]

    def gather(state: Tensor, group: Any) -> list[Tensor]:
        own = {name: getattr(leader, name) for name in leader.metric_state}
        name = next(name for name, value in own.items() if state is (value[0] if isinstance(value, list) else value))
        states = [getattr(rank, name) for rank in ranks]
        return [torch.cat(state) if isinstance(state, list) else state for state in states]

    leader.dist_sync_fn, leader.distributed_available_fn = gather, lambda: True
    return leader.compute()


LABELS = torch.arange(31) % 3
ACTIVATIONS, RECONSTRUCTIONS, LATENTS = normal(31, 4), normal(31, 4, seed=1), normal(31, 6, seed=2).relu()
LOGITS, OTHERS = normal(31, 3, seed=3), normal(31, 3, seed=4)


@pytest.mark.parametrize(
    ("make", "update"),
    [
        (lambda: LatentUsage(6), lambda metric, rows: metric.update(LATENTS[rows], ACTIVATIONS[rows])),
        (lambda: ActivationHistogram(6), lambda metric, rows: metric.update(LATENTS[rows], ACTIVATIONS[rows])),
        (ReconstructionCosine, lambda metric, rows: metric.update(ACTIVATIONS[rows], RECONSTRUCTIONS[rows])),
        (
            lambda: FractionOfVarianceExplained(4),
            lambda metric, rows: metric.update(ACTIVATIONS[rows], RECONSTRUCTIONS[rows]),
        ),
        (
            Downstream,
            lambda metric, rows: metric.update(LABELS[rows], LOGITS[rows], OTHERS[rows], OTHERS[:1], OTHERS[1:2]),
        ),
        (lambda: PredictiveDrift(3), lambda metric, rows: metric.update(LOGITS[rows], OTHERS[rows], LABELS[rows])),
    ],
    ids=["usage", "histogram", "cosine", "fve", "downstream", "drift"],
)
def test_ranks_with_unequal_parts_measure_what_one_does(make: Callable[[], Metric], update: Update) -> None:
    one = over_ranks(make, update, [slice(0, 31)])
    several = over_ranks(make, update, [slice(0, 20), slice(20, 20), slice(20, 31)])
    torch.testing.assert_close(several, one, rtol=1e-12, atol=0)
