"""Class means, kinds and selection by hand; purity and concepts against plain loops and libraries."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor
from torchmetrics import Metric

from salve.features import (
    ClassMeans,
    ClassPurity,
    ConceptAUROC,
    Monosemanticity,
    class_effects,
    class_entropy,
    class_means,
    concept_auroc,
    concept_detectors,
    effect_scores,
    kinds,
    margins,
    monosemanticity,
    select_latents,
    shares,
    top_purity,
)
from salve.types import UserError
from tests.unit.test_metrics import Update, normal, over_ranks


def test_class_means_by_hand_and_empty_class() -> None:
    latents = torch.tensor([[1.0, -2.0], [3.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    found = class_means(latents, torch.tensor([0, 0, 2]), 3)
    assert found.dtype == torch.float64
    assert found[0].tolist() == [2.0, -1.0]
    assert all(math.isnan(value) for value in found[1].tolist())
    assert found[2].tolist() == [5.0, 5.0]


def test_class_means_over_batches_equal_those_of_all_rows() -> None:
    metric = ClassMeans(6, 5)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 45), slice(45, 60)):
        metric.update(LATENTS[rows].float(), LABELS[rows])
    found = metric.compute()
    expected = [LATENTS[k == LABELS].numpy().mean(0) for k in range(4)]
    np.testing.assert_allclose(found[:4], expected, rtol=1e-6, atol=1e-7)
    assert found[4].isnan().all()


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


def test_a_latent_that_never_fires_is_not_chosen() -> None:
    """Its margin is 0, which is larger than that of every latent on which another class leads."""
    means = torch.tensor([[5.0, 0.0, 2.0, 0.1], [4.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert margins(means)[1].argmax() == 2
    assert margins(means[:, :2])[1].argmax() == 1
    assert select_latents(means[:, :2]).tolist() == [0, 0, -1]
    assert select_latents(means[:, :2], "largest").tolist() == [0, 0, -1]
    # Signed latents have small means without ever firing.
    fires = torch.tensor([True, False, True, False])
    assert select_latents(means[[0]] * torch.tensor([0.0, 1, 0, 1]), fires=fires).tolist() == [-1]
    assert select_latents(torch.tensor([[0.0, 0.0, 0.0, 0.1], [4.0, 0.0, 3.0, 0.0]]), fires=fires).tolist() == [-1, 0]


def test_effects_and_scores_equal_plain_loops() -> None:
    attributions, decoder = normal(4, 5, seed=3), normal(5, 6, seed=4)
    attributions[2] = math.nan  # a class without images
    effects = class_effects(attributions, decoder)
    scores = effect_scores(effects)
    for k in (0, 1, 3):
        for latent in range(6):
            found = [
                sum(float(attributions[i, j]) * abs(float(decoder[j, latent])) for j in range(5)) for i in range(4)
            ]
            others = [abs(found[i]) for i in (0, 1, 3) if i != k]
            assert float(effects[k, latent]) == pytest.approx(found[k], rel=1e-12)
            assert float(scores[k, latent]) == pytest.approx(found[k] - sum(others) / 2, rel=1e-12)
    assert scores[2].isnan().all()
    assert torch.equal(effect_scores(effects[:1]), effects[:1])  # one class has no others


def test_an_effect_is_the_first_order_change_of_the_mean_logit() -> None:
    """Finite differences of a head behind ReLU features, image by image, gated by a latent's column."""
    weight, activations, decoder = normal(3, 5, seed=1), normal(40, 5, seed=2).abs(), normal(5, 4, seed=3)
    labels, step = torch.arange(40) % 3, 1e-6
    attributions = weight * class_means(activations, labels, 3)
    effects = class_effects(attributions, decoder)
    for latent in range(4):
        gate = 1 - step * decoder[:, latent].abs()
        change = (activations @ weight.T - (activations * gate) @ weight.T) / step
        for k in range(3):
            assert float(effects[k, latent]) == pytest.approx(float(change[labels == k, k].mean()), rel=1e-6)


def test_effect_finds_a_latent_that_larger_ones_hide() -> None:
    """The head reads class 0 from channel 0 only; latents 0 and 1 are large for the class and write elsewhere."""
    weight = torch.tensor([[3.0, 0.0, 0.1], [0.0, 3.0, 0.1]])
    activations = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.2, 9.0], [0.0, 1.0, 9.0], [0.2, 1.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    decoder = torch.eye(3)[:, [2, 2, 0, 1, 0]]  # the last latent writes to channel 0 too, and never fires
    means = torch.tensor([[9.0, 8.0, 0.5, 0.0, 0.0], [6.0, 2.0, 0.1, 0.5, 0.0], [math.nan] * 5])
    effects = class_effects(torch.cat([weight * class_means(activations, labels, 2), means[2:, :3]]), decoder)
    fires = torch.tensor([True, True, True, True, False])
    assert select_latents(means, "largest", fires).tolist() == [0, 0, -1]
    assert select_latents(means, "margin", fires).tolist() == [1, 3, -1]
    assert select_latents(means, "effect", fires, effects).tolist() == [2, 3, -1]
    means[:2, 4] = 1e-3
    assert select_latents(means, "effect", fires, effects).tolist() == [2, 3, -1]
    with pytest.raises(UserError, match="effects"):
        select_latents(means, "effect", fires)


# -- purity

#: 60 images of four classes of different size, and a fifth without any. The latents are signed; the fourth fires for
#: class 2 only, the fifth is dead and the sixth fires for a single image.
LABELS = torch.tensor([0] * 30 + [1] * 15 + [2] * 10 + [3] * 5)[
    torch.from_numpy(np.random.default_rng(0).permutation(60))
]
LATENTS = normal(60, 6) * (normal(60, 6, seed=1) > 0.3)
LATENTS[:, 3] = (LABELS == 2) * LATENTS[:, 3].abs().clamp_min(0.1)
LATENTS[:, 4] = 0.0
LATENTS[:, 5] = 0.0
LATENTS[17, 5] = -2.0
ACTIVATIONS = normal(60, 4, seed=2)


def purity_of(latent: np.ndarray, labels: np.ndarray, top: int) -> float:
    strongest = [image for image in np.argsort(-abs(latent))[:top] if latent[image] != 0]
    counts = Counter(labels[strongest].tolist())
    return counts.most_common(1)[0][1] / len(strongest) if strongest else math.nan


def entropy_of(latent: np.ndarray, labels: np.ndarray) -> float:
    mass = [abs(latent[labels == label]).mean() for label in np.unique(labels)]
    return float(scipy_entropy(mass)) if sum(mass) else math.nan


@pytest.mark.parametrize("top", [1, 5, 10, 100])
def test_purity_and_entropy_equal_plain_loops(top: int) -> None:
    latents, labels = LATENTS.numpy(), LABELS.numpy()
    purity = [purity_of(latents[:, latent], labels, top) for latent in range(6)]
    entropy = [entropy_of(latents[:, latent], labels) for latent in range(6)]
    assert purity[3] == purity[5] == 1
    assert math.isnan(purity[4])
    assert math.isnan(entropy[4])
    np.testing.assert_allclose(top_purity(LATENTS, LABELS, 5, top), purity)
    np.testing.assert_allclose(class_entropy(LATENTS, LABELS, 5), entropy, atol=1e-12)
    metric = ClassPurity(6, 5, top)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 45), slice(45, 60)):
        metric.update(LATENTS[rows], ACTIVATIONS[rows], LABELS[rows])
    found = metric.compute()
    np.testing.assert_allclose(found["purity"], purity)
    np.testing.assert_allclose(found["entropy"], entropy, atol=1e-12)
    assert found["purity_images"].tolist() == np.minimum((latents != 0).sum(0), top).tolist()


def test_entropy_does_not_depend_on_the_size_of_the_classes() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert class_entropy(torch.ones(100, 1), labels, 3).tolist() == pytest.approx([math.log(2)])
    assert class_entropy((labels == 1)[:, None].float(), labels, 3).tolist() == [0.0]


def test_purity_leaves_out_what_hardly_fires() -> None:
    activations = torch.full((4, 1), 10.0)
    latents = torch.tensor([[5.0], [0.05], [-0.05], [4.0]])
    labels = torch.tensor([0, 1, 1, 0])
    for firing_threshold, purity, images in ((0.0, 0.5, 4), (0.01, 1.0, 2)):
        metric = ClassPurity(1, 2, firing_threshold=firing_threshold)
        metric.update(latents, activations, labels)
        found = metric.compute()
        assert (float(found["purity"]), int(found["purity_images"])) == (purity, images)


def test_purity_of_no_image_is_refused() -> None:
    with pytest.raises(UserError, match="top=0 must be at least 1"):
        ClassPurity(3, 2, top=0)


# -- monosemanticity


def test_monosemanticity_equals_the_sum_over_pairs() -> None:
    embeddings = normal(60, 7, seed=3) + 1
    embeddings[LABELS == 2] = 3 * embeddings[LABELS == 2][:1]  # all images of a class look the same
    latents = LATENTS.clone()
    latents[:, 0] += 5  # never zero: the smallest value is what counts as none
    cosine, expected = cosine_similarity(embeddings), []
    for weight in latents.abs().numpy().T:
        weights = weight - weight.min()
        pairs = np.outer(weights, weights)
        np.fill_diagonal(pairs, 0)
        expected.append((pairs * cosine).sum() / pairs.sum() if pairs.sum() else math.nan)
    found = monosemanticity(latents, embeddings)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found[3] == pytest.approx(1)
    assert found[4:].isnan().all()  # a dead latent, and one that fires for a single image: no pairs
    metric = Monosemanticity(6, 7)
    for rows in (slice(0, 0), slice(0, 50), slice(50, 60)):
        metric.update(latents[rows], embeddings[rows])
    np.testing.assert_allclose(metric.compute(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "update"),
    [
        (lambda: ClassMeans(6, 5), lambda metric, rows: metric.update(LATENTS[rows], LABELS[rows])),
        (lambda: ClassPurity(6, 5), lambda metric, rows: metric.update(LATENTS[rows], ACTIVATIONS[rows], LABELS[rows])),
        (lambda: Monosemanticity(6, 4), lambda metric, rows: metric.update(LATENTS[rows], ACTIVATIONS[rows])),
    ],
    ids=["means", "purity", "monosemanticity"],
)
def test_ranks_with_unequal_parts_measure_what_one_does(make: Callable[[], Metric], update: Update) -> None:
    one = over_ranks(make, update, [slice(0, 60)])
    several = over_ranks(make, update, [slice(0, 8), slice(8, 8), slice(8, 60)])
    torch.testing.assert_close(several, one, rtol=1e-9, atol=1e-12, equal_nan=True)


# -- concepts


def concepts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Latents ``[count, 4]`` and the presence of four concepts: latent 2 shows concept 0, latent 1 hides concept 1."""
    generator = torch.Generator().manual_seed(seed)
    presence = torch.rand(count, 4, generator=generator) < 0.3
    presence[:, 2], presence[:, 3] = False, True
    latents = torch.randn(count, 4, generator=generator).relu()  # many ties, at zero
    latents[:, 2] += 2 * presence[:, 0]
    latents[:, 1] -= 2 * presence[:, 1]
    return latents, presence


def test_auroc_equals_scikit_learn() -> None:
    latents, presence = concepts(80, seed=0)
    found = concept_auroc(latents, presence)
    for concept in (0, 1):
        expected = [roc_auc_score(presence[:, concept], latents[:, latent]) for latent in range(4)]
        np.testing.assert_allclose(found[concept], expected, rtol=1e-12)
    assert found[2:].isnan().all()  # shown by no image, and by all


def test_auroc_over_batches_and_ranks_is_of_all_images() -> None:
    latents, presence = concepts(90, seed=2)
    expected = concept_auroc(latents, presence)
    metric = ConceptAUROC(4, 4)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan().all()
    metric.reset()
    for rows in (slice(0, 50), slice(50, 90)):
        metric.update(latents[rows], presence[rows])
    torch.testing.assert_close(metric.compute(), expected, equal_nan=True)
    parts = [slice(0, 20), slice(20, 20), slice(20, 90)]
    found = over_ranks(lambda: ConceptAUROC(4, 4), lambda one, rows: one.update(latents[rows], presence[rows]), parts)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_auroc_of_more_latents_than_are_ranked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, presence = concepts(80, seed=0)
    expected = concept_auroc(latents, presence)
    monkeypatch.setattr("salve.features.concepts._AT_ONCE", 3)
    torch.testing.assert_close(concept_auroc(latents, presence), expected, equal_nan=True)


def test_detectors_are_chosen_on_one_split_and_judged_on_the_other() -> None:
    (latents, presence), (other_latents, other_presence) = concepts(80, seed=0), concepts(50, seed=1)
    other_presence[:25, 2] = True  # does not help a concept for which no latent could be chosen
    found = concept_detectors(latents, presence, other_latents, other_presence, signed=True)
    assert found.latents.tolist() == [2, 1, -1, -1]
    assert found.signs.tolist()[:2] == [1, -1]
    expected = [
        roc_auc_score(other_presence[:, 0], other_latents[:, 2]),
        roc_auc_score(other_presence[:, 1], -other_latents[:, 1]),
    ]
    np.testing.assert_allclose(found.auroc[:2], expected, rtol=1e-12)
    assert min(expected) > 0.8
    assert found.auroc[2:].isnan().all()
    # Latents that are not signed are not turned round.
    unsigned = concept_detectors(latents, presence, other_latents, other_presence)
    assert unsigned.latents[1] != 1
    assert unsigned.signs.tolist() == [1, 1, 1, 1]


def test_the_best_of_many_random_latents_is_chance_when_held_out() -> None:
    presence = normal(200, 20, seed=2) > 0
    latents, held_out = normal(200, 400), normal(200, 400, seed=1)
    # An AUROC on 100 + 100 images strays from 0.5 by 0.04: the best of 400 by three times that.
    assert float(concept_auroc(latents, presence).max(dim=1).values.mean()) > 0.6
    found = concept_detectors(latents, presence, held_out, presence).auroc
    assert float(found.mean()) == pytest.approx(0.5, abs=0.04)
