# SPDX-License-Identifier: MIT
"""Deep feature reweighting (DFR): a head that is trained anew, on few images of known groups."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from salve.backbones.tail import LinearTail
from salve.editing.recalibrate import group_accuracies
from salve.types import Labels

#: Penalties that are tried.
PENALTIES = (0.001, 0.01, 0.1, 1.0)
#: Steps of the optimiser, at most.
_STEPS = 500


def logistic_regression(features: Float[Tensor, "N M"], labels: Labels, classes: int, penalty: float) -> LinearTail:
    """Multinomial logistic regression: minimises ``mean_n(−log p(y_n)) + penalty · ‖W‖² / 2``, by L-BFGS.

    Args:
        features, labels: of the images. classes: ``C``. penalty: of the weights, above 0; biases are free.

    Returns:
        Weights and biases, float64.
    """
    wide, width = features.double(), features.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat.reshape(classes, width + 1)).requires_grad_()
        weight, bias = parameters[:, :width], parameters[:, width]
        value = F.cross_entropy(wide @ weight.T + bias, labels) + penalty * weight.square().sum() / 2
        (slope,) = torch.autograd.grad(value, parameters)
        return float(value.detach()), slope.numpy().ravel()

    start = np.zeros(classes * (width + 1))
    with torch.enable_grad():
        found = minimize(
            loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS, "ftol": 1e-13, "gtol": 1e-8}
        ).x
    parameters = torch.from_numpy(found.reshape(classes, width + 1))
    return LinearTail(parameters[:, :width], parameters[:, width])


def reweighted_head(
    features: Float[Tensor, "N M"],
    labels: Labels,
    groups: Int[Tensor, " N"],
    classes: int,
    seed: int,
    penalties: Sequence[float] = PENALTIES,
    objects: Int[Tensor, " N"] | None = None,
) -> LinearTail:
    """A head for the features of a network, trained on images of which all groups have equally many.

    Features are scaled to unit variance, which is folded back. The penalty is the one whose heads, each trained on one
    half of every group and measured on the other, have the best accuracy of the worst group, and then the best mean
    over groups. The last head is trained on all images. Source: Kirichenko et al. 2023 (arXiv 2204.02937), with an L2
    penalty in place of theirs, L1 (ours).

    Args:
        features, labels, groups: of the images. classes: ``C``. seed: of the halves. penalties: to choose from.
        objects: images of the same object are in the same half; None: every image has its own.

    Returns:
        Weights and biases, float64.
    """
    mean, spread = features.double().mean(dim=0), features.double().std(dim=0).clamp_min(1e-8)
    scaled = (features.double() - mean) / spread
    halves = halves_of(groups, seed, objects)
    best, chosen = (-1.0, -1.0), penalties[-1]
    for penalty in penalties if bool((~halves).any()) else ():
        found = []
        for half in (halves, ~halves):
            head = logistic_regression(scaled[half], labels[half], classes, penalty)
            right = head(scaled[~half]).argmax(dim=1) == labels[~half]
            of_groups = group_accuracies(right, groups[~half], int(groups.max()) + 1)
            found.append(of_groups[~of_groups.isnan()])
        score = (float(torch.stack([one.min() for one in found]).mean()), float(torch.cat(found).mean()))
        best, chosen = max((best, chosen), (score, penalty), key=lambda one: one[0])
    head = logistic_regression(scaled, labels, classes, chosen)
    weight = head.weight / spread
    return LinearTail(weight, head.bias - weight @ mean)


class Halves(NamedTuple):
    """What was fitted to each of two halves of some images, so that it can be judged on images that it has not seen.

    Attributes:
        first: ``[N]``, which images are in the first half. objects: ``[N]``, of the images; none is in both halves.
        fits: of the first half and of the second; None where no group has two images.
    """

    first: Bool[Tensor, " N"]
    objects: Int[Tensor, " N"]
    fits: tuple[LinearTail, LinearTail] | None

    def logits(
        self, features: Float[Tensor, "n M"], objects: Int[Tensor, " n"], head: LinearTail
    ) -> Float[Tensor, "n C"]:
        """The logits of images, float64, by a head that was not trained on their object.

        Args:
            features: of the images. objects: of the images.
            head: trained on all N images; for the images whose object is in neither half. Where there are no halves,
                the logits of the others are 0.
        """
        found = head(features.double())
        for half, other in ((self.first, 1), (~self.first, 0)):
            mine = torch.isin(objects, self.objects[half])
            found[mine] = 0.0 if self.fits is None else self.fits[other](features[mine].double())
        return found


def heads_of_halves(
    features: Float[Tensor, "N M"],
    labels: Labels,
    groups: Int[Tensor, " N"],
    classes: int,
    seed: int,
    objects: Int[Tensor, " N"] | None = None,
) -> Halves:
    """The heads of :func:`reweighted_head` for each half of every group.

    A head is right on the images that it was trained on; by the head of the other half it can be compared with other
    edits.
    """
    objects = torch.arange(len(labels)) if objects is None else objects
    first = halves_of(groups, seed, objects)
    if bool(first.all()):
        return Halves(first, objects, None)
    fits = [
        reweighted_head(features[half], labels[half], groups[half], classes, seed, objects=objects[half])
        for half in (first, ~first)
    ]
    return Halves(first, objects, (fits[0], fits[1]))


def halves_of(groups: Int[Tensor, " N"], seed: int, objects: Int[Tensor, " N"] | None = None) -> Tensor:
    """Which images are in the first of two halves of every group, drawn by the seed; no object is in both.

    Objects are drawn one after the other until half of the group is in the first half; those of a later group may have
    been drawn with an earlier one.
    """
    objects = torch.arange(len(groups)) if objects is None else objects
    first, drawn = torch.zeros(len(groups), dtype=torch.bool), set[int]()
    draw = torch.Generator().manual_seed(seed)
    for group in groups.unique().tolist():
        own = (groups == group).nonzero()[:, 0]
        for one in objects[own[torch.randperm(len(own), generator=draw)]].tolist():
            if one not in drawn and 2 * int(first[own].sum()) < len(own):
                first[objects == one] = True
            drawn.add(one)
    return first
