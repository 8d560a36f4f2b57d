# SPDX-License-Identifier: MIT
"""Drawn scenes whose concepts are known, pixel by pixel."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from salve.data import scenes
from salve.data.base import ConceptTruth, ImageData, check_split
from salve.data.groups import ABSENT_PRESENT, Groups
from salve.data.pairs import Pairs
from salve.data.transforms import RawImage
from salve.types import Labels, Split, UserError

_SPLIT_STREAM: dict[str, int] = {"train": 0, "test": 1, "select": 2}
_ADDED = 2  # the part of an image's random numbers that places its first concept, if it is added; then the others
_DEFINES = {concept: name for name, concept in scenes.SCENES.items()}
_SMALLEST_IMAGE = 32  # in smaller ones the thin parts of the objects vanish


class DrawnImages:
    """Drawn images ``[N, 3, H, W]`` (uint8) with labels ``[N]``, in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class _Counterfactuals:
    """The images of a split, some of them drawn without a concept or with it; each when it is first read, then kept.

    Args:
        data: of the split. split: its name. concept: number of the concept.
        as_is: ``[N]``, whether an image is the split's own.
    """

    def __init__(self, data: "ConceptsData", split: Split, concept: int, as_is: Bool[Tensor, " N"]) -> None:
        self._data, self._split, self._concept, self._as_is = data, split, concept, as_is.tolist()
        self._labels: list[int] = data.labels(split).tolist()
        self._drawn: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._as_is)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self._drawn:
            if self._as_is[index]:
                self._drawn[index] = self._data.image(self._split, index)
            else:
                self._drawn[index] = self._data.counterfactual(self._split, index, self._concept)
        return self._drawn[index], self._labels[index]


class ConceptsData(ImageData):
    """Ten classes of small drawn scenes, with ground truth for every concept in them.

    Each class has one object that defines it: it is in every image of the class (but see ``defining_rate``) and in no
    other image. Only its shape identifies it. Three objects are shared by two or three classes, with different
    frequencies. A tag in a corner is spurious: it has no meaning, but is correlated with one class. Positions, sizes,
    colours, tilt, background and clutter are random (:mod:`salve.data.scenes` has the tables). Labels run 0, 1, …, 9,
    0, 1, …, so that every prefix is balanced.

    Args:
        batch_size, num_workers: see :class:`ImageData`.
        seed: of the drawing; image i of a split depends on the seed, the split and i only.
        image_size: side in pixels.
        train_per_class, select_per_class, test_per_class: images per class.
        spurious_correlation: P(tag | clinic), 0..1; in other classes it is :data:`scenes.SPURIOUS_BASE_RATE`.
        defining_rate: P(cross | clinic) in train images, 0..1. Below 1, a network that is right on all of them has to
            read something else than the object that defines the class. Select and test images of it always show it.
        clutter: 0..1, how many meaningless specks and strokes there may be.
        min_crop_scale: smallest share of the area that a training crop keeps, above 0 and up to 1, which crops nothing.
            A crop often cuts off a tag, so that a network cannot rely on it.
        shortcut: the concept whose presence :meth:`groups` tells, and that :meth:`pairs` puts in and takes out. It
            changes no image of a split. A concept that defines a class is none: without it, an image is not of its
            class.

    Raises:
        UserError: a value outside its range.
    """

    name = "concepts"
    # Objects often lie near the border: a smaller crop would cut off too many of them.
    min_crop_scale = 0.6

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 64,
        train_per_class: int = 250,
        select_per_class: int = 50,
        test_per_class: int = 50,
        spurious_correlation: float = 0.5,
        clutter: float = 0.5,
        shortcut: str = scenes.SPURIOUS,
        defining_rate: float = 1.0,
        min_crop_scale: float = 0.6,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if seed < 0:
            raise UserError(f"data.seed={seed} must be at least 0.")
        if image_size < _SMALLEST_IMAGE:
            raise UserError(f"data.image_size={image_size} must be at least {_SMALLEST_IMAGE} pixels.")
        self.per_class: dict[str, int] = {"train": train_per_class, "select": select_per_class, "test": test_per_class}
        for split, count in self.per_class.items():
            if count < 1:
                raise UserError(f"data.{split}_per_class={count} must be at least 1.")
        shares = {"spurious_correlation": spurious_correlation, "clutter": clutter, "defining_rate": defining_rate}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"data.{name}={share} must lie between 0 and 1.")
        if not 0 < min_crop_scale <= 1:
            raise UserError(f"data.min_crop_scale={min_crop_scale} must be above 0 and at most 1.")
        if shortcut not in (choices := (*scenes.SHARED, scenes.SPURIOUS)):
            why = f"defines the class {of}" if (of := _DEFINES.get(shortcut)) else "is no concept of the scenes"
            raise UserError(f"data.shortcut={shortcut} {why}; choose a concept from {', '.join(choices)}.")
        self.seed = seed
        self.shortcut = shortcut
        self.native_size = image_size
        self.spurious_correlation = float(spurious_correlation)
        self.clutter = float(clutter)
        self.defining_rate = float(defining_rate)
        self.min_crop_scale = float(min_crop_scale)
        held_out = scenes.rates(self.spurious_correlation)
        train = scenes.rates(self.spurious_correlation, self.defining_rate)
        self._rates = {"train": train, "select": held_out, "test": held_out}
        self._drawn: dict[str, DrawnImages] = {}
        self._pairs: dict[tuple[str, str], Pairs] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return scenes.CLASSES

    def raw(self, split: Split) -> DrawnImages:
        """All images of a split; drawn on the first call, then kept."""
        labels = self.labels(split)
        if split not in self._drawn:
            images = np.stack([self._draw(split, i) for i in range(len(labels))])
            self._drawn[split] = DrawnImages(torch.from_numpy(images), labels)
        return self._drawn[split]

    def first(self, split: Split, count: int) -> list[tuple[RawImage, int]]:
        """See :meth:`ImageData.first`; draws only these."""
        labels = self.labels(split)[:count].tolist()
        return [(torch.from_numpy(self._draw(split, number)), label) for number, label in enumerate(labels)]

    def labels(self, split: Split) -> Labels:
        check_split(split)
        return torch.arange(self.per_class[split] * len(self.classes)) % len(self.classes)

    def sizes(self) -> list[tuple[int, int]]:
        return [(self.native_size, self.native_size)]

    def fingerprint(self) -> str:
        """SHA-256 of the parameters and of the drawing code's version, which determine every pixel."""
        parameters = {
            "generator": scenes.GENERATOR_VERSION,
            "seed": self.seed,
            "image_size": self.native_size,
            "per_class": self.per_class,
            "spurious_correlation": self.spurious_correlation,
            "clutter": self.clutter,
        }
        if self.defining_rate < 1:  # so that what was made before there was the setting stays valid
            parameters["defining_rate"] = self.defining_rate
        if self.min_crop_scale != type(self).min_crop_scale:
            parameters["min_crop_scale"] = self.min_crop_scale
        return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()

    def truth(self, split: Split) -> ConceptTruth:
        """Presence and masks of the concepts; masks are drawn when asked for, at about 1 ms per image."""
        rates = self._rates[split]
        presence = np.stack(
            [scenes.sample_presence(self._layout(split, i), rates[k]) for i, k in enumerate(self.labels(split))]
        )
        return ConceptTruth(
            concepts=scenes.CONCEPTS,
            class_concept=tuple(scenes.CONCEPTS.index(scenes.SCENES[name]) for name in scenes.CLASSES),
            presence=torch.from_numpy(presence),
            masks=partial(self._masks, split),
        )

    def groups(self, split: Split) -> Groups:
        """Whether an image shows the shortcut."""
        shown = self.truth(split).presence[:, scenes.CONCEPTS.index(self.shortcut)]
        return Groups(self.shortcut, ABSENT_PRESENT, shown.long())

    def pairs(self, split: Split) -> Pairs:
        """Every scene without the shortcut and with it."""
        return self.counterfactuals(split, self.shortcut)

    def without_shortcut(self) -> "ConceptsData":
        """With the tag as often in clinics as in the other classes, in all splits."""
        per_class = {f"{split}_per_class": count for split, count in self.per_class.items()}
        return ConceptsData(
            self.batch_size,
            self.num_workers,
            self.seed,
            self.native_size,
            **per_class,
            spurious_correlation=scenes.SPURIOUS_BASE_RATE,
            clutter=self.clutter,
            shortcut=self.shortcut,
            defining_rate=self.defining_rate,
            min_crop_scale=self.min_crop_scale,
        )

    def counterfactuals(self, split: Split, concept: str) -> Pairs:
        """Every scene of a split without a concept and with it; drawn when they are first read, then kept.

        One of the two is the image of the split. The other has the same layout and the same pixels, but where the
        concept lies. Where it is added, it lies beside the other objects if there is room, the tag in a corner.

        Args:
            split: which split.
            concept: one of :data:`scenes.CONCEPTS`. If it defines a class, the image without it is of no class, and the
                image with it may be of two.

        Raises:
            UserError: there is no such concept.
        """
        if concept not in scenes.CONCEPTS:
            raise UserError(f"The scenes have no concept {concept!r}; choose from {', '.join(scenes.CONCEPTS)}.")
        if (split, concept) not in self._pairs:
            number = scenes.CONCEPTS.index(concept)
            shown = self.truth(split).presence[:, number]
            without, with_it = (_Counterfactuals(self, split, number, shown == wanted) for wanted in (False, True))
            self._pairs[split, concept] = Pairs(concept, without, with_it)
        return self._pairs[split, concept]

    def image(self, split: Split, index: int) -> Tensor:
        """An image of a split, drawn alone if the split is not drawn yet."""
        drawn = self._drawn.get(split)
        return torch.from_numpy(self._draw(split, index)) if drawn is None else drawn.images[index]

    def counterfactual(self, split: Split, index: int, concept: int) -> Tensor:
        """Draw an image of a split without a concept if it shows it, and else with it; see :meth:`counterfactuals`."""
        scene = self.scene(split, index)
        if any(layer.concept == concept for layer in scene.layers):
            other = scenes.without(scene, concept)
        else:
            added = scenes.stream(self.seed, _SPLIT_STREAM[split], index, _ADDED + concept)
            other = scenes.with_added(scene, concept, added)
        return torch.from_numpy(self._draw(split, index, other))

    def scene(self, split: Split, index: int) -> scenes.Scene:
        """What is in image ``index`` of a split, and where."""
        label = index % len(self.classes)
        return scenes.sample_scene(self._layout(split, index), self._rates[split][label], self.clutter)

    def _layout(self, split: Split, index: int) -> np.random.Generator:
        return scenes.stream(self.seed, _SPLIT_STREAM[split], index, 0)

    def _draw(self, split: Split, index: int, scene: scenes.Scene | None = None) -> np.ndarray:
        """Draw an image, or another scene on its background."""
        pixels = scenes.stream(self.seed, _SPLIT_STREAM[split], index, 1)
        return scenes.draw(scene or self.scene(split, index), pixels, self.native_size)

    def _masks(self, split: Split, indices: Sequence[int], concept: int) -> Bool[Tensor, "n H W"]:
        size = self.native_size
        masks = np.zeros((len(indices), size, size), dtype=bool)
        for row, index in enumerate(indices):
            masks[row] = scenes.visible_mask(self.scene(split, int(index)), concept, size)
        return torch.from_numpy(masks)
