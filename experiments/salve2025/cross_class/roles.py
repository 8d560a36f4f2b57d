"""Find the latents that several classes depend on, and what each class does when they are suppressed.

Axes: ``N`` images, ``M`` width, ``d`` latents, ``C`` classes, ``K`` strengths.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from experiments.compare import CONFIDENCE, accuracy_at, margins, strength_to
from experiments.runs import SPLITS, SAERun, Study
from salve.backbones.tail import LinearTail
from salve.editing import gate
from salve.editing.curves import edit_curves
from salve.editing.verdict import LIMITS
from salve.features import kinds, shares
from salve.types import Activations, Contribution, Labels, Split

#: Strengths at which every latent is tried.
ALPHAS = (0, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 50, 60, 80, 100)
#: Losses and gains of accuracy from which on a class falls and rises.
FALL, RISE = LIMITS.others_worst_loss, LIMITS.others_mean_change
FALLS, REDUNDANT, STAYS, RISES, DRAGGED, NONE = "falls", "redundant", "stays", "rises", "dragged", ""


def weights(means: Float[Tensor, "C d"]) -> Float[Tensor, "C d"]:
    """How much a latent counts for a class, as a multiple of the class's average latent: ``|μ_kl| / mean_l |μ_kl|``.

    A share says nothing of size: it may be large for a latent that hardly ever leaves zero. A latent counts from 1 on.
    0 for a class without images or with nothing but zeros.
    """
    size = means.nan_to_num(0.0).abs()
    average = size.mean(dim=1, keepdim=True)
    return size / torch.where(average > 0, average, torch.ones_like(average))


def counting(means: Float[Tensor, "C d"], threshold: float) -> tuple[list[str], Bool[Tensor, "C d"]]:
    """What each of ``d`` latents is, and the classes that depend on it, by their means ``μ`` and the threshold τ.

    A class depends on a latent of which it holds a share of at least τ/2, and which counts for it (:func:`weights`). A
    latent that :func:`salve.features.kinds` calls cross-class stays so only if two classes depend on it in this
    sense; a latent that counts for no class is ``"idle"``.
    """
    counts = weights(means) >= 1
    depends = (shares(means) >= threshold / 2) & counts
    found: list[str] = []
    for latent, kind in enumerate(kinds(means, threshold)):
        if not bool(counts[:, latent].any()):
            found.append("idle")
        elif kind == "cross-class" and int(depends[:, latent].sum()) < 2:
            found.append("diffuse")
        else:
            found.append(kind)
    return found, depends


def gated_logits(tail: LinearTail, activations: Activations, gate: Contribution) -> Float[Tensor, "N C"]:
    """Logits behind a gate ``[M]`` on the activations."""
    return activations @ (tail.weight * gate).T + tail.bias


class Change(NamedTuple):
    """Mean change over a class's images, and half the width of its interval; NaN for a class without images."""

    mean: NDArray[np.float64]
    half: NDArray[np.float64]


def change_by_class(before: Tensor, after: Tensor, labels: Tensor, classes: int) -> Change:
    """Paired by image: ``mean ± t s / √n`` of ``after − before`` ``[N]`` in each class, ``[C]`` each."""
    mean, half = np.full((2, classes), np.nan)
    for k in range(classes):
        each = (after - before)[labels == k].double()
        count = len(each)
        if count:
            mean[k] = float(each.mean())
        if count > 1:
            half[k] = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * float(each.std()) / math.sqrt(count)
    return Change(mean, half)


class Backing(NamedTuple):
    """Whether a class can rely on another latent: its accuracy when its own latent is suppressed halfway.

    Attributes:
        own: the class's largest latent other than the shared one; −1 if there is none. alpha: the strength at which
            that alone halves the class's accuracy on select. alone: the accuracy then. joint: with the shared latent
            suppressed as well. control: with another class's own latent instead, as strongly as takes that class to
            ``LEVEL``; the mean over classes. All NaN where the own latent cannot halve it.
    """

    own: float
    alpha: float
    alone: float
    joint: float
    control: float


#: Of a class that does not depend on the latent, or does not keep its accuracy.
NO_BACKING = Backing(*[math.nan] * 5)


@dataclass(frozen=True)
class Roles:
    """What suppressing one latent does to each class, on one split, at strengths that select has chosen.

    Attributes:
        before, after: predictions ``[N]``. gain: of each image's margin, in logits ``[N]``.
        accuracy: before, ``[C]``. change: of accuracy. margin: change of the mean margin in logits.
        usual: mean change of a class's accuracy when another class's own latents are suppressed as far, ``[C]``.
        backing: by class that depends on the latent and keeps its accuracy. roles: ``C`` names.
    """

    before: Tensor
    after: Tensor
    gain: Tensor
    accuracy: NDArray[np.float64]
    change: Change
    margin: Change
    usual: NDArray[np.float64]
    backing: dict[int, Backing]
    roles: list[str]

    @property
    def clean(self) -> bool:
        """No class falls but those that depend on the latent."""
        return DRAGGED not in self.roles


def role(depends: bool, change: float, half: float, usual: float, backed: bool) -> str:
    """The role of one class.

    Args:
        depends: on the latent. change, half: of its accuracy. usual: see :class:`Roles`.
        backed: its own latent, suppressed halfway, loses ``FALL`` more when the shared one goes too than when
            another class's does.

    Returns:
        ``rises``: by ``RISE`` and more, and surely (``CONFIDENCE``) by more than is usual. ``falls``: a class that
        depends loses ``FALL`` or more; ``redundant``: loses less, and is backed; ``stays``: loses less, and is not.
        ``dragged``: a class that does not depend loses ``FALL`` or more. Else empty, as for one without images.
    """
    if math.isnan(change):
        return NONE
    if change >= RISE and change - half > max(0.0, usual):
        return RISES
    if change <= -FALL:
        return FALLS if depends else DRAGGED
    if not depends:
        return NONE
    return REDUNDANT if backed else STAYS


class Shared(NamedTuple):
    """A latent that several classes depend on: ``classes``, the strength at which the first of them is at ``LEVEL`` on
    select, and how much it counts for the second of them (:func:`weights`)."""

    latent: int
    classes: tuple[int, ...]
    alpha: float
    second: float


@dataclass(frozen=True)
class Reading:
    """One SAE's latents: what they are, and accuracy while each is suppressed.

    Attributes:
        kinds: ``d`` names of :func:`counting`. depends: ``[C, d]``. means: ``[C, d]``, of the train split.
    """

    study: Study
    run: SAERun
    means: Tensor
    kinds: list[str]
    depends: Tensor

    @classmethod
    def of(cls, study: Study, run: SAERun) -> "Reading":
        means = run.tensors("features", "class_means.safetensors")["class_means"]
        return cls(study, run, means, *counting(means, float(run.flat_settings["discover.threshold"])))

    @property
    def setting(self) -> tuple[int, float]:
        """Dictionary size and λ."""
        return int(self.run.flat_settings["sae.dictionary_size"]), float(self.run.flat_settings["sae.sparsity"])

    @property
    def in_use(self) -> list[int]:
        """Latents that count for some class."""
        return [latent for latent, kind in enumerate(self.kinds) if kind not in ("idle", "dead")]

    def column(self, latent: int) -> Tensor:
        """The latent's contribution vector ``[M]``."""
        return self.run.sae.decoder[:, latent].contiguous()

    def owners(self, latent: int) -> list[int]:
        """Classes that depend on a latent, or else the one that holds most of it."""
        found = self.depends[:, latent].nonzero()[:, 0].tolist()
        return found or [int(self.means[:, latent].nan_to_num(0.0).abs().argmax())]

    @cached_property
    def curves(self) -> dict[Split, dict[int, NDArray[np.float64]]]:
        """By split and latent in use, accuracy ``[K, C]`` at ``ALPHAS``."""
        return {
            split: {latent: self._curve(latent, *getattr(self.study.reader, split)) for latent in self.in_use}
            for split in SPLITS
        }

    def _curve(self, latent: int, activations: Activations, labels: Labels) -> NDArray[np.float64]:
        tail = self.study.tail
        alphas = torch.tensor(ALPHAS, dtype=tail.weight.dtype)
        return edit_curves(tail, activations, labels, self.column(latent), alphas)[0].numpy()

    @cached_property
    def alphas(self) -> dict[int, float]:
        """By latent in use, the strength at which the first of its owners is at ``LEVEL`` on select; ∞ if none gets
        there."""
        found = {}
        for latent, curve in self.curves["select"].items():
            strengths = [strength_to(np.array(ALPHAS), curve[:, k]) for k in self.owners(latent)]
            found[latent] = min((alpha for alpha in strengths if not math.isnan(alpha)), default=math.inf)
        return found

    def changes(self, latent: int, split: Split = "test") -> NDArray[np.float64]:
        """Change of every class's accuracy ``[C]`` at the latent's strength, linear between those of the grid."""
        curve, alpha = self.curves[split][latent], min(self.alphas[latent], ALPHAS[-1])
        return accuracy_at(np.array(ALPHAS), curve, alpha) - curve[0]

    def able(self, kind: str) -> list[int]:
        """The latents of a kind that take one of their classes to ``LEVEL`` on select."""
        return [latent for latent, name in enumerate(self.kinds) if name == kind and math.isfinite(self.alphas[latent])]

    def usual(self, split: Split) -> NDArray[np.float64]:
        """See :class:`Roles`: over class-defining latents that are able to; NaN if there are none."""
        known: list[list[float]] = [[] for _ in self.study.classes]
        for latent in self.able("class-defining"):
            owners, changes = self.owners(latent), self.changes(latent, split)
            for k, values in enumerate(known):
                if k not in owners:
                    values.append(float(changes[k]))
        return np.array([np.mean(values) if values else math.nan for values in known])

    @cached_property
    def shared(self) -> list[Shared]:
        """The latents that several classes depend on and that can take one of them to ``LEVEL`` on select."""
        weight = weights(self.means)
        found = []
        for latent in self.able("cross-class"):
            classes = sorted(self.owners(latent), key=lambda k: -float(weight[k, latent]))
            found.append(Shared(latent, tuple(classes), self.alphas[latent], float(weight[classes[1], latent])))
        return found

    def own_latent(self, k: int, but: int | None = None) -> int:
        """The largest latent of a class, besides one; −1 if there is none."""
        size = self.means[k].nan_to_num(0.0).abs()
        if but is not None:
            size[but] = 0
        return int(size.argmax()) if bool(size.any()) else -1

    def roles(self, shared: Shared, split: Split = "test") -> Roles:
        """What the classes do when a shared latent is suppressed at its strength, on the images of a split."""
        tail, classes, usual = self.study.tail, len(self.study.classes), self.usual(split)
        activations, labels = getattr(self.study.reader, split)
        first = gated_logits(tail, activations, torch.ones(tail.weight.shape[1]))
        last = gated_logits(tail, activations, gate(self.column(shared.latent), shared.alpha))
        before, after = first.argmax(dim=1), last.argmax(dim=1)
        gain = margins(last, labels) - margins(first, labels)
        nothing = torch.zeros_like(gain)
        accuracy = change_by_class(nothing, (before == labels).float(), labels, classes).mean
        right = change_by_class((before == labels).float(), (after == labels).float(), labels, classes)
        margin = change_by_class(nothing, gain, labels, classes)
        backing, roles = {}, []
        for k in range(classes):
            depends, change = k in shared.classes, float(right.mean[k])
            if depends and change > -FALL:
                backing[k] = self._backing(shared, k, split)
            backed = k in backing and backing[k].control - backing[k].joint >= FALL
            roles.append(role(depends, change, float(right.half[k]), float(np.nan_to_num(usual[k])), backed))
        return Roles(before, after, gain, accuracy, right, margin, usual, backing, roles)

    def _backing(self, shared: Shared, k: int, split: Split) -> Backing:
        """See :class:`Backing`; on the images of class ``k``."""
        nothing = Backing(own := self.own_latent(k, shared.latent), *[math.nan] * 4)
        activations, labels = getattr(self.study.reader, split)
        activations, labels = activations[labels == k], labels[labels == k]
        if own < 0 or not len(labels):
            return nothing
        tail, (choosing, known) = self.study.tail, self.study.reader.select
        curve = self._curve(own, choosing[known == k], known[known == k])[:, k]
        half = strength_to(np.array(ALPHAS), curve, float(curve[0]) / 2)
        if not math.isfinite(half):
            return nothing
        halved = gate(self.column(own), half)

        def right(*more: Tensor) -> float:
            """Accuracy behind further gates."""
            together = torch.stack([halved, *more]).prod(dim=0)
            return float((gated_logits(tail, activations, together).argmax(dim=1) == labels).double().mean())

        # The largest latents of the other classes, where they are class-defining and take their class to LEVEL.
        largest = [self.own_latent(m) for m in range(len(self.study.classes)) if m not in shared.classes]
        others = [right(gate(self.column(m), self.alphas[m])) for m in largest if m in self.able("class-defining")]
        alone, joint = right(), right(gate(self.column(shared.latent), shared.alpha))
        return Backing(own, half, alone, joint, float(np.mean(others)) if others else alone)
