"""Measure edits at any site: from cached activations at a linear tail, through the network's tail elsewhere."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from salve.activations import Captured
from salve.artifacts import Artifact
from salve.backbones.cut import Cut
from salve.backbones.tail import LinearTail
from salve.editing.curves import edit_accuracies, edit_outcomes
from salve.editing.gating import check_finite, gate
from salve.editing.verdict import effect, takes_away
from salve.metrics import kl_divergence, per_class_accuracy
from salve.settings import EditSettings
from salve.stages.context import StageContext
from salve.stages.targets import balanced
from salve.stages.through_tail import Tails
from salve.types import Contribution, Split

#: Splits on which strengths are measured: the first chooses the strength, the second reports its effect.
MEASURED_ON: tuple[Split, Split] = ("select", "test")


class EditMeasures(Protocol):
    """Measure edits of one network on select and test images."""

    def labels(self, split: Split) -> Tensor:
        """Labels ``[n]`` of the images that a split's measures are of."""

    def accuracies(
        self, contributions: Float[Tensor, "S M"], mode: Any, own: NDArray[np.bool_]
    ) -> tuple[list[float], dict[Split, Float[Tensor, "K C"]]]:
        """Strengths, rising from 0, and by split the accuracy of every class at each.

        Args:
            contributions: of a set of latents. mode: suppress or enhance. own: ``[C]``, the classes that are edited.
        """

    def outcomes(
        self, contributions: Float[Tensor, "S M"], alpha: float
    ) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """For each test image whether the suppressed network is right, and ``KL(original ‖ edited)`` in nats."""


class LinearMeasures:
    """From cached activations of all images, at every strength of the grid.

    Args:
        tail: its first outputs are the data's classes. splits: activations and labels. settings: hold the strengths.
        classes: ``C``, of the data.
    """

    def __init__(
        self, tail: LinearTail, splits: Mapping[Split, Captured], settings: EditSettings, classes: int
    ) -> None:
        self._tail, self._splits, self._settings, self._classes = tail, splits, settings, classes

    def labels(self, split: Split) -> Tensor:
        """See :class:`EditMeasures`."""
        return self._splits[split].labels

    def accuracies(
        self, contributions: Float[Tensor, "S M"], mode: Any, own: NDArray[np.bool_]
    ) -> tuple[list[float], dict[Split, Float[Tensor, "K C"]]]:
        """See :class:`EditMeasures`."""
        alphas = self._settings.alpha
        found = {
            split: edit_accuracies(
                self._tail, captured.activations, captured.labels, contributions, torch.tensor(alphas), mode
            )
            for split, captured in self._splits.items()
        }
        return alphas, {split: accuracy[:, : self._classes] for split, accuracy in found.items()}

    def outcomes(
        self, contributions: Float[Tensor, "S M"], alpha: float
    ) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """See :class:`EditMeasures`."""
        test = self._splits["test"]
        return edit_outcomes(self._tail, test.activations, test.labels, contributions, alpha)


class TailMeasures:
    """Through the tail, on ``edit.images`` images of each class, at some strengths of the grid.

    These are ``edit.resolution`` equal steps of the grid and, for suppression, those that a bisection of the step needs
    in which the edited classes give way on select images. Both splits are measured at the same strengths.

    Args:
        context: of the run. cut: the network. settings: hold the strengths.
    """

    def __init__(self, context: StageContext, cut: Cut, settings: EditSettings) -> None:
        self._tails = {
            split: Tails(context, cut, split, balanced(context.data.labels(split), settings.images))
            for split in MEASURED_ON
        }
        self._settings, self._classes = settings, len(context.classes)
        self._original = {split: tails.logits() for split, tails in self._tails.items()}

    def labels(self, split: Split) -> Tensor:
        """See :class:`EditMeasures`."""
        return self._tails[split].labels

    def accuracies(
        self, contributions: Float[Tensor, "S M"], mode: Any, own: NDArray[np.bool_]
    ) -> tuple[list[float], dict[Split, Float[Tensor, "K C"]]]:
        """See :class:`EditMeasures`."""
        alphas = self._settings.alpha
        steps = np.linspace(0, len(alphas) - 1, min(self._settings.resolution, len(alphas) - 1) + 1)
        coarse = np.unique(steps.round().astype(int)).tolist()
        select = {at: self._accuracy("select", contributions, alphas[at], mode) for at in coarse}

        def goes(at: int) -> bool:
            return bool(takes_away(effect(select[0].numpy(), select[at].numpy(), own)))

        first = next((at for at in coarse if mode == "suppress" and goes(at)), 0)
        below, above = max((at for at in coarse if at < first), default=first), first
        while above - below > 1:
            middle = (below + above) // 2
            select[middle] = self._accuracy("select", contributions, alphas[middle], mode)
            below, above = (below, middle) if goes(middle) else (middle, above)
        order = sorted(select)
        test = [self._accuracy("test", contributions, alphas[at], mode) for at in order]
        return [alphas[at] for at in order], {
            "select": torch.stack([select[at] for at in order]),
            "test": torch.stack(test),
        }

    def outcomes(
        self, contributions: Float[Tensor, "S M"], alpha: float
    ) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"]]:
        """See :class:`EditMeasures`."""
        logits = self._logits("test", contributions, alpha, "suppress")
        right = logits.argmax(dim=1) == self.labels("test")
        return right, kl_divergence(self._original["test"], logits).clamp_min(0)

    def _accuracy(self, split: Split, contributions: Tensor, alpha: float, mode: Any) -> Float[Tensor, " C"]:
        predictions = self._logits(split, contributions, alpha, mode).argmax(dim=1)
        return per_class_accuracy(predictions, self.labels(split), self._classes).double()

    def _logits(self, split: Split, contributions: Tensor, alpha: float, mode: Any) -> Tensor:
        if alpha == 0:
            return self._original[split]
        closed: Contribution = gate(contributions, alpha, mode)
        logits = self._tails[split].logits(closed)
        check_finite(logits, torch.tensor(alpha))
        return logits


def measures_of(context: StageContext, cut: Cut, settings: EditSettings, activations: Artifact) -> EditMeasures:
    """What measures edits at the site of ``cut``; ``activations`` is the artifact that was captured there."""
    if cut.linear is None:
        return TailMeasures(context, cut, settings)
    splits = {split: context.activations(activations, split) for split in MEASURED_ON}
    return LinearMeasures(cut.linear, splits, settings, len(context.classes))
