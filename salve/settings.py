# SPDX-License-Identifier: MIT
"""The settings of a run's parts, each with the values that it may have.

The allowed values stand in the annotations of the fields (salve.values). Torch takes seconds to import, so nothing
here imports it: a wrong setting is refused at once.
"""

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args, get_type_hints

from salve.types import UserError
from salve.values import ABOVE_ZERO, LIBRARIES, NOT_NEGATIVE, OWN, SEED, SHARE, OneOf, Range, Takes, Unit
from salve.variants import TRAITS, Traits, traits_of

#: Precision of the matrix products in an SAE's training.
Precision = Literal["float32", "bf16"]
#: Shares of an SAE's steps in which its learning rate rises, and in which it falls to zero at the end.
WARMUP, DECAY = 0.05, 0.2
#: How the latent of a class is chosen.
Selection = Literal["largest", "margin", "effect"]
#: How the latents at the positions of a map become those of an image.
Pool = Literal["mean", "max"]

#: Settings and groups that a run's key leaves out, each with the reason why they do not change the results. Of the
#: trainer's settings the key keeps two: precision changes the arithmetic, and memory decides in which order rows are
#: shuffled. The number of devices changes only the order in which sums are rounded, as another processor does.
NOT_COMPUTED = {
    "name": "names folders",
    "output_dir": "says where results lie",
    "trainer.accelerator": "a GPU computes what a CPU does, up to rounding",
    "trainer.devices": "all ranks together take the batches that one device takes",
    "trainer.strategy": "says who starts the ranks",
    "logger": "records a training",
    "sweep": "groups runs",
    "cluster": "says where runs are made",
    "hydra": "says how runs are started",
    "data.num_workers": "the random numbers for an image depend on its index, not on the worker that loads it",
    "data.download": "brings the same images",
    "sae.ensemble": "each SAE of an ensemble is trained on the rows that it would be trained on alone",
}


@dataclass
class PreprocessSettings:
    """Changes to a backbone's preset; None keeps what the preset says.

    Attributes:
        size: side in pixels of the square that the backbone reads.
        resize: pixels of the shorter side before that square is cropped.
        squash: true resizes to the square without a crop, false crops.
        interpolation: bilinear or bicubic.
        mean, std: of the three channels, on the 0..1 scale.
    """

    size: Annotated[int | None, ABOVE_ZERO, Unit("pixels")] = None
    resize: Annotated[int | None, ABOVE_ZERO, Unit("pixels")] = None
    squash: bool | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class BackboneSettings:
    """Which backbone, with which weights.

    Attributes:
        library: torchvision, timm, transformers, or own for a network of the user's own.
        name: the library's name of the model; of one's own, what ``_target_`` names.
        weights: random; imagenet (torchvision, timm) or pretrained (the others), which it comes with; or a path.
        args: further arguments of the library's constructor.
        preprocess: changes to the preset.
        _target_: package.module.name of a class or function that makes a network of one's own.
    """

    library: Annotated[str, OneOf(*LIBRARIES)]
    name: str
    weights: str
    args: dict[str, Any] = field(default_factory=dict)
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)
    _target_: str | None = None

    def __post_init__(self) -> None:
        # Here and only here, so that keys and records name the file that is read, and the network that is made.
        self.weights, self.name = os.path.expanduser(self.weights), os.path.expanduser(self._target_ or self.name)
        self.library = self.library if self._target_ is None else OWN


@dataclass
class FinetuneSettings:
    """How the classifier is trained.

    Attributes:
        mode: ``full`` trains every weight, ``probe`` only the head on captured activations, ``none`` nothing. ``auto``
            is ``none`` when the weights bring a head that fits the data, and ``full`` when they do not.
        epochs, learning_rate, weight_decay, label_smoothing, warmup: see :class:`salve.backbones.Classifier`.
        patience: epochs without better select accuracy before training stops early; None never stops early.
        without: names of classes whose train and select images are left out. Their outputs of the head stay.
    """

    mode: Annotated[str, OneOf("auto", "full", "probe", "none")]
    epochs: Annotated[int, ABOVE_ZERO, Unit("epochs")]
    learning_rate: Annotated[float, ABOVE_ZERO]
    weight_decay: Annotated[float, NOT_NEGATIVE]
    label_smoothing: Annotated[float, SHARE]
    warmup: Annotated[float, SHARE, Unit("of the steps")]
    patience: Annotated[int | None, ABOVE_ZERO, Unit("epochs")]
    without: list[str] = field(default_factory=list)


@dataclass
class SAESettings:
    """Which SAE, and how it is trained.

    Attributes:
        variant: one of :data:`salve.variants.TRAITS`, or ``package.module.Class``, the user's own.
        dictionary_size: the number of latents, d.
        sparsity: λ. k: active latents.
        centre: subtract the mean activation first. Off by default, since it spoils the published edit
            (docs/method.md).
        learning_rate, batch_size: of Adam on cached activations.
        steps: optimiser steps. epochs: passes over the train images; where given, they replace ``steps``.
        warmup, decay: shares of the steps in which the learning rate rises, and in which it falls to zero at the end.
        seed: of the initial weights and the order of rows.
        ensemble: how many SAEs of a sweep are trained together at most (see :func:`salve.stages.can_share`); 1 trains
            each alone.
        bandwidth: for jumprelu. prefixes, base: for matryoshka.
        learn_b_dec: train ``b_dec``, which is subtracted before encoding and added after decoding.
        start: ``random``, or ``data``: decoder columns start as directions to training rows.
        decoder: ``trained``, or ``random``: the decoder stays as it was drawn, and only the rest is trained. A control.
        auxk: how many dead latents also reconstruct the error, at most; 0 is none.
        resample: how many times dead latents are reset, evenly over the first half of the steps; 0 is never. For when
            a latent is dead, see :meth:`salve.activations.Schedule.patience`.
        precision: ``float32`` or ``bf16``, of the matrix products in training; weights and their moments are float32.
        pool: at a map, how the latents at an image's positions become the image's: their ``mean``, or the ``max`` of
            each, for latents that are not negative.
        args: further arguments of the constructor of the user's own variant.
    """

    variant: Annotated[str, OneOf(*TRAITS, own=True)]
    dictionary_size: Annotated[int, ABOVE_ZERO, Unit("latents")]
    sparsity: Annotated[float, NOT_NEGATIVE]
    k: Annotated[int | None, Unit("latents")]
    centre: bool
    learning_rate: Annotated[float, ABOVE_ZERO]
    batch_size: Annotated[int, ABOVE_ZERO, Unit("rows")]
    steps: Annotated[int, ABOVE_ZERO, Unit("steps")]
    seed: Annotated[int, SEED]
    ensemble: Annotated[int, ABOVE_ZERO, Unit("SAEs")]
    bandwidth: float | None = None
    prefixes: list[float] = field(default_factory=list)
    base: str | None = None
    learn_b_dec: bool = False
    start: Annotated[str, OneOf("random", "data")] = "random"
    decoder: Annotated[str, OneOf("trained", "random")] = "trained"
    auxk: Annotated[int, NOT_NEGATIVE, Unit("latents")] = 0
    resample: Annotated[int, NOT_NEGATIVE, Unit("times")] = 0
    precision: Annotated[str, OneOf(*get_args(Precision))] = "float32"
    epochs: Annotated[int | None, ABOVE_ZERO, Unit("epochs")] = None
    warmup: Annotated[float, SHARE, Unit("of the steps")] = WARMUP
    decay: Annotated[float, SHARE, Unit("of the steps")] = DECAY
    pool: Annotated[str, OneOf(*get_args(Pool))] = "mean"
    args: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Check the settings against the variant and against each other.

        Raises:
            UserError: this variant has no such setting, or a combination is impossible.
        """
        kind = traits_of(self.variant)
        if unknown := [name for name in self.args if name not in kind.takes or hasattr(self, name)]:
            own = [name for name in kind.takes if not hasattr(self, name)]
            has = (
                f"those of sae.variant={self.variant} are {', '.join(own)}" if own else "they are for your own variant"
            )
            raise UserError(f"sae.args has {unknown[0]}; {has}.")
        kind.check(self.variant, self.dictionary_size, **self._given(kind))
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
        if self.pool == "max" and kind.signed:
            raise UserError(
                f"sae.pool=max is for latents that are not negative; those of sae.variant={self.variant} are signed."
            )
        if self.decoder == "random" and self.start == "data":
            raise UserError("sae.start=data chooses the decoder's columns, and sae.decoder=random leaves them random.")
        if self.warmup + self.decay > 1:
            raise UserError(
                f"sae.warmup={self.warmup} and sae.decay={self.decay} are shares of the steps, together at most 1."
            )

    def options(self) -> dict[str, Any]:
        """Arguments of the variant's constructor, without those that are not set."""
        given = self._given(traits_of(self.variant))
        return {name: value for name, value in given.items() if value not in (None, [])}

    def _given(self, kind: Traits) -> dict[str, Any]:
        return self.args | {name: getattr(self, name) for name in kind.takes if hasattr(self, name)}

    def scientific(self) -> dict[str, Any]:
        """All settings that the trained SAE depends on, except the seed."""
        left_out = {"seed", "ensemble", "pool", "epochs" if self.epochs is None else "steps"}
        # What came later is left out where it changes nothing, so that SAEs made before stay valid.
        left_out |= {name for name, idle in (("decoder", "trained"), ("args", {})) if getattr(self, name) == idle}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass
class CaptureSettings:
    """What is kept of a map; a vector site has one activation for each image, which is kept.

    Attributes:
        positions: of each image at most, drawn at random; SAEs are trained on them.
    """

    positions: Annotated[int, ABOVE_ZERO, Unit("positions of an image")]


@dataclass
class DiscoverSettings:
    """How latents are read.

    Attributes:
        threshold: τ, the share of a latent's class means from which a class owns it.
        select: ``margin``, ``largest`` or ``effect``.
        dominant: latents listed per class.
    """

    threshold: Annotated[float, Range(above=0, most=1), Unit("of the class means")]
    select: Annotated[str, OneOf(*get_args(Selection))]
    dominant: Annotated[int, ABOVE_ZERO, Unit("latents of a class")]


@dataclass
class ValidateSettings:
    """How many images and latents stage ``validate`` looks at.

    Attributes:
        pictures: classes that get pictures, counted from the first: their most activating images with saliency maps,
            and maximised activations. Tables and scores hold all classes.
        top_images: most activating test images per class.
        localise_images: images per class that are scored against masks.
        pointing_tolerance: pixels that a map's maximum may lie beside the object and still hit.
        random_latents: latents, drawn at random, that the latent of each class is compared with.
        faithfulness_steps: points of the insertion and deletion curves; 0 leaves the curves out.
        maximisation_steps: steps of activation maximisation; 0 leaves it out.
        concepts: name → folder with images of a concept, on which it is tested whether the classes depend (TCAV).
    """

    pictures: Annotated[int, NOT_NEGATIVE, Unit("classes")]
    top_images: Annotated[int, ABOVE_ZERO, Unit("images of a class")]
    localise_images: Annotated[int, ABOVE_ZERO, Unit("images of a class")]
    pointing_tolerance: Annotated[int, NOT_NEGATIVE, Unit("pixels")]
    random_latents: Annotated[int, NOT_NEGATIVE, Unit("latents")]
    faithfulness_steps: Annotated[int, NOT_NEGATIVE, Unit("points of a curve")]
    maximisation_steps: Annotated[int, NOT_NEGATIVE, Unit("steps")]
    concepts: dict[str, str] = field(default_factory=dict)


class TrainerArgument:
    """Marks a setting that is passed to Lightning's Trainer.

    Args:
        stages: the stages whose training it applies to.
    """

    def __init__(self, *stages: str) -> None:
        self.stages = stages


#: The stages that train, and so take a Trainer's arguments and callbacks.
TRAINING_STAGES = ("finetune", "discover")
#: An SAE takes many optimiser steps in what Lightning counts as one batch, and Lightning cannot change those steps.
_FINETUNE = TrainerArgument("finetune")
_BOTH = TrainerArgument(*TRAINING_STAGES)


@dataclass
class TrainerSettings:
    """Where trainings run, and further arguments of Lightning's Trainer (docs/training.md).

    Attributes:
        accelerator: what trainings run on.
        devices: how many there are on each node.
        strategy: with several devices, ``ddp_spawn`` starts their ranks, ``ddp`` expects torchrun or SLURM to have
            started them, and ``auto`` is either.
        precision: of fine-tuning.
        memory: GiB for the activations of a training, in each process; what does not fit is read from disk.
        accumulate_grad_batches: batches whose gradients are added up before a step.
        gradient_clip_val: the largest norm or value of a gradient. gradient_clip_algorithm: norm clips the norm of all
            gradients together, value each entry.
        limit_train_batches: batches of an epoch that it takes. log_every_n_steps: steps between two records.
        min_epochs, min_steps: how many a training takes at least, where it could stop early.
        deterministic: use only algorithms that give the same bits again; warn says where there are none.
        benchmark: let cuDNN take the fastest of its algorithms. profiler: measure what takes time.
        inference_mode: evaluate without recording anything for gradients; false is torch.no_grad.
        detect_anomaly: stop at the first NaN of a backward pass, and say where it arose.
        enable_model_summary: print the layers of what is trained.

    From accumulate_grad_batches on, names and meanings are Lightning's, and None is Lightning's default.
    """

    accelerator: Annotated[str, OneOf("auto", "cpu", "gpu", "cuda")]
    devices: Annotated[int, ABOVE_ZERO, Unit("devices of a node")]
    strategy: Annotated[str, OneOf("auto", "ddp_spawn", "ddp")]
    precision: Annotated[str, OneOf("auto", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")]
    memory: Annotated[float, ABOVE_ZERO, Unit("GiB of a process")] = math.inf
    accumulate_grad_batches: Annotated[int | None, ABOVE_ZERO, _FINETUNE, Unit("batches")] = None
    gradient_clip_val: Annotated[float | None, NOT_NEGATIVE, _FINETUNE] = None
    gradient_clip_algorithm: Annotated[str | None, OneOf("norm", "value"), _FINETUNE] = None
    # A whole number of batches or a share of them. OmegaConf cannot merge into a field of type int | float.
    limit_train_batches: Annotated[
        Any, ABOVE_ZERO, _FINETUNE, Takes("a whole number of batches, or a share of them, or null")
    ] = None
    min_epochs: Annotated[int | None, ABOVE_ZERO, _FINETUNE, Unit("epochs")] = None
    min_steps: Annotated[int | None, ABOVE_ZERO, _FINETUNE, Unit("steps")] = None
    deterministic: Annotated[Any, OneOf(True, False, "warn"), _BOTH] = None
    benchmark: Annotated[bool | None, _BOTH] = None
    inference_mode: Annotated[bool | None, _BOTH] = None
    detect_anomaly: Annotated[bool | None, _BOTH] = None
    profiler: Annotated[str | None, OneOf("simple", "advanced", "pytorch"), _BOTH] = None
    log_every_n_steps: Annotated[int | None, ABOVE_ZERO, _BOTH, Unit("steps")] = None
    enable_model_summary: Annotated[bool | None, _BOTH] = None

    def arguments(self, stage: str) -> dict[str, Any]:
        """The arguments of Lightning's Trainer that are set for the training of a stage."""
        hints = get_type_hints(TrainerSettings, include_extras=True)
        return {
            name: getattr(self, name)
            for name, hint in hints.items()
            for rule in getattr(hint, "__metadata__", ())
            if isinstance(rule, TrainerArgument) and stage in rule.stages and getattr(self, name) is not None
        }


def is_computed(key: str) -> bool:
    """Whether results depend on a setting, written ``sae.k`` or ``group/part``."""
    path = key.lstrip("+").replace("/", ".")
    return not any(path == idle or path.startswith(f"{idle}.") for idle in NOT_COMPUTED)
