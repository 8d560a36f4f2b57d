# SPDX-License-Identifier: MIT
"""Relearning: does a class that was edited away come back after a few steps of fine-tuning on all classes?"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from salve.backbones.cut import Cut
from salve.editing.fine_tuning import FineTuning, batches_of, check_whole, drawn, train_images
from salve.editing.methods.base import Fitting, Target
from salve.editing.methods.change import Weights, changed_state
from salve.editing.methods.directions import drawing
from salve.types import Images, UserError

#: Gives the test images with their labels, in batches, as often as it is called.
TestImages = Callable[[], Iterable[tuple[Tensor, Tensor]]]
#: The logits that a network gives for images, or for their activations.
Logits = Callable[[Tensor, nn.Module], Tensor]

BEHIND = FineTuning(learning_rate=1e-3, where="behind")


@torch.no_grad()
def relearned(
    fitting: Fitting,
    target: Target,
    weights: Weights,
    test: TestImages,
    steps: Sequence[int] = (10, 100),
    tuning: FineTuning = BEHIND,
) -> dict[int, float]:
    """The accuracy of an edited class after each of several numbers of steps of fine-tuning.

    The edited network is trained by cross-entropy on batches that hold all classes alike. It costs a forward and a
    backward pass for ``max(steps) × batch_size`` images, and a forward pass over the class's test images before the
    training and after each number of steps. Where only the head is trained and edited, stored activations take the
    place of the train images.

    Args:
        fitting: the network that was edited, as it was before, and its train images. Its seed orders the images.
        target: what was edited. weights: tensors of the ``state_dict`` that the edit changes, with their new values.
        test: images that no choice was made on; only those of the target are run.
        steps: numbers of optimiser steps.
        tuning: how it is trained. By default what lies behind the site is.

    Returns:
        By number of steps, and for 0, the share of the target's test images that are classified correctly.

    Raises:
        UserError: a number of steps is negative, or there are no train images, or no test images of the target.
        Diverged: the training diverged.
    """
    for number in steps:
        check_whole("steps", number, 0)
    cut, (images, labels) = fitting.cut, train_images(fitting, "Relearning")
    pools = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    numbers = drawn(pools, max(steps, default=0) * tuning.batch_size, drawing(fitting, target))
    net = tuning.copy_of(cut)
    net.load_state_dict(changed_state(cut.model, weights))

    if _head_alone(fitting, tuning, weights):
        logits = partial(_logits_of_head, cut)
        batches: Iterable[tuple[Tensor, Tensor]] = (
            (fitting.rows[some], labels[some]) for some in numbers.split(tuning.batch_size)
        )
        read = [(cut.read(some)[:, 0], kinds) for some, kinds in _own(test, target)]
    else:
        logits, read = partial(_logits_of_network, cut), None
        batches = batches_of(images, numbers, tuning.batch_size)

    def accuracy() -> float:
        right = [
            logits(some, net).argmax(dim=1).cpu() == kinds.cpu()
            for some, kinds in (_own(test, target) if read is None else read)
        ]
        if not right:
            raise UserError(f"{target.name} has no test images, so that nobody can say whether it comes back.")
        return float(torch.cat(right).double().mean())

    found = {0: accuracy()}
    losses = (partial(_cross_entropy, logits, some, kinds) for some, kinds in batches)
    for number, _ in enumerate(tuning.train(net, losses), 1):
        if number in steps:
            found[number] = accuracy()
    return found


def _head_alone(fitting: Fitting, tuning: FineTuning, weights: Weights) -> bool:
    """Whether only the head is trained and edited, and the activations of all train images are at hand."""
    (reader, *_), labels = fitting.cut.site.readers, fitting.image_labels
    return (
        fitting.cut.linear is not None
        and tuning.where == "behind"
        and weights.keys() <= {reader.weight, reader.bias}
        and labels is not None
        and torch.equal(fitting.labels, labels)
    )


def _logits_of_head(cut: Cut, rows: Float[Tensor, "N M"], net: nn.Module) -> Float[Tensor, "N C"]:
    (reader,), parameters = cut.site.readers, dict(net.named_parameters())
    weight, bias = parameters[reader.weight], parameters.get(reader.bias)
    return F.linear(rows.to(weight), weight.flatten(1), bias)[:, cut.order.to(weight.device)]


def _logits_of_network(cut: Cut, images: Images, net: nn.Module) -> Float[Tensor, "N C"]:
    logits: Tensor = net(images)
    return logits[:, cut.order.to(logits.device)]


def _cross_entropy(logits: Logits, some: Tensor, labels: Int[Tensor, " N"], net: nn.Module) -> Float[Tensor, ""]:
    found = logits(some, net)
    return F.cross_entropy(found, labels.to(found.device))


def _own(test: TestImages, target: Target) -> Iterator[tuple[Images, Int[Tensor, " n"]]]:
    """The target's test images."""
    for images, labels in test():
        mine = torch.isin(labels.cpu(), torch.tensor(target.classes))
        if bool(mine.any()):
            yield images[mine.to(images.device)], labels[mine.to(labels.device)]
