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
from salve.editing.methods.change import Activations, Change
from salve.sae import SAE
from salve.stages.context import StageContext
from salve.stages.targets import balanced
from salve.stages.through_tail import HELD_BYTES, Tails, batches_of
from salve.types import Split

#: Images of a class that run first: often they tell already that most are still right.
FIRST = 8


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
            self._tails = {label: Tails(context, cut, split, own, share, FIRST) for label, own in self._of.items()}

    def logits(self, change: Change | None = None, classes: Sequence[int] | None = None) -> Float[Tensor, "n C"]:
        """The logits of a changed network, in float32; without a change, of the network as it is.

        Args:
            change: see :class:`Change`. classes: labels of the classes whose images run; None for all.
        """
        return torch.cat([torch.empty(0, len(self._cut.order)), *(found for found, _ in self.parts(change, classes))])

    @torch.no_grad()
    def parts(
        self, change: Change | None = None, classes: Sequence[int] | None = None
    ) -> Iterator[tuple[Float[Tensor, "n C"], Int[Tensor, " n"]]]:
        """The same in parts with their labels. Where images run through a network, no part is computed before it is
        asked for, and the first part of each class has :data:`FIRST` images."""
        chosen = self.chosen(classes)
        edit = None if change is None else change.activations
        weights = change.weights() if change is not None and change.weights is not None and edit is None else {}
        if self._cut.linear is not None and weights.keys() <= head_weights(self._cut):
            if chosen:
                rows = torch.cat([self._rows[label] for label in chosen])
                tail = changed_head(self._cut, weights) if weights else self._cut.linear
                yield tail(rows if edit is None else edit(rows[:, None])).float().cpu(), self._labels_of(classes)
            return
        at_last = self._cut.linear is not None
        for label in chosen:
            through = self._whole(label, weights) if at_last else self._behind(label, weights, edit)
            for found in through:
                yield found.float().cpu(), torch.full((len(found),), label)

    def _behind(self, label: int, weights: dict[str, Tensor], edit: Activations | None) -> Iterator[Tensor]:
        """Through what a change of an inner site reaches."""
        for tail in self._tails[label]:
            if weights:
                yield tail.with_weights(weights)
            else:
                yield tail(edit(tail.activations) if edit else tail.activations)

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The images on the network's device, in batches with their labels."""
        numbers = [number for own in self._of.values() for number in own]
        for images, labels in self._context.data.loader(self.split, indices=numbers):
            yield self._context.on_device(images), labels

    def _labels_of(self, classes: Sequence[int] | None) -> Int[Tensor, " n"]:
        """The labels of the images of classes, as :meth:`logits` orders them."""
        chosen = self.chosen(classes)
        return torch.cat([torch.full((len(self._of[label]),), label) for label in chosen] or [self.labels[:0]])

    def chosen(self, classes: Sequence[int] | None) -> list[int]:
        """Those of the classes that have images."""
        return [label for label in self._of if classes is None or label in classes]

    def _images(self, label: int) -> Iterator[Tensor]:
        """The images of a class on the network's device, in batches."""
        for number, indices in enumerate(batches_of(self._of[label], self._context.data.batch_size, FIRST)):
            if (images := self._held.get((label, number))) is None:
                ((images, _),) = self._context.data.loader(self.split, indices=indices, batch_size=len(indices))
                images = self._context.on_device(images)
                if images.nbytes <= self._room:
                    self._room -= images.nbytes
                    self._held[label, number] = images
            yield images

    def _whole(self, label: int, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        """Through the whole network with other weights."""
        context, model = self._context, self._cut.model
        # Of a module that the network holds twice, functional_call takes one name, and ties the other to it.
        once = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        weights = {name: tensor for name, tensor in weights.items() if name in once}
        order = self._cut.order.to(context.device)
        for images in self._images(label):
            yield functional_call(model, weights, (images,))[:, order]
