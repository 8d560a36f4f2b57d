# SPDX-License-Identifier: MIT
"""The one protocol of all edit methods (docs/method.md, *Rivals*).

A method is fitted on train images for a target, such as a class. The edit that comes out has a strength α without unit:
0 changes nothing, and 1 is the edit at its natural full size, which each method states. Strengths of different methods
still do not compare: compare methods where they have the same effect.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from salve.backbones.cut import Cut
from salve.backbones.tail import LinearTail
from salve.editing.methods.change import Change
from salve.editing.methods.fitting import Fitting as Fitting
from salve.editing.methods.fitting import Target as Target
from salve.editing.methods.fitting import TrainImages as TrainImages
from salve.editing.methods.fitting import lead_and_unit as lead_and_unit
from salve.types import UserError


@dataclass(frozen=True, eq=False)
class FittedEdit:
    """An edit of one target.

    Attributes:
        at: the change at a strength α ≥ 0; raises UserError if α is infinite or NaN.
        strongest: α beyond which the edit makes no sense, or changes nothing more.
        steps: if the edit changes in steps, a function of α that has one value on each; α itself otherwise.
    """

    at: Callable[[float], Change]
    strongest: float = 100.0
    steps: Callable[[float], float] = float

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", partial(_at_finite, self.at))

    def logits_by_strength(
        self, cut: Cut, rows: Float[Tensor, "N M"], alphas: Sequence[float]
    ) -> Iterator[tuple[int, Float[Tensor, "N C"]]]:
        """The logits of images at the last site, from their activations, one strength at a time.

        Args:
            cut: the network at its last site. rows: of the images. alphas: strengths.

        Yields:
            The index of each strength once, in any order, and the logits.

        Raises:
            UserError: the edit changes other weights than those of the head.
        """
        for number, alpha in enumerate(alphas):
            yield number, logits_at_head(cut, rows, self.at(alpha))


def _at_finite(at: Callable[[float], Change], alpha: float) -> Change:
    if not math.isfinite(alpha):
        raise UserError(f"The strength of an edit must be a finite number, but is {alpha:g}.")
    return at(alpha)


def logits_at_head(cut: Cut, rows: Float[Tensor, "N M"], change: Change) -> Float[Tensor, "N C"]:
    """The logits of a changed network, from activations of its last site.

    Raises:
        UserError: the change is one of other weights than those of the head.
    """
    assert cut.linear is not None, "only the last site has a linear tail"
    if change.activations is not None:
        return cut.linear(change.activations(rows[:, None]))
    assert change.weights is not None
    return changed_head(cut, change.weights())(rows)


def head_weights(cut: Cut) -> set[str]:
    """Names of the tensors of the head, at the last site."""
    (reader,) = cut.site.readers
    return {reader.weight, reader.bias}


def changed_head(cut: Cut, weights: dict[str, Tensor]) -> LinearTail:
    """The linear tail of the last site with other weights.

    Raises:
        UserError: they are not the head's.
    """
    (reader,) = cut.site.readers
    if others := sorted(weights.keys() - head_weights(cut)):
        raise UserError(f"The edit changes {others[0]}, which is not part of the head, so that images must run again.")
    assert cut.linear is not None, "only the last site has a linear tail"
    weight = weights[reader.weight].flatten(1)[cut.order] if reader.weight in weights else cut.linear.weight
    bias = weights[reader.bias][cut.order] if reader.bias in weights else cut.linear.bias
    return LinearTail(weight.cpu(), bias.cpu())


class Method(ABC):
    """One way to edit a network. Subclasses are frozen dataclasses, whose fields are the method's settings.

    Attributes:
        source: the paper that it comes from.
        full_size: what the edit does at α = 1, as part of a sentence.
        permanent: whether a plain ``state_dict`` can hold it, at a site whose readers can.
        needs_images: whether it runs train images again.
    """

    source: ClassVar[str]
    full_size: ClassVar[str]
    permanent: ClassVar[bool] = True
    needs_images: ClassVar[bool] = False

    @property
    def everywhere(self) -> bool:
        """Whether its edits change weights in front of the site, too."""
        return False

    @property
    def of_site(self) -> bool:
        """Whether its edits depend on the site; if not, they are the same wherever the network is cut."""
        return True

    @property
    def needs_sae(self) -> bool:
        """Whether it uses the SAE and its latents."""
        return False

    @property
    def draws(self) -> bool:
        """Whether it draws something at random."""
        return False

    @abstractmethod
    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """Fit the edit of one target.

        Raises:
            UserError: the target or the site does not allow it.
        """

    def settings(self) -> dict[str, Any]:
        """The method's settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
