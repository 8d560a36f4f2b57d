"""The one protocol of all edit methods (docs/method.md, *Rivals*).

A method is fitted on train images for a target, such as a class. The edit that comes out has a strength α without unit:
0 changes nothing, and 1 is the edit at its natural full size, which each method states. Strengths of different methods
still do not compare: compare methods where they have the same effect.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from salve.backbones.cut import Cut
from salve.backbones.tail import LinearTail
from salve.editing.methods.change import Change
from salve.features import class_means
from salve.sae import SAE
from salve.types import UserError

#: Train images, by number in the split or all of them, in batches with their labels.
TrainImages = Callable[[Sequence[int] | None], Iterator[tuple[Tensor, Tensor]]]

#: Train images of a class that run through the network where a method needs its logits.
SAMPLED = 32


class Target(NamedTuple):
    """The target of one edit: a class's own latent, or a set of latents.

    Attributes:
        name: for tables. classes: labels of the classes meant.
        latents, signs, kinds: of each latent; see :mod:`salve.features`.
    """

    name: str
    classes: tuple[int, ...]
    latents: tuple[int, ...]
    signs: tuple[int, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Fitting:
    """What edits of a network are fitted on; all methods share its moments.

    Attributes:
        cut: the network, cut at the site.
        rows: train activations ``[R, M]``, one row per position. labels: ``[R]``, of the image of each row.
        classes: ``C``, of the data.
        sae: of the site, on the CPU; None for methods that need none.
        image_labels: ``[N]``, of the train images. images: gives them, on the network's device.
        seed: of what a method draws.
    """

    cut: Cut
    rows: Float[Tensor, "R M"]
    labels: Int[Tensor, " R"]
    classes: int
    sae: SAE | None = None
    image_labels: Int[Tensor, " N"] | None = None
    images: TrainImages | None = None
    seed: int = 0

    @cached_property
    def mean(self) -> Float[Tensor, " M"]:
        """The mean activation, float64."""
        return self.rows.double().mean(dim=0)

    @cached_property
    def second_moment(self) -> Float[Tensor, "M M"]:
        """``E[a aᵀ]``, not centred, float64."""
        total = torch.zeros(self.rows.shape[1], self.rows.shape[1], dtype=torch.float64)
        for block in self.rows.split(2**14):
            wide = block.double()
            total.addmm_(wide.T, wide)
        return total / len(self.rows)

    @cached_property
    def class_means(self) -> Float[Tensor, "C M"]:
        """The mean activation of each class, float64; NaN for one without images."""
        return class_means(self.rows.double(), self.labels, self.classes)

    def lead(self, target: Target) -> float:
        """By how much the target's classes lead the strongest other, in the mean over their train images; at least a
        tenth of the logits' spread, so that it can serve as a unit.

        Raises:
            UserError: there are no images of the target.
        """
        own = torch.tensor(target.classes)
        if self.cut.linear is not None:
            mine = torch.isin(self.labels, own)
            logits, labels = self.cut.linear(self.rows[mine]), self.labels[mine]
        else:
            logits, labels = self._sampled_logits(own)
        if not len(logits):
            raise UserError(f"{target.name} has no train images, so that no edit can be fitted to it.")
        others = logits.index_fill(1, own, -torch.inf).amax(dim=1)
        leads = logits.gather(1, labels[:, None])[:, 0] - others
        return max(float(leads.mean()), 0.1 * float(logits.std()))

    @torch.no_grad()
    def _sampled_logits(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The network's logits for a few train images of classes, with their labels."""
        assert self.images is not None, "the site's tail needs images"
        assert self.image_labels is not None, "and their labels"
        chosen = [
            number
            for label in classes.tolist()
            for number in (self.image_labels == label).nonzero()[:SAMPLED, 0].tolist()
        ]
        found = [(self.cut.logits(images).cpu(), labels.cpu()) for images, labels in self.images(chosen)]
        return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])

    def known_sae(self, method: str) -> SAE:
        """The SAE.

        Raises:
            UserError: there is none.
        """
        if self.sae is None:
            raise UserError(f"The edit method {method} needs an SAE of the site {self.cut.site.name}.")
        return self.sae

    def own_mean(self, target: Target) -> Float[Tensor, " M"]:
        """The mean activation of the target's classes, each counted alike.

        Raises:
            UserError: some of them has no train images.
        """
        mean = self.class_means[list(target.classes)].mean(dim=0)
        if not target.classes or bool(mean.isnan().any()):
            raise UserError(f"{target.name} has no train images, so that no edit can be fitted to it.")
        return mean


@dataclass(frozen=True, eq=False)
class FittedEdit:
    """An edit of one target.

    Attributes:
        at: the change at a strength α ≥ 0.
        strongest: α beyond which the edit makes no sense, or changes nothing more.
        images: train images that the method has seen, and ``labelled`` how many of their labels.
    """

    at: Callable[[float], Change]
    strongest: float = 100.0
    images: int = 0
    labelled: int = 0

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
