# SPDX-License-Identifier: MIT
"""Pairs of images that differ in a mark alone: which predictions it changes, and through which latents."""

import math

import torch
from torch import Tensor

from salve.backbones.cut import Cut
from salve.editing.methods.change import Affine
from salve.sae import SAE
from salve.stages.context import StageContext
from salve.stages.grouped import Grouped, Running

#: Images that a mark turns into a class, at most, on which each suspect is ablated.
TURNED = 32


def flip_rate(logits: Tensor) -> float:
    """The share of pairs whose two predictions differ; ``logits`` ``[2n, C]``, image ``i`` pairs with ``i + n``."""
    without, with_mark = logits.argmax(dim=1).chunk(2)
    return float((without != with_mark).double().mean())


class Counterfactuals:
    """What a mark does to the predictions of pairs.

    Args:
        context: of the run. cut: the network. sae: of the site. pairs: all images without the mark, then with it.
    """

    def __init__(self, context: StageContext, cut: Cut, sae: SAE, pairs: Grouped) -> None:
        self._context, self._cut, self._decoder, self._pairs = context, cut, sae.decoder.detach().cpu(), pairs
        self._taken = Running(context, cut, pairs, room=0).logits().argmax(dim=1)
        self._turned: dict[int, tuple[Running, int]] = {}

    def share(self, label: int) -> float:
        """The share of images of other classes that the mark turns into the class, or out of it."""
        return float(self._changes(label)[self._others(label)].double().mean())

    def undone(self, label: int, latent: int) -> float:
        """The share of the images that the mark turns into a class that no longer are, with one latent ablated.

        NaN where the mark turns none.
        """
        if label not in self._turned:
            numbers = (self._changes(label) & self._others(label)).nonzero()[:TURNED, 0]
            half = len(self._pairs) // 2
            shown = torch.where(self._taken[numbers] == label, numbers, numbers + half)
            self._turned[label] = Running(self._context, self._cut, self._pairs.at(shown, paired=False)), len(shown)
        running, count = self._turned[label]
        if not count:
            return math.nan
        direction = self._decoder[:, [latent]]
        change = Affine(left=direction, right=direction).change(self._cut.model, self._cut.site)
        return float((running.logits(change).argmax(dim=1) != label).double().mean())

    def _others(self, label: int) -> Tensor:
        return self._pairs.labels[: len(self._pairs) // 2] != label

    def _changes(self, label: int) -> Tensor:
        without, with_mark = (self._taken == label).chunk(2)
        return without != with_mark
