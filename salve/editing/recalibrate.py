# SPDX-License-Identifier: MIT
"""Recalibration: set the biases of some classes anew, on images that are not used for reporting.

A class that counted on a shortcut has a bias that is too low without it, so that an edit which takes the shortcut away
takes the class with it. A bias is a weight: a recalibration is as permanent as an edit. See docs/method.md, *Repair*.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from salve.backbones.sites import head_site
from salve.editing.methods.change import Weights
from salve.types import Labels, UserError

#: Rounds over the classes, at most: the bias of each depends on those of the others.
_ROUNDS = 20
#: The largest shift of a bias, in logits: the likelihood alone would shift that of a class without images to −∞.
_MOST = 30.0
#: Numbers in one array of what groups get right.
_AT_ONCE = 1 << 22

#: ``shift(logits, labels, groups, label)``: how far to shift the bias of one class.
Shift = Callable[[Tensor, Tensor, Tensor, int], float]


def group_weights(groups: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Weights with which all groups that have images count alike; they add up to 1.

    Args:
        groups: of each image, such as its class; −1 leaves an image out.
    """
    known = groups >= 0
    counts = torch.bincount(groups[known])
    weights = torch.zeros(len(groups), dtype=torch.float64)
    weights[known] = 1 / counts[groups[known]].double() / (counts > 0).sum()
    return weights


def group_accuracies(right: Bool[Tensor, " N"], groups: Int[Tensor, " N"], count: int) -> Float[Tensor, " G"]:
    """The accuracy of each group, float64; NaN for one without images.

    Args:
        right: which images are right. groups: of each image; −1 leaves it out. count: ``G``.
    """
    known = groups >= 0
    return torch.bincount(groups[known], right[known].double(), count) / torch.bincount(groups[known], minlength=count)


def likeliest_shift(logits: Float[Tensor, "N C"], labels: Labels, groups: Int[Tensor, " N"], label: int) -> float:
    """The shift ``δ`` of one class's bias with the largest likelihood, all groups counted alike.

    The likelihood is concave in ``δ``, and largest where the mean probability of the class is its share of the images:
    ``Σ_n w_n p_k(δ) = Σ_n w_n 1[y_n = k]``. This is found by bisection.

    Args:
        logits, labels: of the images. groups: see :func:`group_weights`. label: ``k``.
    """
    weights = group_weights(groups)
    wide = logits.double()
    gap = wide[:, label] - wide.index_fill(1, torch.tensor([label]), -torch.inf).logsumexp(dim=1)
    share = float(weights[labels == label].sum())
    low, high = -_MOST, _MOST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(weights @ torch.sigmoid(gap + middle)) < share else (low, middle)
    return (low + high) / 2


def fairest_shift(logits: Float[Tensor, "N C"], labels: Labels, groups: Int[Tensor, " N"], label: int) -> float:
    """The shift of one class's bias with the best accuracy of the worst group; of equal ones that with the best mean
    over groups, and then the smallest.

    An image is taken for the class from some shift on, so that every group's accuracy is a step function, and the best
    shift is found exactly: halfway between two steps.

    Args:
        logits, labels: of the images. groups: of each image; −1 leaves it out. label: the class.
    """
    known = groups >= 0
    wide, groups = logits[known].double(), groups[known]
    others = wide.index_fill(1, torch.tensor([label]), -torch.inf).max(dim=1)
    steps, order = (others.values - wide[:, label]).sort()  # from here on, an image is taken for the class
    as_other = (others.indices == labels[known])[order].double()
    gain, groups = (labels[known] == label)[order].double() - as_other, groups[order]
    count = torch.bincount(groups)
    right, worst, mean = torch.bincount(groups, as_other, len(count)), [], []
    first = torch.zeros(1, len(count), dtype=torch.float64)  # no image is taken for the class
    blocks = torch.arange(len(steps)).split(max(1, _AT_ONCE // len(count)))
    for change in (first, *(nn.functional.one_hot(groups[at], len(count)) * gain[at, None] for at in blocks)):
        after = right + change.cumsum(dim=0)  # [steps, G]
        accuracy = after[:, count > 0] / count[count > 0]
        worst.append(accuracy.amin(dim=1))
        mean.append(accuracy.mean(dim=1))
        right = after[-1]
    low, high = torch.cat([steps[:1] - 2, steps]), torch.cat([steps, steps[-1:] + 2])
    shift = torch.where((low < 0) & (high > 0), 0.0, (low + high) / 2)
    best = low < high  # between equal steps there is nothing
    for values in (torch.cat(worst), torch.cat(mean), -shift.abs()):
        best = best & (values >= values[best].max() - 1e-9)
    return float(shift[best][0])


def recalibrated(
    logits: Float[Tensor, "N C"],
    labels: Labels,
    groups: Int[Tensor, " N"],
    classes: Sequence[int],
    shift: Shift = likeliest_shift,
) -> Float[Tensor, " C"]:
    """Shifts of the biases of some classes, one after the other until none moves; 0 for all other classes.

    Args:
        logits, labels: of the images. groups: of each image; −1 leaves it out. classes: those whose biases are set.
        shift: :func:`likeliest_shift` or :func:`fairest_shift`.
    """
    found = torch.zeros(logits.shape[1], dtype=torch.float64)
    for _ in range(_ROUNDS if len(classes) > 1 else 1):
        moved = 0.0
        for label in classes:
            step = shift(logits.double() + found, labels, groups, label)
            found[label] += step
            moved = max(moved, abs(step))
        if moved < 1e-3:
            break
    return found


def with_shifted_bias(model: nn.Module, order: Tensor, shifts: Float[Tensor, " C"], weights: Weights) -> Weights:
    """Weights of the ``state_dict`` with which the logits are also shifted.

    Args:
        model: the network. order: ``[outputs]``, of its outputs, those of the data's classes first.
        shifts: of the first outputs in that order. weights: new values of other tensors, perhaps also of the bias.

    Raises:
        UserError: the head has no bias.
    """
    (reader,) = head_site(model).readers
    state = model.state_dict()
    if reader.bias not in state:
        raise UserError(f"The head {reader.path} has no bias, so that none can be set anew.")
    bias = weights.get(reader.bias, state[reader.bias]).clone()
    units = order[: len(shifts)].to(bias.device)
    bias[units] = (bias[units].double() + shifts.to(bias.device)).to(bias)
    return {**weights, reader.bias: bias}
