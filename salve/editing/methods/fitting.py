# SPDX-License-Identifier: MIT
"""What edits are fitted on, and the count of what a fit has used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from salve.backbones.cut import Cut
from salve.backbones.site import Site
from salve.backbones.tail import LinearTail, Tail
from salve.features import class_means as means_by_class
from salve.sae import SAE
from salve.types import UserError

#: Train images, by number in the split and in the order of these numbers, or all of them, in batches with their labels.
TrainImages = Callable[[Sequence[int] | None], Iterator[tuple[Tensor, Tensor]]]

#: Train images of each class that run through the network where a method needs logits or other sites.
SAMPLED = 32
#: Train images of each class whose channels get attributions, which takes a backward pass.
ATTRIBUTED = 16


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


@dataclass(eq=False)
class Used:
    """Numbers of the train images that fits have used, and of those whose labels they have used.

    An image counts if the edit could be another one without it, and its label if it could be another one if the label
    were not known. Edits through an SAE use all that it was trained on, and all labels if a class's latent was chosen
    by them.
    """

    images: set[int] = field(default_factory=set)
    labels: set[int] = field(default_factory=set)

    def clear(self) -> None:
        """Forget what was used."""
        self.images.clear()
        self.labels.clear()


def effects_on_lead(
    tail: Tail, activations: Float[Tensor, "N *P M"], labels: Int[Tensor, " N"]
) -> Float[Tensor, "N M"]:
    """The first-order effect of each channel on the image's own lead, ``Σ_p a_p ⊙ ∂m/∂a_p``.

    ``m`` is the logit of the image's class less the largest other.

    Args:
        tail: behind the site. activations: of the images. labels: of the images, on any device.
    """
    at = labels.to(activations.device)[:, None]
    if isinstance(tail, LinearTail):
        others = tail(activations).scatter(1, at, -torch.inf).argmax(dim=1)
        return activations.reshape(len(at), -1) * (tail.weight[at[:, 0]] - tail.weight[others])
    with torch.enable_grad():
        rows = activations.detach().requires_grad_()
        logits = tail(rows)
        leads = logits.gather(1, at)[:, 0] - logits.scatter(1, at, -torch.inf).amax(dim=1)
        (slope,) = torch.autograd.grad(leads.sum(), rows)
    return (rows.detach() * slope).sum(dim=1)


@dataclass(frozen=True, eq=False)
class Fitting:
    """What edits of a network are fitted on; all methods share its moments. It keeps count of what a fit has used.

    Attributes:
        cut: the network, cut at the site.
        rows: train activations ``[R, M]``, one row per position. labels: ``[R]``, of the image of each row.
        classes: ``C``, of the data.
        sae: of the site, on the CPU; None for methods that need none.
        image_labels: ``[N]``, of the train images. images: gives them, on the network's device.
        seed: of what a method draws.
        used: what fits have used since it was cleared. The methods of this class say it themselves; a method that reads
            ``rows``, ``labels`` or ``images`` on its own says it with :meth:`uses`.
    """

    cut: Cut
    rows: Float[Tensor, "R M"]
    labels: Int[Tensor, " R"]
    classes: int
    sae: SAE | None = None
    image_labels: Int[Tensor, " N"] | None = None
    images: TrainImages | None = None
    seed: int = 0
    used: Used = field(default_factory=Used, init=False, repr=False)
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def per_image(self) -> Int[Tensor, " N"]:
        """The labels of the train images; of the rows, where images are not at hand."""
        return self.labels if self.image_labels is None else self.image_labels

    def uses(self, numbers: Int[Tensor, " n"] | None = None, labelled: bool = True) -> None:
        """Count train images as used.

        Args:
            numbers: of the images; None for all. labelled: whether their labels are used, too.
        """
        chosen = range(len(self.per_image)) if numbers is None else numbers.tolist()
        self.used.images.update(chosen)
        if labelled:
            self.used.labels.update(chosen)

    def uses_classes(self, classes: Sequence[int]) -> None:
        """Count the train images of classes, and their labels, as used."""
        self.uses(torch.isin(self.per_image, torch.tensor(classes, dtype=torch.long)).nonzero()[:, 0])

    def with_sae(self, sae: SAE | None, seed: int) -> "Fitting":
        """The same with another SAE and seed; activations and what was computed of them are shared."""
        other = replace(self, sae=sae, seed=seed)
        object.__setattr__(other, "_kept", self._kept)
        return other

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    @property
    def mean(self) -> Float[Tensor, " M"]:
        """The mean activation, float64."""
        self.uses(labelled=False)
        return cast(Tensor, self._once("mean", lambda: self.rows.double().mean(dim=0)))

    @property
    def second_moment(self) -> Float[Tensor, "M M"]:
        """``E[a aᵀ]``, not centred, float64."""
        self.uses(labelled=False)
        return cast(Tensor, self._once("second moment", self._second_moment))

    def _second_moment(self) -> Float[Tensor, "M M"]:
        total = torch.zeros(self.rows.shape[1], self.rows.shape[1], dtype=torch.float64)
        for block in self.rows.split(2**14):
            wide = block.double()
            total.addmm_(wide.T, wide)
        return total / len(self.rows)

    @property
    def covariance(self) -> Float[Tensor, "M M"]:
        """``Σ = E[a aᵀ] − E[a] E[a]ᵀ``, float64."""
        return self.second_moment - torch.outer(self.mean, self.mean)

    @property
    def inverse_covariance(self) -> Float[Tensor, "M M"]:
        """The pseudo-inverse of ``Σ``, float64."""
        self.uses(labelled=False)
        found = self._once("inverse", lambda: torch.linalg.pinv(self.covariance, rtol=1e-12, hermitian=True))
        return cast(Tensor, found)

    @torch.no_grad()
    def moment_at(self, site: Site) -> Float[Tensor, "m m"]:
        """``E[a aᵀ]`` at a site of the graph, float64; at others than the cut's own, from a few images of each class.

        Raises:
            UserError: there are no train images to run again.
        """
        if site.readers == self.cut.site.readers:
            return self.second_moment
        sampled = self.sample(range(self.classes), SAMPLED)

        def moment() -> Tensor:
            there, total, rows = self.cut.on(self.cut.model, site), torch.zeros(()).double(), 0
            for images, _ in sampled:
                wide = there.read(images).flatten(0, 1).double().cpu()
                total, rows = total + wide.T @ wide, rows + len(wide)
            return total / rows

        return cast(Tensor, self._once(f"moment at {site.name}", moment))

    @property
    def class_means(self) -> Float[Tensor, "C M"]:
        """The mean activation of each class, float64; NaN for one without images."""
        found = self._once("class means", lambda: means_by_class(self.rows.double(), self.labels, self.classes))
        return cast(Tensor, found)

    def lead(self, target: Target) -> float:
        """By how much the target's classes lead the strongest other, in the mean over their train images; at least a
        tenth of the logits' spread, so that it can serve as a unit.

        Raises:
            UserError: there are no images of the target.
        """
        own = torch.tensor(target.classes)
        if self.cut.linear is not None:
            self.uses_classes(target.classes)
            mine = torch.isin(self.labels, own)
            logits, labels = self.cut.linear(self.rows[mine]), self.labels[mine]
        else:
            logits, labels = self._sampled_logits(target)
        if not len(logits):
            raise UserError(f"{target.name} has no train images, so that no edit can be fitted to it.")
        return lead_and_unit(logits, labels, target)[1]

    @torch.no_grad()
    def _sampled_logits(self, target: Target) -> tuple[Tensor, Tensor]:
        """The network's logits for a few train images of the target, with their labels."""
        found = [
            (self.cut.logits(images).cpu(), labels.cpu()) for images, labels in self.sample(target.classes, SAMPLED)
        ]
        if not found:
            return torch.empty(0, self.classes), torch.empty(0, dtype=torch.long)
        return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])

    def sample(self, classes: Sequence[int], count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first so many train images of each class, in batches with their labels; none if there are none.

        Raises:
            UserError: train images are not at hand.
        """
        if self.images is None or self.image_labels is None:
            raise UserError(f"At the site {self.cut.site.name} this edit method needs train images to run again.")
        firsts = [(self.image_labels == label).nonzero()[:count, 0] for label in classes]
        chosen = torch.cat([*firsts, torch.empty(0, dtype=torch.long)])
        self.uses(chosen)
        return self.images(chosen.tolist()) if len(chosen) else iter(())

    @property
    def attributions(self) -> tuple[Float[Tensor, "N M"], Int[Tensor, " N"]]:
        """The first-order effect of each channel on the image's own lead, ``Σ_p a_p ⊙ ∂m/∂a_p``, and labels.

        ``m`` is the logit of the image's class less the largest other. At the last site all rows count, and elsewhere a
        few images of each class.

        Raises:
            UserError: train images are needed, and are not at hand.
        """
        if self.cut.linear is not None:
            self.uses()
        else:
            self.sample(range(self.classes), ATTRIBUTED)
        return cast("tuple[Tensor, Tensor]", self._once("attributions", self._attributions))

    def _attributions(self) -> tuple[Float[Tensor, "N M"], Int[Tensor, " N"]]:
        tail = self.cut.linear
        if tail is not None:
            return effects_on_lead(tail, self.rows, self.labels), self.labels
        found, known = [], []
        for images, labels in self.sample(range(self.classes), ATTRIBUTED):
            behind = self.cut.tail(images)
            found.append(effects_on_lead(behind, behind.activations, labels).cpu())
            known.append(labels.cpu())
        return torch.cat(found), torch.cat(known)

    def known_sae(self, method: str, target: Target | None = None) -> SAE:
        """The SAE.

        Args:
            method: its name, for messages. target: whose latents are used; None where none are.

        Raises:
            UserError: there is none.
        """
        if self.sae is None:
            raise UserError(f"The edit method {method} needs an SAE of the site {self.cut.site.name}.")
        self.uses(labelled=target is not None)
        return self.sae

    def refuse_absent(self, target: Target) -> None:
        """Raises UserError unless each of the target's classes has train images."""
        if not target.classes or bool(self.class_means[list(target.classes)].isnan().any()):
            raise UserError(f"{target.name} has no train images, so that no edit can be fitted to it.")

    def own_mean(self, target: Target) -> Float[Tensor, " M"]:
        """The mean activation of the target's classes, each counted alike.

        Raises:
            UserError: some of them has no train images.
        """
        self.refuse_absent(target)
        self.uses_classes(target.classes)
        return self.class_means[list(target.classes)].mean(dim=0)

    def cross_covariance(self, target: Target) -> Float[Tensor, " M"]:
        """``E[(a − E a) z]``, where ``z`` is 1 for rows of the target and 0 for others; float64.

        Raises:
            UserError: some class of the target has no train images, or no other class has any.
        """
        self.refuse_absent(target)
        self.uses_classes(target.classes)
        mine = torch.isin(self.labels, torch.tensor(target.classes))
        if bool(mine.all()):
            raise UserError(f"{target.name} has all train images, so that nothing tells it from other classes.")
        sizes = torch.stack([(self.labels == label).sum() for label in target.classes]).double()
        pooled = (sizes @ self.class_means[list(target.classes)]) / sizes.sum()
        return (pooled - self.mean) * (sizes.sum() / len(self.rows))


def lead_and_unit(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], target: Target
) -> tuple[Float[Tensor, ""], float]:
    """By how much the images' own classes lead the strongest class outside of the target, in the mean, and the same as
    a unit: at least a tenth of the logits' spread.

    Args:
        logits, labels: of images of the target.

    Raises:
        UserError: all classes belong to the target.
    """
    own = torch.tensor(target.classes, device=logits.device)
    if len(own.unique()) == logits.shape[1]:
        raise UserError(f"{target.name} is all classes, so that there is no other that it could lead.")
    others = logits.index_fill(1, own, -torch.inf).amax(dim=1)
    lead = (logits.gather(1, labels.to(own)[:, None])[:, 0] - others).mean()
    return lead, max(float(lead.detach()), 0.1 * float(logits.detach().std()))
