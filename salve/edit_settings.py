# SPDX-License-Identifier: MIT
"""The settings of edits, and of their comparison; see :mod:`salve.settings`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from salve.values import ABOVE_ZERO, NOT_NEGATIVE, OneOf, Takes, Unit

#: The edit method of SALVE.
GATE = "gate"
#: The row of a comparison that is no edit: networks that never saw the class.
RETRAINED = "retrained"
Mode = Literal["suppress", "enhance"]
Scale = Literal["unit", "max"]
Channels = Literal["all", "aligned"]


@dataclass
class EditSettings:
    """How latents are turned into edits.

    Attributes:
        alpha: strengths, increasing from 0; all are measured in one pass.
        modes: suppress, enhance or both.
        scale: unit or max.
        channels: all or aligned.
        sets: further edits of several latents together, each a list of class names (their latents) or latent numbers.
        evaluate: how many edits are also measured through the edited network, image by image.
        images: of each class and split at most, always the same ones, that run through the network behind the site, at
            all sites but the last.
        resolution: there, the number of equal steps of the grid that are measured before the step in which a class
            gives way is divided.
        by_class: also keep every class's accuracy at every strength; the table grows with the square of the classes.
        method: gate, another name of :data:`salve.editing.methods.METHODS`, or ``package.module.Class``.
        args: settings of a method other than the gate, whose settings are scale and channels.
    """

    alpha: list[float]
    modes: Annotated[list[str], OneOf(*get_args(Mode))]
    scale: Annotated[str, OneOf(*get_args(Scale))]
    channels: Annotated[str, OneOf(*get_args(Channels))]
    sets: list[list[Any]] = field(default_factory=list)
    evaluate: Annotated[int, NOT_NEGATIVE, Unit("edits")] = 1
    images: Annotated[int, ABOVE_ZERO, Unit("images of a class and split")] = 16
    resolution: Annotated[int, ABOVE_ZERO, Unit("steps of the grid")] = 8
    by_class: bool = False
    method: str = GATE
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class CompareSettings:
    """How edit methods are compared, at the strength at which each takes its class to the same accuracy.

    Attributes:
        methods: names of edit methods, or of ``variants``; the first is the one that others are compared with.
        variants: by a name of one's own, a mapping with ``method`` (or ``_target_``) and that method's settings, and
            perhaps ``sae``, settings of :class:`salve.settings.SAESettings` in which its SAE differs from the run's.
        images: of each class and split, at most, on which strengths are chosen and effects measured.
        targets: names of the classes that are edited, or a number, counted from the first; None for all.
        retrained: also train one network without each of them, and measure how far edited networks are from it.
        relearn: after how many steps of training on all classes it is measured whether the class is back.
        on_select: also measure every edit on select images of all classes.
    """

    methods: list[str]
    images: Annotated[int, ABOVE_ZERO, Unit("images of a class and split")]
    variants: dict[str, Any] = field(default_factory=dict)
    targets: Annotated[Any, Takes("a list of class names, or a number of classes, or null")] = None
    retrained: bool = False
    relearn: list[int] = field(default_factory=list)
    on_select: bool = False
