# SPDX-License-Identifier: MIT
"""Rivals of a repair that train the network again: JTT, group DRO, and the bound, a network without the shortcut."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from salve.artifacts import Artifact
from salve.repair_settings import RETRAINED
from salve.settings import FinetuneSettings
from salve.stages.context import StageContext
from salve.stages.grouped import Running, of_split
from salve.stages.weighting import Weighting
from salve.types import Labels, UserError

#: JTT: the share of the epochs that the first network is trained, and how many times its mistakes count; each is tried.
JTT_EPOCHS = 0.25
JTT_TIMES = (5, 20)
#: Group DRO: steps of the groups' weights; each is tried.
DRO_STEPS = (0.01, 0.1)

#: What trains a network: :func:`salve.stages.finetune.finetune`.
Train = Callable[[StageContext, FinetuneSettings, Weighting | None], Artifact]


def repeated(predictions: Labels, labels: Labels, times: int) -> Int[Tensor, " N"]:
    """JTT's upsampling (Liu et al. 2021, arXiv 2107.09044): each mistake of the first network counts many times.

    The paper repeats the mistakes, which makes its epochs longer; here they are drawn more often, in epochs as long as
    any.

    Args:
        predictions: of the first network. labels: of the same images. times: λ_up.
    """
    return torch.where(predictions == labels, 1, times)


class Retraining:
    """Trains rivals with the run's own settings of fine-tuning.

    Args:
        context: of the run. settings: of its fine-tuning. train: trains a network.
    """

    def __init__(self, context: StageContext, settings: FinetuneSettings, train: Train) -> None:
        self._context, self._settings, self._train = context, settings, train
        #: Keys of the networks, and of those that they were made with.
        self.keys: list[str] = []

    @staticmethod
    def tries(method: str) -> int:
        """How many networks :meth:`networks` gives."""
        return {"jtt": len(JTT_TIMES), "group_dro": len(DRO_STEPS), "bound": 1}[method]

    def networks(self, method: str) -> Iterator[tuple[float, Artifact]]:
        """The rival's networks with the setting in which they differ.

        Args:
            method: of :data:`RETRAINED`.

        Raises:
            UserError: the data do not have what the method needs.
        """
        assert method in RETRAINED
        yield from {"jtt": self._jtt, "group_dro": self._group_dro, "bound": self._bound}[method]()

    def _jtt(self) -> Iterator[tuple[float, Artifact]]:
        context, epochs = self._context, max(1, round(JTT_EPOCHS * self._settings.epochs))
        first = self._kept(self._train(context, replace(self._settings, epochs=epochs), None))
        images = of_split(context, "train")
        logits = Running(context, context.cut(first), images, room=0).logits()
        predictions = logits[:, : len(context.classes)].argmax(dim=1)
        for times in JTT_TIMES:
            weighting = Weighting(repeated(predictions, images.labels, times))
            yield float(times), self._kept(self._train(context, self._settings, weighting))

    def _group_dro(self) -> Iterator[tuple[float, Artifact]]:
        context = self._context
        groups = context.data.groups("train")
        if groups is None:
            raise UserError("group_dro needs the groups of the train images, and the data do not know them.")
        numbered = groups.numbered(torch.as_tensor(context.data.labels("train")))
        for step in DRO_STEPS:
            weighting = Weighting((numbered >= 0).long(), numbered, len(groups.values), step)
            yield step, self._kept(self._train(context, self._settings, weighting))

    def _bound(self) -> Iterator[tuple[float, Artifact]]:
        context = self._context
        data = context.data.without_shortcut()
        if data is None:
            raise UserError("bound needs data that can be had without the shortcut: the drawn scenes, or a mark.")
        assert context.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
        data.bind(context.data.preprocess)
        yield 0.0, self._kept(self._train(replace(context, data=data), self._settings, None))

    def _kept(self, network: Artifact) -> Artifact:
        self.keys.append(network.key)
        return network
