"""The settings of a run's parts, and the names that they may have; imports nothing that takes time.

A wrong setting is refused before torch is loaded, which alone takes seconds.
"""

import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from salve.types import UserError
from salve.variants import TRAITS, check_variant

#: The largest number that float32 holds. All that is computed is; a larger setting would be infinite.
LARGEST = 3.4028234663852886e38

FinetuneMode = Literal["auto", "full", "probe", "none"]
#: Of the products in an SAE's training.
Precision = Literal["float32", "bf16"]
#: Shares of an SAE's steps in which its learning rate rises, and in which it falls to zero in the end.
WARMUP, DECAY = 0.05, 0.2
#: How a class's latent is chosen.
Selection = Literal["largest", "margin"]
Mode = Literal["suppress", "enhance"]
Scale = Literal["unit", "max"]
Channels = Literal["all", "aligned"]

#: What key_settings and record of an SAE do not hold as a setting: the key_settings has the seed beside them.
NO_SETTING = ("seed", "ensemble")


@dataclass
class PreprocessSettings:
    """Overrides of a backbone's preset; None keeps what the preset says.

    Attributes:
        size: side in pixels of the square that the backbone reads. resize: pixels of the shorter side before the crop
            of that square. squash: true resizes to the square without a crop, false crops.
        interpolation: bilinear or bicubic.
        mean, std: of the three channels, on the 0..1 scale.
    """

    size: int | None = None
    resize: int | None = None
    squash: bool | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class BackboneSettings:
    """Which backbone, with which weights.

    Attributes:
        library: torchvision or timm. name: the library's name of the model. weights: random, imagenet, or a path.
        args: further arguments of the library's constructor.
        preprocess: overrides of the preset.
    """

    library: str
    name: str
    weights: str
    args: dict[str, Any] = field(default_factory=dict)
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)

    def __post_init__(self) -> None:
        # Once, so that keys and records see the same file as what reads it.
        self.weights = os.path.expanduser(self.weights)


@dataclass
class FinetuneSettings:
    """How the classifier is trained.

    Attributes:
        mode: ``full`` trains every weight, ``probe`` the head alone on captured activations, ``none`` nothing; ``auto``
            is ``none`` when the head came with the weights and ``full`` when it did not.
        epochs, learning_rate, weight_decay, label_smoothing, warmup: see :class:`salve.backbones.Classifier`.
        patience: epochs without better select accuracy before it stops early; None never does.
    """

    mode: str
    epochs: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    warmup: float
    patience: int | None


@dataclass
class SAESettings:
    """Which SAE, and how it is trained.

    A field with a default came later than the others: keys and records name it only where it differs, so that what was
    made before is still found.

    Attributes:
        variant: one of :data:`salve.variants.TRAITS`. dictionary_size: d. sparsity: λ. k: active latents.
        centre: subtract the mean activation first; off by default, since it spoils the published edit (docs/method.md).
        learning_rate, batch_size: of Adam on cached activations. steps: its optimiser steps, whatever the number of
            images.
        seed: of the initial weights and the order of rows.
        ensemble: how many SAEs of a sweep are trained together at most (see :func:`salve.stages.can_share`); 1 trains
            each alone.
        bandwidth: of jumprelu. prefixes, base: of matryoshka.
        learn_b_dec: train ``b_dec``, which is subtracted before encoding and added after decoding.
        start: ``random``, or ``data``, where decoder columns start as directions to training rows.
        auxk: dead latents that also reconstruct the error, at most. resample: how many times dead latents begin anew,
            evenly over the first half of the steps. 0 is off; dead: see :meth:`salve.activations.Schedule.patience`.
        precision: ``float32`` or ``bf16``, of the products in training; weights and their moments are float32 anyway.
        epochs: passes over the train images, which take the place of ``steps`` where they are given.
        warmup, decay: shares of the steps in which the learning rate rises, and in which it falls to zero in the end.
    """

    variant: str
    dictionary_size: int
    sparsity: float
    k: int | None
    centre: bool
    learning_rate: float
    batch_size: int
    steps: int
    seed: int
    ensemble: int
    bandwidth: float | None = None
    prefixes: list[float] = field(default_factory=list)
    base: str | None = None
    learn_b_dec: bool = False
    start: str = "random"
    auxk: int = 0
    resample: int = 0
    precision: str = "float32"
    epochs: int | None = None
    warmup: float = WARMUP
    decay: float = DECAY

    def check(self) -> None:
        """Raises UserError for settings outside their range, or that this variant does not have."""
        kind = TRAITS[self.variant]
        check_variant(self.variant, self.dictionary_size, **{name: getattr(self, name) for name in kind.takes})
        for name in ("bandwidth", "prefixes", "base"):
            if getattr(self, name) and name not in kind.takes:
                users = ", ".join(variant for variant, other in TRAITS.items() if name in other.takes)
                raise UserError(f"sae.{name} is a setting of {users}, not of sae.variant={self.variant}.")
        for name in ("auxk", "resample"):
            value = getattr(self, name)
            if value and kind.revived_by != name:
                users = ", ".join(variant for variant, other in TRAITS.items() if other.revived_by == name)
                raise UserError(f"sae.{name}={value} is for {users}, not for sae.variant={self.variant}.")
        if self.auxk > self.dictionary_size:
            raise UserError(f"sae.auxk={self.auxk} must be at most sae.dictionary_size={self.dictionary_size}.")
        if self.warmup + self.decay > 1:
            raise UserError(
                f"sae.warmup={self.warmup} and sae.decay={self.decay} are shares of the steps, together at most 1."
            )

    def options(self) -> dict[str, Any]:
        """What the variant's constructor is given; what is not set is left to it."""
        given = {name: getattr(self, name) for name in TRAITS[self.variant].takes}
        return {name: value for name, value in given.items() if value not in (None, [])}

    def scientific(self) -> dict[str, Any]:
        """All that the SAE depends on, except the seed."""
        values = asdict(self)
        for item in fields(self):
            fresh = item.default if item.default_factory is MISSING else item.default_factory()
            if item.name in NO_SETTING or values[item.name] == fresh:
                del values[item.name]
        if self.epochs is not None:
            del values["steps"]
        return values


@dataclass
class DiscoverSettings:
    """How latents are read.

    Attributes:
        threshold: τ, the share from which a class owns a latent. select: ``margin`` or ``largest``.
        dominant: latents listed per class.
    """

    threshold: float
    select: str
    dominant: int


@dataclass
class ValidateSettings:
    """How much is looked at.

    Attributes:
        pictures: classes of which pictures are made, the first ones: their most activating images with saliency maps,
            and maximised activations. Tables and scores have all classes.
        top_images: most activating test images per class. localise_images: images per class scored against masks.
        pointing_tolerance: pixels that a map's maximum may lie beside the object and still hit.
        random_latents: other latents, drawn at random, that each class's latent is compared with.
        faithfulness_steps: points of the insertion and deletion curves; 0 leaves them out.
        maximisation_steps: of activation maximisation; 0 leaves it out.
    """

    pictures: int
    top_images: int
    localise_images: int
    pointing_tolerance: int
    random_latents: int
    faithfulness_steps: int
    maximisation_steps: int


@dataclass
class EditSettings:
    """How latents are turned into edits.

    Attributes:
        alpha: strengths, increasing from 0; all are measured in one pass. modes: suppress, enhance or both.
        scale: unit or max. channels: all or aligned. sets: further edits of several latents together, each a list of
            class names (their latents) or latent numbers.
        evaluate: how many edits are also measured through the edited network, image by image.
        by_class: also keep every class's accuracy at every strength, a table that grows with the square of the classes.
    """

    alpha: list[float]
    modes: list[str]
    scale: str
    channels: str
    sets: list[list[Any]] = field(default_factory=list)
    evaluate: int = 1
    by_class: bool = False


@dataclass
class TrainerSettings:
    """Where things run; all fields but the last are those of Lightning's Trainer.

    Attributes:
        accelerator: auto, cpu, gpu or cuda. devices: on each node. strategy: with several devices, ``ddp_spawn`` starts
            their ranks, ``ddp`` finds them started by torchrun or SLURM, ``auto`` is either. precision: of fine-tuning.
        memory: GiB for the activations of a training, in each process; what does not fit is read from disk.
    """

    accelerator: str
    devices: int
    strategy: str
    precision: str
    memory: float = math.inf
