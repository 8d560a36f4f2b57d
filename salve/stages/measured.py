# SPDX-License-Identifier: MIT
"""Measure edits at any site: from cached activations at the last one, through a sample of images elsewhere."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from salve.activations import Captured
from salve.artifacts import Artifact
from salve.backbones.cut import Cut
from salve.edit_settings import EditSettings
from salve.editing.curves import accuracies_of, outcomes_of
from salve.editing.gating import check_finite
from salve.editing.methods import FittedEdit, Method
from salve.editing.methods.gate import GateEdit
from salve.editing.verdict import effect, takes_away
from salve.metrics import kl_divergence, per_class_accuracy
from salve.stages.context import StageContext
from salve.stages.sampled import Sample
from salve.types import Split

#: Splits on which strengths are measured: the first chooses the strength, the second reports its effect.
MEASURED_ON: tuple[Split, Split] = ("select", "test")


class EditMeasures(Protocol):
    """Measure edits of one network on select and test images."""

    def labels(self, split: Split) -> Tensor:
        """Labels ``[n]`` of the images that a split's measures are of."""

    def accuracies(
        self, edit: FittedEdit, own: NDArray[np.bool_]
    ) -> tuple[list[float], dict[Split, Float[Tensor, "K C"]]]:
        """Strengths, rising from 0, and by split the accuracy of every class at each; ``own`` ``[C]`` are edited."""

    def outcomes(self, edit: FittedEdit, alpha: float) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """For each test image whether the edited network is right, and ``KL(original ‖ edited)`` in nats."""


class LinearMeasures:
    """From cached activations of all images, at every strength of the grid; edits of the last site or the head.

    Args:
        cut: at the last site; its first outputs are the data's classes. splits: activations and labels.
        settings: hold the strengths. classes: ``C``, of the data.
    """

    def __init__(self, cut: Cut, splits: Mapping[Split, Captured], settings: EditSettings, classes: int) -> None:
        self._cut, self._splits, self._settings, self._classes = cut, splits, settings, classes

    def labels(self, split: Split) -> Tensor:
        """See :class:`EditMeasures`."""
        return self._splits[split].labels

    def accuracies(
        self, edit: FittedEdit, own: NDArray[np.bool_]
    ) -> tuple[list[float], dict[Split, Float[Tensor, "K C"]]]:
        """See :class:`EditMeasures`."""
        alphas, outputs = self._settings.alpha, len(self._cut.order)

        def logits(block: Tensor) -> Iterator[tuple[int, Tensor]]:
            return edit.logits_by_strength(self._cut, block, alphas)

        found = {
            split: accuracies_of(logits, captured.activations, captured.labels, len(alphas), outputs)
            for split, captured in self._splits.items()
        }
        return alphas, {split: accuracy[:, : self._classes] for split, accuracy in found.items()}

    def outcomes(self, edit: FittedEdit, alpha: float) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """See :class:`EditMeasures`."""
        test, tail = self._splits["test"], self._cut.linear
        assert tail is not None

        def logits(block: Tensor) -> Tensor:
            ((_, found),) = edit.logits_by_strength(self._cut, block, [alpha])
            return found

        return outcomes_of(tail, logits, test.activations, test.labels)


class SampledMeasures:
    """Through the network, on ``edit.images`` images of each class, at some strengths of the grid.

    These are ``edit.resolution`` equal steps of the grid and, unless the edit enhances, those that a bisection of the
    step needs in which the edited classes give way on select images. Both splits are measured at the same strengths.

    Args:
        context: of the run. cut: the network. settings: hold the strengths. activations: captured at the site.
    """

    def __init__(self, context: StageContext, cut: Cut, settings: EditSettings, activations: Artifact | None) -> None:
        self._samples = {split: Sample(context, cut, activations, split, settings.images) for split in MEASURED_ON}
        self._settings, self._classes = settings, len(context.classes)
        self._original = {split: sample.logits() for split, sample in self._samples.items()}

    def labels(self, split: Split) -> Tensor:
        """See :class:`EditMeasures`."""
        return self._samples[split].labels

    def accuracies(
        self, edit: FittedEdit, own: NDArray[np.bool_]
    ) -> tuple[list[float], dict[Split, Float[Tensor, "K C"]]]:
        """See :class:`EditMeasures`."""
        alphas = self._settings.alpha
        steps = np.linspace(0, len(alphas) - 1, min(self._settings.resolution, len(alphas) - 1) + 1)
        coarse = np.unique(steps.round().astype(int)).tolist()
        select = {at: self._accuracy("select", edit, alphas[at]) for at in coarse}
        weakens = not (isinstance(edit, GateEdit) and edit.mode == "enhance")

        def goes(at: int) -> bool:
            return bool(takes_away(effect(select[0].numpy(), select[at].numpy(), own)))

        first = next((at for at in coarse if weakens and goes(at)), 0)
        below, above = max((at for at in coarse if at < first), default=first), first
        while above - below > 1:
            middle = (below + above) // 2
            select[middle] = self._accuracy("select", edit, alphas[middle])
            below, above = (below, middle) if goes(middle) else (middle, above)
        order = sorted(select)
        test = [self._accuracy("test", edit, alphas[at]) for at in order]
        return [alphas[at] for at in order], {
            "select": torch.stack([select[at] for at in order]),
            "test": torch.stack(test),
        }

    def outcomes(self, edit: FittedEdit, alpha: float) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """See :class:`EditMeasures`."""
        logits = self._logits("test", edit, alpha)
        right = logits.argmax(dim=1) == self.labels("test")
        return right, kl_divergence(self._original["test"], logits).clamp_min(0)

    def _accuracy(self, split: Split, edit: FittedEdit, alpha: float) -> Float[Tensor, " C"]:
        predictions = self._logits(split, edit, alpha).argmax(dim=1)
        return per_class_accuracy(predictions, self.labels(split), self._classes)

    def _logits(self, split: Split, edit: FittedEdit, alpha: float) -> Tensor:
        if alpha == 0:
            return self._original[split]
        logits = self._samples[split].logits(edit.at(alpha))
        check_finite(logits, torch.tensor(alpha))
        return logits


def measures_of(
    context: StageContext, cut: Cut, settings: EditSettings, activations: Artifact, method: Method | None
) -> EditMeasures:
    """What measures a method's edits at the site of ``cut``, where ``activations`` were captured; None is the gate.

    At the last site, edits of the site and of the head are measured on all images. What changes other weights runs
    whole images, and a sample of them.
    """
    if cut.linear is None or (method is not None and method.everywhere):
        return SampledMeasures(context, cut, settings, activations)
    splits = {split: context.activations(activations, split) for split in MEASURED_ON}
    return LinearMeasures(cut, splits, settings, len(context.classes))
