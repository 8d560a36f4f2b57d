# SPDX-License-Identifier: MIT
"""A sample of a split's images, run through a changed network in the cheapest way that there is."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from salve.artifacts import Artifact
from salve.backbones.cut import Cut
from salve.editing.methods import Fitting
from salve.editing.methods.base import changed_head, head_weights
from salve.editing.methods.change import Change
from salve.sae import SAE
from salve.stages.context import StageContext
from salve.stages.targets import balanced
from salve.stages.through_tail import HELD_BYTES, Tails
from salve.types import Split


def fitting_of(context: StageContext, cut: Cut, activations: Artifact, sae: SAE | None, seed: int) -> Fitting:
    """What edits of a network are fitted on: the train split, with the activations that were captured."""
    train, data = context.activations(activations, "train"), context.data

    def images(numbers: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, labels in data.loader("train", indices=numbers):
            yield context.on_device(batch), labels

    rows, labels = torch.as_tensor(train.rows[:]), torch.as_tensor(data.labels("train"))
    return Fitting(cut, rows, train.row_labels, len(context.classes), sae, labels, images, seed)


class Sample:
    """Equally many images of each class, always the same ones.

    At the last site a change of activations, or of the head's weights, is one product with cached activations. At other
    sites images run through what the change reaches. All other changes run whole images through the network.

    Args:
        context: of the run. cut: the network. activations: captured at its site. split: the split.
        per_class: images of each class, at most. room: bytes that may be held of the images' tails.

    Attributes:
        split: its name. labels: ``[n]``, of the images, class by class.
    """

    def __init__(
        self,
        context: StageContext,
        cut: Cut,
        activations: Artifact | None,
        split: Split,
        per_class: int,
        room: int = HELD_BYTES,
    ) -> None:
        self._context, self._cut, self.split = context, cut, split
        every = torch.as_tensor(context.data.labels(split))
        numbers = torch.tensor(balanced(every, per_class))
        #: By class, the numbers of its images.
        self._of = {label: numbers[every[numbers] == label].tolist() for label in every[numbers].unique().tolist()}
        self.labels = every[[number for own in self._of.values() for number in own]]
        self._rows: dict[int, Tensor] = {}
        self._tails: dict[int, Tails] = {}
        #: By class and batch, images that ran through the whole network, as far as there is room.
        self._held: dict[tuple[int, int], Tensor] = {}
        self._room = room
        if cut.linear is not None:
            assert activations is not None, "activations of the last site are captured"
            rows = context.activations(activations, split).activations
            self._rows = {label: rows[torch.tensor(own)] for label, own in self._of.items()}
        else:
            share = room // max(1, len(self._of))
            self._tails = {label: Tails(context, cut, split, own, share) for label, own in self._of.items()}

    @torch.no_grad()
    def logits(self, change: Change | None = None, classes: Sequence[int] | None = None) -> Float[Tensor, "n C"]:
        """The logits of a changed network, in float32; without a change, of the network as it is.

        Args:
            change: see :class:`Change`. classes: labels of the classes whose images run; None for all.
        """
        chosen = self.chosen(classes)
        if not chosen:
            return torch.empty(0, len(self._cut.order))
        edit = None if change is None else change.activations
        weights = change.weights() if change is not None and change.weights is not None and edit is None else {}
        if self._cut.linear is not None and weights.keys() <= head_weights(self._cut):
            rows = torch.cat([self._rows[label] for label in chosen])
            tail = changed_head(self._cut, weights) if weights else self._cut.linear
            found = tail(rows if edit is None else edit(rows[:, None]))
        elif self._cut.linear is not None:
            found = torch.cat([self._whole(label, weights) for label in chosen])
        else:
            tails = (tail for label in chosen for tail in self._tails[label])
            if weights:
                found = torch.cat([tail.with_weights(weights) for tail in tails])
            else:
                found = torch.cat([tail(edit(tail.activations) if edit else tail.activations) for tail in tails])
        return found.float().cpu()

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images on the network's device, in batches with their labels."""
        numbers = [number for own in self._of.values() for number in own]
        for images, labels in self._context.data.loader(self.split, indices=numbers):
            yield self._context.on_device(images), labels

    def labels_of(self, classes: Sequence[int] | None) -> Int[Tensor, " n"]:
        """The labels of the images of classes, as :meth:`logits` orders them."""
        chosen = self.chosen(classes)
        return torch.cat([torch.full((len(self._of[label]),), label) for label in chosen] or [self.labels[:0]])

    def chosen(self, classes: Sequence[int] | None) -> list[int]:
        """Those of the classes that have images."""
        return [label for label in self._of if classes is None or label in classes]

    def _images(self, label: int) -> Iterator[Tensor]:
        """The images of a class on the network's device, in batches."""
        size = self._context.data.batch_size
        for start in range(0, len(self._of[label]), size):
            if (images := self._held.get((label, start))) is None:
                numbers = self._of[label][start : start + size]
                ((images, _),) = self._context.data.loader(self.split, indices=numbers, batch_size=size)
                images = self._context.on_device(images)
                if images.nbytes <= self._room:
                    self._room -= images.nbytes
                    self._held[label, start] = images
            yield images

    def _whole(self, label: int, weights: dict[str, Tensor]) -> Tensor:
        """Through the whole network with other weights."""
        context, model = self._context, self._cut.model
        # Of a module that the network holds twice, functional_call takes one name, and ties the other to it.
        once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        weights = {name: tensor for name, tensor in weights.items() if name in once}
        order = self._cut.order.to(context.device)
        return torch.cat([functional_call(model, weights, (images,))[:, order] for images in self._images(label)])
