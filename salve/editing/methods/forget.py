# SPDX-License-Identifier: MIT
"""Forgetting by fine-tuning: away from the class's labels, and towards those of all other images (NegGrad+, SalUn)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from salve.backbones.cut import Cut
from salve.editing.fine_tuning import (
    FineTuning,
    Loss,
    batches_of,
    between,
    check_whole,
    cross_entropies,
    drawn,
    gradients,
    numbers_beside,
    numbers_of,
    train_images,
)
from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Change, Weights
from salve.editing.methods.directions import drawing
from salve.types import Images, UserError

#: What a network is taught of the class's images: ``ascent``, that their labels are wrong; ``random``, other labels.
Labels: TypeAlias = Literal["ascent", "random"]


@dataclass(frozen=True)
class Forget(FineTuning, Method):
    """Fine-tune on batches that are half of the target's train images and half of all others', ``θ + α (θ_ft − θ)``.

    The loss is ``CE(others) − w CE(target)`` for ``ascent`` (NegGrad+ with ``w = (1 − β)/β``, up to a factor), and
    ``CE(others) + w CE(target with random other labels)`` for ``random``. With ``random``, ``w = 1`` and
    ``saliency=0.5`` it is SalUn: only the half of all weights with the largest gradient of ``CE(target)`` may move.
    Ascent has no end: it takes the other classes down too, unless ``w`` or the learning rate is a tenth of the default.

    It costs a forward and a backward pass for ``steps × batch_size`` images, about three times as much as to classify
    as many; ``saliency`` adds as much for each train image of the target.

    Attributes:
        steps: of the optimiser. labels: see :data:`Labels`. weight: ``w``.
        saliency: share of the weights that may move; None lets all move. The others: see :class:`FineTuning`.
    """

    steps: int = 10
    labels: str = "random"
    weight: float = 1.0
    saliency: float | None = None

    source: ClassVar[str] = (
        "Kurmanji et al. 2023 (arXiv 2302.09880), NegGrad+; Fan et al. 2024 (arXiv 2310.12508), SalUn"
    )
    full_size: ClassVar[str] = "the weights are those after fine-tuning"
    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("steps", self.steps, 1)
        check_whole("batch_size", self.batch_size, 2)
        if self.labels not in get_args(Labels):
            raise UserError(f"labels={self.labels} is unknown; choose {' or '.join(get_args(Labels))}.")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight={self.weight:g} must be above 0.")
        if self.saliency is not None and not 0 < self.saliency <= 1:
            raise UserError(f"saliency={self.saliency:g} must be above 0 and at most 1, or null.")

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut, (images, known) = fitting.cut, train_images(fitting, "The edit method forget")
        own, others, generator = numbers_of(known, target), numbers_beside(known, target), drawing(fitting, target)
        numbers = drawn([own, others], self.steps * self.batch_size, generator)
        masks = None if self.saliency is None else self._masks(cut, batches_of(images, own, self.batch_size))
        end = self.tuned(cut, self._losses(fitting, target, numbers, generator), masks)
        fitting.uses(numbers if masks is None else torch.cat([numbers, own]))

        def at(alpha: float) -> Change:
            return Change(weights=lambda: between(cut, end, alpha))

        return FittedEdit(at)

    def _losses(
        self, fitting: Fitting, target: Target, numbers: Int[Tensor, " count"], generator: torch.Generator
    ) -> Iterator[Loss]:
        """The loss of each batch of the images that are drawn."""
        weight = self.weight if self.labels == "random" else -self.weight
        train, _ = train_images(fitting, "The edit method forget")
        for images, labels in batches_of(train, numbers, self.batch_size):
            taught, mine = labels.cpu(), torch.isin(labels.cpu(), torch.tensor(target.classes))
            if self.labels == "random":
                taught = torch.where(mine, _other_labels(target, fitting.classes, len(mine), generator), taught)
            here = images.device
            yield partial(_loss, fitting.cut.order.to(here), images, taught.to(here), mine.to(here), weight)

    def _masks(self, cut: Cut, batches: Iterator[tuple[Tensor, Tensor]]) -> Weights:
        """1 for the share of the weights with the largest gradient of the target's cross-entropy, 0 for the others."""
        net, total = self.copy_of(cut), Weights()
        for loss in cross_entropies(cut.order, batches):
            for name, gradient in gradients(net, loss).items():
                total[name] = total.get(name, 0) + gradient
        return salient(total, self.saliency or 1.0)


def _loss(
    order: Tensor, images: Images, labels: Int[Tensor, " N"], mine: Bool[Tensor, " N"], weight: float, net: nn.Module
) -> Float[Tensor, ""]:
    """``CE(others) + weight CE(target)``, each the mean over its half of the batch."""
    losses = F.cross_entropy(net(images)[:, order], labels, reduction="none")
    return losses[~mine].mean() + weight * losses[mine].mean()


def _other_labels(target: Target, classes: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Labels drawn evenly from the classes that are not the target's."""
    others = torch.tensor([label for label in range(classes) if label not in target.classes])
    return others[torch.randint(len(others), (count,), generator=generator)]


def salient(gradient: Weights, share: float) -> Weights:
    """1 for the share of all weights with the largest absolute gradient, counted over all tensors, 0 for the others."""
    sizes = torch.cat([tensor.abs().flatten() for tensor in gradient.values()])
    mask = torch.zeros_like(sizes)
    mask[sizes.topk(max(1, round(share * len(sizes)))).indices] = 1
    parts = mask.split([tensor.numel() for tensor in gradient.values()])
    return {name: part.view_as(gradient[name]) for name, part in zip(gradient, parts, strict=True)}
