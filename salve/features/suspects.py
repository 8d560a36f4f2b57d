# SPDX-License-Identifier: MIT
"""Suspects: latents that push images towards a class which they are not of (docs/method.md, *Audit*)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salve.types import Labels, Latents

#: Images by which a lift is drawn to 1: one image on which a latent fires proves little.
PRIOR = 5.0


def nearest(logits: Float[Tensor, "N C"], labels: Labels, label: int, count: int) -> Int[Tensor, " n"]:
    """Numbers of the images that are not of a class and come nearest to being taken for it, the nearest first.

    Args:
        logits, labels: of the images. label: the class. count: so many at most.
    """
    lead = logits[:, label] - logits.index_fill(1, torch.tensor([label]), -torch.inf).amax(dim=1)
    lead = lead.masked_fill(labels == label, -torch.inf)
    return lead.topk(min(count, int((labels != label).sum()))).indices


def signs_towards(latents: Latents, near: Bool[Tensor, " N"], others: Bool[Tensor, " N"]) -> Int[Tensor, " d"]:
    """The sign with which each latent tells images near to a class from others: 1 or −1."""
    more = latents[near].mean(dim=0) >= latents[others].mean(dim=0)
    return torch.where(more, 1, -1)


def false_positive_lift(
    active: Bool[Tensor, "N d"], taken: Bool[Tensor, " N"], prior: float = PRIOR
) -> Float[Tensor, " d"]:
    """How much likelier images are taken for a class where a latent is active, ``P(taken | active) / P(taken)``.

    ``P(taken | active)`` is drawn to ``P(taken)`` as if by ``prior`` further images, so that a latent that is hardly
    ever active has a lift of about 1.

    Args:
        active: whether a latent is active, for images that are not of the class.
        taken: whether they are taken for it. prior: images.
    """
    rate = taken.double().mean()
    if rate == 0:
        return torch.ones(active.shape[1], dtype=torch.float64)
    both = taken.double() @ active.double()
    return (both + prior * rate) / (active.sum(dim=0) + prior) / rate


def separation(latents: Latents, labels: Labels, present: Bool[Tensor, " N"]) -> Float[Tensor, " d"]:
    """How well each latent tells images with an attribute from images of the same class without it.

    The mean over classes of the difference of the two means, in units of the spread within groups (Cohen's d, pooled
    over all groups); 0 where the spread is 0. Classes that lack one of the two are left out.

    Args:
        latents: ``[N, d]``. labels: ``[N]``. present: ``[N]``, whether an image has the attribute.
    """
    wide = latents.double()
    differences, squares, degrees = [], torch.zeros(wide.shape[1], dtype=torch.float64), 0
    for label in labels.unique():
        own = wide[(labels == label) & present], wide[(labels == label) & ~present]
        if not all(map(len, own)):
            continue
        means = [part.mean(dim=0) for part in own]
        differences.append(means[0] - means[1])
        squares += sum(((part - mean) ** 2).sum(dim=0) for part, mean in zip(own, means, strict=True))
        degrees += len(own[0]) + len(own[1]) - 2
    if not differences or degrees < 1:
        return torch.zeros(wide.shape[1], dtype=torch.float64)
    spread = (squares / degrees).sqrt()
    return torch.where(spread > 0, torch.stack(differences).mean(dim=0) / spread.clamp_min(1e-300), 0.0)


def pulls(
    probabilities: Float[Tensor, "N C"], labels: Labels, value: Int[Tensor, " N"], values: int
) -> Float[Tensor, "C V"]:
    """How much likelier images of other classes are taken for a class where an attribute has a value than elsewhere.

    The difference of the mean probability of the class, in the mean over the other classes that have both.

    Args:
        probabilities: of the classes. labels: of the images. value: index of the attribute's value. values: ``V``.
    """
    classes = probabilities.shape[1]
    found = torch.zeros(classes, values, dtype=torch.float64)
    seen = torch.zeros_like(found)
    wide = probabilities.double()
    for label in labels.unique().tolist():
        for v in range(values):
            here, there = (labels == label) & (value == v), (labels == label) & (value != v)
            if here.any() and there.any():
                found[:, v] += wide[here].mean(dim=0) - wide[there].mean(dim=0)
                found[label, v] -= wide[here][:, label].mean() - wide[there][:, label].mean()  # of other classes only
                seen[:, v] += 1
                seen[label, v] -= 1
    return found / seen.clamp_min(1)


def unlabelled_score(effect: Float[Tensor, "*C d"], lift: Float[Tensor, "*C d"]) -> Float[Tensor, "*C d"]:
    """``max(0, effect) · max(0, log₂ lift)``: a suspect both moves the logit and marks the mistakes."""
    return effect.clamp_min(0) * lift.log2().clamp_min(0)


def labelled_score(effect: Float[Tensor, "*C d"], separation: Float[Tensor, "*C d"]) -> Float[Tensor, "*C d"]:
    """``max(0, effect) · max(0, separation)``."""
    return effect.clamp_min(0) * separation.clamp_min(0)
