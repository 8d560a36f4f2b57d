"""An edit method: the class's row of the head moves to the average of the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from salve.backbones import head_site
from salve.editing.methods import Change, FittedEdit, Fitting, Method, Target
from salve.types import UserError


@dataclass(frozen=True)
class AverageRow(Method):
    """``w_k' = (1 − α) w_k + α mean(w_j, j ≠ k)``, and the same of the bias if ``bias`` is true.

    Attributes:
        bias: whether the bias moves, too.
    """

    bias: bool = True

    source: ClassVar[str] = "an example (docs/extend.md)"
    full_size: ClassVar[str] = "the class's logit is the mean of the others' logits"
    of_site = False  # it edits the head, wherever the network is cut

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """The edit of one target; salve asks for its change at every strength."""
        cut = fitting.cut
        (reader,) = head_site(cut.model).readers
        state = cut.model.state_dict()
        units = cut.order[list(target.classes)]  # the outputs of the network that stand for these classes
        names = [reader.weight, *([reader.bias] if self.bias and reader.bias in state else [])]
        others = torch.ones(len(state[reader.weight]), dtype=torch.bool)
        others[units] = False
        if not others.any():
            raise UserError(f"{target.name} has all outputs of the head, so that there are no others to average.")

        def at(alpha: float) -> Change:
            def weights() -> dict[str, torch.Tensor]:
                changed = {name: state[name].clone() for name in names}
                for tensor in changed.values():
                    mean = tensor[others].mean(dim=0)
                    tensor[units] = (1 - alpha) * tensor[units] + alpha * mean
                return changed

            return Change(weights=weights)

        return FittedEdit(at, strongest=1.0)
