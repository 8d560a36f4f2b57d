"""Measures against scikit-learn, torch and hand-made cases."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from salve.metrics import (
    BatchMean,
    FractionOfVarianceExplained,
    LatentUsage,
    PredictiveDrift,
    firing,
    fraction_of_variance_explained,
    kl_divergence,
    per_class_accuracy,
)


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
    assert firing(latents, activations, negligible=0.01).tolist() == [[False, True, False]]


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


def test_mean_over_batches_is_weighted_by_their_rows_and_shows_a_divergence() -> None:
    values = np.random.default_rng(0).normal(size=11)
    batches = np.split(values, [4, 4, 10])  # of 4, 0, 6 and 1 rows
    metric = BatchMean()
    for batch in batches:
        metric.update(torch.tensor(batch.mean() if len(batch) else np.nan), len(batch))
    assert float(metric.compute()) == pytest.approx(values.mean(), rel=1e-5)
    metric.update(torch.tensor(torch.nan), 3)
    assert torch.isnan(metric.compute())
