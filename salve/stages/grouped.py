# SPDX-License-Identifier: MIT
"""Images with their groups, class × value of an attribute, and what a changed network says of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from salve.artifacts import digest_of_tensors
from salve.backbones.cut import Cut
from salve.backbones.graph import GraphTail
from salve.data.base import RawImages, TransformedImages
from salve.editing.methods.base import changed_head, head_weights
from salve.editing.methods.change import Change
from salve.editing.methods.fitting import effects_on_lead
from salve.sae import SAE
from salve.sae.positions import at_positions, pooled
from salve.stages.context import StageContext
from salve.stages.measure import AT_ONCE
from salve.stages.through_tail import HELD_BYTES
from salve.types import Labels, Split

#: With fewer labelled images of a group, what is chosen on them may be chance: its accuracy has a standard error of up
#: to 16 points.
FEW_LABELLED = 10
#: Groups that a remark names.
_NAMED = 5


@dataclass(frozen=True)
class Grouped:
    """Images of a split with their classes and the values of an attribute.

    Where the data have pairs, every image counts without the mark and with it, the former first: so all groups have
    images, however rare they are in the split. Without them, it is the images of the split whose value is known.

    Attributes:
        name: of the attribute. values: names of its V values. labels: ``[n]``. value: ``[n]``, index into ``values``.
        numbers: ``[n]``, of the images in the split. sources: for each value of a pair, or alone: the images.
        source: ``[n]``, index into ``sources``. paired: whether image ``i`` and ``i + n/2`` are a pair.
        object: ``[n]``, the same for images that must not judge each other: of one object, or a pair.
    """

    name: str
    values: tuple[str, ...]
    labels: Labels
    value: Int[Tensor, " n"]
    numbers: Int[Tensor, " n"]
    sources: tuple[RawImages, ...]
    source: Int[Tensor, " n"]
    paired: bool
    object: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def group(self) -> Int[Tensor, " n"]:
        """``label · V + value``."""
        return self.labels * len(self.values) + self.value

    def drawn(self, per_group: int, seed: int) -> "Grouped":
        """So many images of each group at most, drawn by the seed; pairs are not kept together."""
        chosen: list[int] = []
        for group in self.group.unique().tolist():
            own = (self.group == group).nonzero()[:, 0]
            order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed * 100_003 + group))
            chosen += own[order[:per_group]].tolist()
        return self.at(torch.tensor(chosen), paired=False)

    def at(self, rows: Int[Tensor, " m"], paired: bool) -> "Grouped":
        """Some of the images."""
        return Grouped(
            *(self.name, self.values, self.labels[rows], self.value[rows], self.numbers[rows]),
            *(self.sources, self.source[rows], paired, self.object[rows]),
        )


def grouped(context: StageContext, split: Split) -> Grouped | None:
    """The images of a split whose groups are known; None if the data know neither pairs nor an attribute."""
    labels, data = torch.as_tensor(context.data.labels(split)), context.data
    groups, pairs = data.groups(split), data.pairs(split)
    every = torch.arange(len(labels))
    objects = data.objects(split)
    objects = every if objects is None else objects
    if pairs is not None:
        value = torch.arange(2).repeat_interleave(len(labels))
        values = groups.values if groups is not None and groups.name == pairs.name else ("absent", "present")
        sources = (pairs.without, pairs.with_mark)
        of_pairs = (labels.repeat(2), value, every.repeat(2), sources, value, True, objects.repeat(2))
        return Grouped(pairs.name, values, *of_pairs)
    if groups is None:
        return None
    known = groups.of_image >= 0
    of_known = (labels[known], groups.of_image[known], every[known])
    source, own = torch.zeros_like(every[known]), objects[known]
    return Grouped(groups.name, groups.values, *of_known, (data.raw(split),), source, False, own)


def group_name(context: StageContext, images: Grouped, group: int) -> str:
    """The name of a group, such as "church, place water"."""
    label, value = divmod(group, len(images.values))
    return ", ".join(filter(None, (context.classes[label], f"{images.name} {images.values[value]}".strip())))


def labels_remark(context: StageContext, labels: int) -> str:
    """A caution about groups with few labelled select images, which choose suspects and repairs; empty if none has.

    Args:
        context: of the run. labels: images of each group whose attribute is looked at, at most; 0 for none.
    """
    images = grouped(context, "select") if labels else None
    if images is None:
        return ""
    counts = torch.bincount(images.group, minlength=len(context.classes) * len(images.values)).clamp_max(labels)
    few = [group for group in counts.argsort(stable=True).tolist() if counts[group] < FEW_LABELLED]
    if not few:
        return ""
    named = "; ".join(f"{group_name(context, images, group)} ({int(counts[group])})" for group in few[:_NAMED])
    more = f"; and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
    return (
        f"In {len(few)} of {len(counts)} groups, suspects and repairs are chosen on fewer than {FEW_LABELLED} labelled "
        f"select images: {named}{more}. What so few choose may be chance: give more select images their "
        f"{images.name}, and look at more of each group (audit.labels)."
    )


def attribute_of(context: StageContext) -> dict[str, Any]:
    """What an artifact's key holds of the attribute: its name and values, and which image has which."""
    found: dict[str, Any] = {}
    splits: tuple[Split, ...] = get_args(Split)
    for split in splits:
        groups = context.data.groups(split)
        pairs = None if split == "train" else context.data.pairs(split)  # of train images none are made
        if groups is not None:
            digest = digest_of_tensors({"of_image": groups.of_image})
            found[split] = {"name": groups.name, "values": list(groups.values), "images": digest}
        if (objects := context.data.objects(split)) is not None:
            found[f"{split}_objects"] = digest_of_tensors({"of_image": objects})
        if pairs is not None:
            found[f"{split}_pairs"] = pairs.name
    return found


def of_split(context: StageContext, split: Split) -> Grouped:
    """All images of a split, as one value of an attribute that is always there."""
    labels = torch.as_tensor(context.data.labels(split))
    zero, every = torch.zeros_like(labels), torch.arange(len(labels))
    objects = context.data.objects(split)
    own = every if objects is None else objects
    return Grouped("", ("",), labels, zero, every, (context.data.raw(split),), zero, False, own)


def train_shares(context: StageContext, images: Grouped) -> Float[Tensor, " G"] | None:
    """How many train images each group of some images has, float64; None if these know the attribute of none."""
    groups = context.data.groups("train")
    if groups is None or groups.values != images.values:
        return None
    numbered = groups.numbered(torch.as_tensor(context.data.labels("train")))
    if not bool((numbered >= 0).any()):
        return None
    return torch.bincount(numbered[numbered >= 0], minlength=len(context.classes) * len(groups.values)).double()


class _Items(Dataset):
    """Preprocessed images of several sources."""

    def __init__(self, sources: Sequence[Dataset], source: Sequence[int], numbers: Sequence[int]) -> None:
        self._sources, self._source, self._numbers = sources, source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self._sources[self._source[index]][self._numbers[index]][0]
        return image


class Running:
    """Runs images through a changed network, in order, and keeps what it can of them in memory.

    At the last site these are the activations. At others it is the images' tails, as far as ``room`` goes.

    Args:
        context: of the run. cut: the network. images: which. room: bytes that may be held.
    """

    def __init__(self, context: StageContext, cut: Cut, images: Grouped, room: int = HELD_BYTES) -> None:
        self._context, self._cut = context, cut
        assert context.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
        transform = context.data.preprocess.eval_transform()
        sources = [TransformedImages(raw, transform) for raw in images.sources]
        self._items = (sources, images.source.tolist(), images.numbers.tolist())
        size = context.data.batch_size
        self._parts = [range(at, min(at + size, len(images))) for at in range(0, len(images), size)]
        self._tails: dict[int, GraphTail] = {}
        self._room = room
        self._rows: Tensor | None = None

    @torch.no_grad()
    def logits(self, change: Change | None = None) -> Float[Tensor, "n C"]:
        """The logits of a changed network, in float32 on the CPU; without a change, of the network as it is.

        Args:
            change: of the site's activations, or of the weights.
        """
        edit = None if change is None else change.activations
        weights = change.weights() if change is not None and change.weights is not None and edit is None else {}
        if self._cut.linear is not None:
            assert weights.keys() <= head_weights(self._cut), "at the last site, only the head is changed"
            head = changed_head(self._cut, weights) if weights else self._cut.linear
            return head(self.rows() if edit is None else edit(self.rows()[:, None])[:, 0]).float()
        found = []
        for tail in self._every_tail():
            if weights:
                found.append(tail.with_weights(weights))
            else:
                found.append(tail(tail.activations if edit is None else edit(tail.activations)))
        return torch.cat(found).float().cpu()

    @torch.no_grad()
    def rows(self) -> Float[Tensor, "n M"]:
        """The activations at the last site, on the CPU."""
        if self._rows is None:
            self._rows = torch.cat([self._cut.read(images)[:, 0].cpu() for images in self.batches()])
        return self._rows

    @torch.no_grad()
    def activations(self) -> Iterator[Float[Tensor, "b P M"]]:
        """Of the site, in batches, on the CPU."""
        if self._cut.linear is not None:
            yield self.rows()[:, None]
            return
        for tail in self._every_tail():
            yield tail.activations.float().cpu()

    def attributions(self, labels: Labels) -> Float[Tensor, "n M"]:
        """The effect of each channel on the image's own lead, :func:`.effects_on_lead`, on the CPU.

        Args:
            labels: of the images.
        """
        if self._cut.linear is not None:
            return effects_on_lead(self._cut.linear, self.rows(), labels)
        found = []
        for tail, part in zip(self._every_tail(), self._parts, strict=True):
            found.append(effects_on_lead(tail, tail.activations, labels[part.start : part.stop]).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def latents_and_logits(self, sae: SAE, pool: str) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n C"]]:
        """The images' latents and the network's logits, in one pass.

        Args:
            sae: of the site, on the CPU. pool: how the latents at positions become an image's.
        """
        if self._cut.linear is not None:
            return torch.cat([sae.encode(part) for part in self.rows().split(2**10)]), self.logits()
        latents, logits = [], []
        at_once = max(1, AT_ONCE // (self._cut.site.count * max(sae.dictionary_size, sae.width)))
        for tail in self._every_tail():
            parts = tail.activations.float().cpu().split(at_once)
            latents += [pooled(at_positions(sae.encode, part), pool) for part in parts]
            logits.append(tail(tail.activations).float().cpu())
        return torch.cat(latents), torch.cat(logits)

    def batches(self, only: Sequence[range] | None = None) -> Iterator[Tensor]:
        """The images ``[b, 3, H, W]`` on the network's device."""
        sources, source, numbers = self._items
        parts = self._parts if only is None else only
        order = [at for part in parts for at in part]
        items = _Items(sources, [source[at] for at in order], [numbers[at] for at in order])
        loader = DataLoader(items, self._context.data.batch_size, num_workers=self._context.data.num_workers)
        for images in loader:
            yield self._context.on_device(images)

    def _every_tail(self) -> Iterator[GraphTail]:
        missing = [number for number in range(len(self._parts)) if number not in self._tails]
        loaded = self.batches([self._parts[number] for number in missing])
        for number in range(len(self._parts)):
            if (tail := self._tails.get(number)) is None:
                tail = self._cut.tail(next(loaded))
                if tail.bytes <= self._room:
                    self._room -= tail.bytes
                    self._tails[number] = tail
            yield tail
