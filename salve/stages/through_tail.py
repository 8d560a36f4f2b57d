# SPDX-License-Identifier: MIT
"""Run images through the tail of a site that is not the last: what an SAE or an edit does to the network's answers."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from salve.backbones.cut import Cut
from salve.backbones.graph import GraphTail
from salve.metrics import Downstream
from salve.sae import SAE
from salve.stages.context import StageContext
from salve.stages.measure import finite_or_none, named
from salve.stages.targets import balanced
from salve.types import Contribution, Split

#: Images of a split, over all classes, on which an SAE is measured through the tail: four passes of the tail for each.
MEASURED = 500
#: Bytes of what tails hold of their images; what goes beyond is computed again for every edit.
HELD_BYTES = 2**30


@torch.no_grad()
def measure_through_tail(context: StageContext, cut: Cut, sae: SAE, mean: Tensor) -> dict[str, float | None]:
    """What the network loses with the site replaced by its reconstruction, at every position.

    Args:
        context: of the run. cut: the network. sae: on the CPU, folded; it is left there.
        mean: the mean activation ``[M]`` of the train split, for the mean-ablation.

    Returns:
        :func:`salve.metrics.downstream` of a class-balanced sample of select and test, named as by
        :func:`salve.stages.measure.measure_sae`, and ``downstream_images``, the size of that of test.
    """
    sae, mean = sae.to(context.device), mean.to(context.device)
    measures: dict[str, Tensor] = {}
    splits: tuple[Split, ...] = ("select", "test")
    for split in splits:
        found, per_class = Downstream(), max(1, MEASURED // len(context.classes))
        indices = balanced(context.data.labels(split), per_class)
        for images, labels in context.data.loader(split, indices=indices):
            tail = cut.tail(context.on_device(images))
            activations = tail.activations
            reconstruction = sae(activations.flatten(0, 1))[0].view_as(activations)
            fed = (activations, reconstruction, torch.zeros_like(activations), mean.expand_as(activations))
            found.update(labels, *(tail(one).float().cpu() for one in fed))
        measures |= named(split, found.compute())
        measures |= named(split, {"downstream_images": torch.tensor(len(indices))})
    sae.cpu()
    return finite_or_none(measures)


def batches_of(numbers: Sequence[int], size: int, first: int = 0) -> list[Sequence[int]]:
    """Numbers in batches of a size; the first of ``first`` numbers, if it is to be a smaller one."""
    edges = [0, *range(first if 0 < first < size else size, len(numbers), size), len(numbers)]
    return [numbers[start:end] for start, end in pairwise(edges) if start < end]


class Tails:
    """The tails of some images of a split, in batches, held in memory as far as :data:`HELD_BYTES` go.

    Args:
        context: of the run. cut: the network. split: its name. numbers: of the images in the split.
        room: bytes that may be held. first: images of the first batch, if it is to be a small one.

    Attributes:
        labels: ``[n]``, of the images.
    """

    def __init__(
        self,
        context: StageContext,
        cut: Cut,
        split: Split,
        numbers: Sequence[int],
        room: int = HELD_BYTES,
        first: int = 0,
    ) -> None:
        self._context, self._cut, self._split = context, cut, split
        self.labels = torch.as_tensor(context.data.labels(split))[list(numbers)]
        self._batches = batches_of(numbers, context.data.batch_size, first)
        self._held: dict[int, GraphTail] = {}
        self._room = room

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[GraphTail]:
        for number, indices in enumerate(self._batches):
            if (tail := self._held.get(number)) is None:
                tail = self._tail(indices)
                if tail.bytes <= self._room:
                    self._room -= tail.bytes
                    self._held[number] = tail
            yield tail

    def _tail(self, indices: Sequence[int]) -> GraphTail:
        ((images, _),) = self._context.data.loader(self._split, indices=indices, batch_size=len(indices))
        return self._cut.tail(self._context.on_device(images))

    @torch.no_grad()
    def logits(self, gate: Contribution | None = None) -> Float[Tensor, "n C"]:
        """The logits with a gate ``[M]`` at the site; without one, the network's own."""
        return torch.cat(
            [(tail(tail.activations) if gate is None else tail.gated(gate.to(tail.activations))).cpu() for tail in self]
        ).float()
