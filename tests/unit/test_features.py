"""Class means, kinds and the choice of a class's latent, on cases worked out by hand."""

import math

import pytest
import torch

from salve.features import class_means, kinds, margins, select_latents, shares


def test_class_means_by_hand_and_empty_class() -> None:
    latents = torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    found = class_means(latents, torch.tensor([0, 0, 2]), 3)
    assert found.dtype == torch.float64
    assert found[0].tolist() == [2.0, -1.0]
    assert all(math.isnan(value) for value in found[1].tolist())
    assert found[2].tolist() == [5.0, 5.0]


def test_shares_ignore_sign_dead_latents_and_empty_classes() -> None:
    means = torch.tensor([[3.0, 0.0, -1.0], [-1.0, 0.0, 1.0], [math.nan] * 3])
    assert shares(means).tolist() == [[0.75, 0.0, 0.5], [0.25, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_kinds_are_the_definitions() -> None:
    means = torch.tensor(
        [
            # owned, shared by two at τ, shared at τ/2, diffuse, dead, negative and owned
            [0.6, 0.5, 0.30, 0.2, 0.0, -0.9],
            [0.3, 0.5, 0.30, 0.2, 0.0, 0.05],
            [0.1, 0.0, 0.20, 0.2, 0.0, 0.05],
            [0.0, 0.0, 0.10, 0.2, 0.0, 0.0],
            [0.0, 0.0, 0.10, 0.2, 0.0, 0.0],
        ]
    )
    expected = ["class-defining", "cross-class", "cross-class", "diffuse", "dead", "class-defining"]
    assert kinds(means, 0.5) == expected


def test_margins_equal_the_definition() -> None:
    means = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    means[1, 3] = means[0, 3] = 9.0  # a tie for the lead
    found = margins(means)
    for k in range(5):
        for latent in range(7):
            rivals = [abs(float(means[other, latent])) for other in range(5) if other != k]
            assert float(found[k, latent]) == pytest.approx(abs(float(means[k, latent])) - max(rivals), abs=1e-6)


def test_selection_differs_where_a_latent_is_shared() -> None:
    means = torch.tensor([[5.0, 2.0, 0.0], [4.9, 0.0, -3.0], [math.nan] * 3])
    assert select_latents(means, "largest").tolist() == [0, 0, -1]
    assert select_latents(means, "margin").tolist() == [1, 2, -1]
    assert select_latents(means[:1], "margin").tolist() == [0]
