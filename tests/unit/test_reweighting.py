"""Deep feature reweighting against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from salve.editing.reweighting import halves_of, heads_of_halves, logistic_regression, reweighted_head


def drawn(per_group: int, seed: int, shortcut: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of which the first tells the class a little, and the second the attribute strongly."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(4).repeat_interleave(per_group)
    labels, value = groups // 2, groups % 2
    features = torch.randn(len(groups), 6, generator=generator)
    features[:, 0] += 2.0 * labels
    features[:, 1] += shortcut * value
    return 5 * features + 1, labels, groups


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    features, labels, groups = drawn(15, 0)
    labels = torch.where(groups == 3, 2, labels)  # three classes
    head = logistic_regression(features, labels, 3, penalty)
    peer = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-10, max_iter=5000).fit(features, labels)
    np.testing.assert_allclose(head(features.double()).softmax(dim=1), peer.predict_proba(features), atol=2e-4)


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels, _ = drawn(10, 0)
    assert (logistic_regression(features, labels, 3, 0.1)(features.double()).argmax(dim=1) < 2).all()


def test_the_head_is_trained_on_all_images_with_the_penalty_whose_worst_group_is_best() -> None:
    features, labels, groups = drawn(20, 1)
    found = {one: reweighted_head(features, labels, groups, 2, 0, (one,)) for one in (1e-3, 1e3)}
    both = reweighted_head(features, labels, groups, 2, 0, (1e3, 1e-3))
    # With so large a penalty nothing but the biases is left, and these are equal: one class is never right.
    torch.testing.assert_close(both.weight, found[1e-3].weight)
    scale = features.double().std(dim=0)
    scaled = (features.double() - features.double().mean(dim=0)) / scale
    expected = logistic_regression(scaled, labels, 2, 1e-3)
    torch.testing.assert_close(found[1e-3](features.double()), expected(scaled))


def logits_by_other_half(features: Tensor, labels: Tensor, groups: Tensor, objects: Tensor | None = None) -> Tensor:
    halves = heads_of_halves(features, labels, groups, 2, 0, objects)
    return halves.logits(features, halves.objects, reweighted_head(features, labels, groups, 2, 0, objects=objects))


def test_logits_of_halves_are_of_heads_that_have_not_seen_the_image() -> None:
    features, labels, groups = drawn(12, 2)
    noise = torch.randn(
        len(labels), 40, generator=torch.Generator().manual_seed(3)
    )  # tells nothing, and is learned by heart
    own = reweighted_head(noise, labels, groups, 2, 0)(noise.double()).argmax(dim=1) == labels
    others = logits_by_other_half(noise, labels, groups).argmax(dim=1) == labels
    assert own.double().mean() > others.double().mean() + 0.1
    assert abs(float(others.double().mean()) - 0.5) < 0.25
    assert (logits_by_other_half(features, labels, groups).argmax(dim=1) == labels).double().mean() > 0.7


def test_no_object_judges_itself() -> None:
    _, labels, groups = drawn(12, 2)
    noise = torch.randn(len(labels), 40, generator=torch.Generator().manual_seed(3))
    objects = labels * 100 + torch.arange(len(labels)) % 4  # four of each class, in both of its groups
    same_noise = noise[objects.unique(return_inverse=True)[1]]  # which tells an object, and nothing of others
    first = halves_of(groups, 0, objects)
    assert set(objects[first].tolist()).isdisjoint(objects[~first].tolist())
    assert [int(first[groups == g].sum()) for g in range(4)] == [6] * 4
    assert torch.equal(halves_of(groups, 0), halves_of(groups, 0, torch.arange(len(groups))))
    apart = logits_by_other_half(same_noise, labels, groups, objects).argmax(dim=1) == labels
    mixed = logits_by_other_half(same_noise, labels, groups).argmax(dim=1) == labels
    assert mixed.double().mean() > 0.9  # an image of the same object was learned by heart
    assert apart.double().mean() < 0.75


def test_one_image_of_each_group_makes_a_head_that_cannot_be_judged() -> None:
    features, labels, groups = drawn(1, 0)
    assert (reweighted_head(features, labels, groups, 2, 0)(features.double()).argmax(dim=1) == labels).any()
    assert not logits_by_other_half(features, labels, groups).any()


def test_other_images_of_an_object_are_judged_by_the_half_that_lacks_it_and_strangers_by_the_whole_head() -> None:
    features, labels, groups = drawn(12, 2)
    halves = heads_of_halves(features, labels, groups, 2, 0)
    head = reweighted_head(features, labels, groups, 2, 0)
    assert halves.fits is not None
    known = int(halves.first.nonzero()[0, 0]), int((~halves.first).nonzero()[0, 0])
    found = halves.logits(features[:3], torch.tensor([*known, len(labels)]), head)
    of_first, of_second = halves.fits
    wide = features[:3].double()
    expected = torch.stack([of_second(wide[:1])[0], of_first(wide[1:2])[0], head(wide[2:])[0]])
    torch.testing.assert_close(found, expected)
    own = (labels[halves.first], groups[halves.first])
    again = reweighted_head(features[halves.first], *own, 2, 0, objects=halves.objects[halves.first])
    torch.testing.assert_close(of_first.weight, again.weight)
