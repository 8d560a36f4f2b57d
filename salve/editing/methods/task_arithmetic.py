# SPDX-License-Identifier: MIT
"""Task arithmetic: train the network further on the class alone, and take what it learns away."""

from dataclasses import dataclass
from typing import ClassVar

from salve.editing.fine_tuning import (
    FineTuning,
    batches_of,
    between,
    check_whole,
    cross_entropies,
    drawn,
    numbers_of,
    train_images,
)
from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Change
from salve.editing.methods.directions import drawing


@dataclass(frozen=True)
class TaskArithmetic(FineTuning, Method):
    """Negation of a task vector, ``θ − α τ`` with ``τ = θ_ft − θ``: the weights after fine-tuning on the target's train
    images alone, by cross-entropy, less those before.

    It costs a forward and a backward pass for ``steps × batch_size`` images, about three times as much as to classify
    as many. The papers' networks are fine-tuned until they have learned a task; this one knows the class already, so
    that τ is short: its length is that of ``steps`` steps, whatever the loss.

    Attributes:
        steps: of the optimiser. The others: see :class:`FineTuning`.
    """

    learning_rate: float = 1e-5
    steps: int = 10

    source: ClassVar[str] = "Ilharco et al. 2022 (arXiv 2212.04089)"
    full_size: ClassVar[str] = "the weights go as far away from those fine-tuned on the class as these are from them"
    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("steps", self.steps, 1)

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        cut, (images, labels) = fitting.cut, train_images(fitting, "The edit method task_arithmetic")
        numbers = drawn([numbers_of(labels, target)], self.steps * self.batch_size, drawing(fitting, target))
        end = self.tuned(cut, cross_entropies(cut.order, batches_of(images, numbers, self.batch_size)))
        fitting.uses(numbers)

        def at(alpha: float) -> Change:
            return Change(weights=lambda: between(cut, end, -alpha))

        return FittedEdit(at)
