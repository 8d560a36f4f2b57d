# SPDX-License-Identifier: MIT
"""TCAV: does the logit of a class grow along the direction in which activations tell a concept from other images?"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from salve.types import Labels, UserError

#: Share of the mean variance of a channel that is added to all of them, so that few images suffice.
RIDGE = 0.1


class ConceptTest(NamedTuple):
    """Whether the scores along a concept's vectors differ from those along random ones.

    Attributes:
        t: Welch's statistic; ±inf where neither kind varies and they differ. p: of the two-sided test; NaN for fewer
            than two draws of either kind.
    """

    t: float
    p: float


def concept_vector(concept: Float[Tensor, "n M"], others: Float[Tensor, "m M"]) -> Float[Tensor, " M"]:
    """The normal of a linear classifier that tells a concept's activations from those of other images; it points
    towards the concept.

        v ∝ (Σ + ρ tr(Σ)/M · I)⁻¹ (mean of the concept − mean of the others)

    with the covariance ``Σ`` within both, and ρ = :data:`RIDGE`: the direction of a ridge regression on the label.

    Args:
        concept: ``[n, M]``. others: ``[m, M]``.

    Returns:
        ``[M]`` float64, of unit length; zeros if the means are equal.

    Raises:
        UserError: either has no row.

    Source: Kim et al. 2018; their classifier is trained by gradient descent.
    """
    if not len(concept) or not len(others):
        raise UserError(f"Activations {list(concept.shape)} and {list(others.shape)} must both have at least one row.")
    rows = [one.double() - one.double().mean(dim=0) for one in (concept, others)]
    covariance = sum(one.T @ one for one in rows) / (len(concept) + len(others))
    assert isinstance(covariance, Tensor)
    scale = RIDGE * covariance.diagonal().mean()
    eye = torch.eye(concept.shape[1], dtype=torch.float64, device=concept.device)
    gap = concept.double().mean(dim=0) - others.double().mean(dim=0)
    # Without any variance, each class is one point and the gap is the normal.
    found = torch.linalg.solve(covariance + scale * eye, gap) if scale > 0 else gap
    norm = found.norm()
    return found / norm if norm > 0 else found


def tcav_scores(
    gradients: Float[Tensor, "N M"], labels: Labels, vectors: Float[Tensor, "T M"], classes: int
) -> Float[Tensor, "C T"]:
    """The share of a class's images whose own logit grows along a vector.

    Args:
        gradients: ``[N, M]``, of each image's class logit by its activation; at a map, summed over positions.
        labels: ``[N]``. vectors: ``[T, M]``. classes: ``C``.

    Returns:
        ``[C, T]`` float64 in 0..1; NaN for a class without images.

    Source: Kim et al. 2018, *Interpretability beyond feature attribution*.
    """
    grows = (gradients.double() @ vectors.double().T > 0).double()  # [N, T]
    total = torch.zeros(classes, len(vectors), dtype=torch.float64, device=grows.device)
    return total.index_add(0, labels, grows) / labels.bincount(minlength=classes)[:, None]


def concept_test(scores: Float[Tensor, " T"], random: Float[Tensor, " R"]) -> ConceptTest:
    """Welch's two-sided t-test of scores along a concept's vectors, one for each draw of counter-images, against scores
    along random vectors, which tell random images from others."""
    if len(scores) < 2 or len(random) < 2:
        return ConceptTest(float("nan"), float("nan"))
    if scores.var() + random.var() <= 0:
        apart = float(scores.mean() - random.mean())
        return ConceptTest(float("inf") * apart, 0.0) if apart else ConceptTest(0.0, 1.0)
    # From moments, since SciPy warns of samples in which all values are equal.
    moments = [(float(one.mean()), float(one.std()), len(one)) for one in (scores.double(), random.double())]
    found = stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False)
    return ConceptTest(float(found.statistic), float(found.pvalue))
