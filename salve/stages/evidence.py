# SPDX-License-Identifier: MIT
"""What the images of a split say of latents as suspects."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from salve.backbones.cut import Cut
from salve.editing.recalibrate import group_accuracies
from salve.features import class_effects
from salve.features.suspects import false_positive_lift, nearest, pulls, separation, signs_towards
from salve.report.remarks import network_remark
from salve.sae import SAE
from salve.stages.context import StageContext
from salve.stages.effects import watched_attributions
from salve.stages.grouped import Grouped, Running, grouped, of_split
from salve.types import Split

#: Images that come nearest to each class without being of it, at most, on which effects are measured: as many as those
#: of the class itself for ``discover.select=effect``.
NEAREST = 32


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the images of a split say of every latent and class."""

    context: StageContext
    cut: Cut
    sae: SAE
    pool: str
    split: Split

    @cached_property
    def images(self) -> Grouped:
        return of_split(self.context, self.split)

    @cached_property
    def _running(self) -> Running:
        return Running(self.context, self.cut, self.images, room=0)

    @cached_property
    def read(self) -> tuple[Tensor, Tensor]:
        """Latents ``[N, d]`` and logits ``[N, C]`` of the images."""
        latents, logits = self._running.latents_and_logits(self.sae, self.pool)
        return latents, logits[:, : len(self.context.classes)]

    @cached_property
    def near(self) -> list[Tensor]:
        """By class, numbers of the images that come nearest to it without being of it."""
        _, logits = self.read
        return [nearest(logits, self.images.labels, k, NEAREST) for k in range(len(self.context.classes))]

    @cached_property
    def effects(self) -> Tensor:
        """``[C, d]``: how much the class's logit falls per strength of the gate, on the images that come nearest."""
        classes = len(self.context.classes)
        numbers = torch.cat(self.near)
        watched = torch.arange(classes).repeat_interleave(torch.tensor([len(near) for near in self.near]))
        if self.cut.linear is not None:
            rows = Running(self.context, self.cut, self.images.at(numbers, paired=False)).rows()
            given = rows.double() * self.cut.linear.weight[watched].double()
            attributions = torch.zeros(classes, rows.shape[1], dtype=torch.float64).index_add_(0, watched, given)
            attributions /= torch.bincount(watched, minlength=classes)[:, None]
        else:
            attributions = watched_attributions(self.context, self.cut, self.split, numbers.tolist(), watched)
        return class_effects(attributions, self.sae.decoder).nan_to_num(0.0)

    @cached_property
    def signs(self) -> Tensor:
        """``[C, d]``: the sign with which a latent tells the images that come nearest from others; 1 if it has one."""
        latents, _ = self.read
        found = []
        for k, near in enumerate(self.near):
            is_near = torch.zeros(len(latents), dtype=torch.bool).index_fill(0, near, True)
            others = ~is_near & (self.images.labels != k)
            found.append(signs_towards(latents, is_near, others))
        signs = torch.stack(found)
        return signs if self.sae.signed else torch.ones_like(signs)

    @cached_property
    def lifts(self) -> Tensor:
        """``[C, d]``; see :func:`false_positive_lift`. A latent is active where it is more than half of what it is in
        the mean over the images of the class; an image counts as taken for it if it is, or comes nearest."""
        latents, logits = self.read
        labels, found = self.images.labels, []
        for k, near in enumerate(self.near):
            others, own = labels != k, labels == k
            signed = latents * self.signs[k]
            taken = (logits.argmax(dim=1) == k).index_fill(0, near, True)
            level = (signed[own].mean(dim=0) / 2).clamp_min(1e-6)
            found.append(false_positive_lift(signed[others] > level, taken[others]))
        return torch.stack(found)

    def caution(self) -> str:
        """About a network that is seldom right; empty if there is none."""
        _, logits = self.read
        labels, classes = self.images.labels, len(self.context.classes)
        accuracies = group_accuracies(logits.argmax(dim=1) == labels, labels, classes)
        return network_remark(accuracies.tolist(), labels.bincount(minlength=classes).tolist(), self.split)

    def mistakes(self) -> Tensor:
        """``[C]``: the share of images of other classes that are taken for the class."""
        _, logits = self.read
        taken, labels = logits.argmax(dim=1), self.images.labels
        return torch.stack([(taken[labels != k] == k).double().mean() for k in range(logits.shape[1])])


@dataclass(frozen=True, eq=False)
class Attribute:
    """What images with a known attribute say.

    Attributes:
        name, values: of the attribute. value: ``[C]``, index of the value that goes with each class: where images of
            other classes are likelier taken for it. pull: ``[C]``, by how much.
        separation: ``[C, d]``, how well each latent tells that value within classes.
        images: that were labelled.
    """

    name: str
    values: tuple[str, ...]
    value: Tensor
    pull: Tensor
    separation: Tensor
    images: int

    @classmethod
    def of(cls, evidence: Evidence, labels: int = 0, like: "Attribute | None" = None) -> "Attribute":
        """From images of a split: so many of each group, or all; with the values that another one has found."""
        context = evidence.context
        images = grouped(context, evidence.split)
        assert images is not None, "the attribute is known"
        if labels:
            images = images.drawn(labels, context.seed)
        running = Running(context, evidence.cut, images, room=0)
        latents, logits = running.latents_and_logits(evidence.sae, evidence.pool)
        pull = pulls(logits.softmax(dim=1), images.labels, images.value, len(images.values))[: len(context.classes)]
        value = pull.argmax(dim=1) if like is None else like.value
        told = torch.stack([separation(latents, images.labels, images.value == v) for v in range(len(images.values))])
        signed = told[value] * (evidence.signs if evidence.sae.signed else 1)
        strength = pull.gather(1, value[:, None])[:, 0]
        return cls(images.name, images.values, value, strength, signed, len(images))
