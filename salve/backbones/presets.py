# SPDX-License-Identifier: MIT
"""The preprocessing that a backbone's weights expect."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision import models as torchvision_models

from salve.backbones import hugging_face
from salve.backbones.probe import can_read, own_size
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from salve.timm_alone import timm
from salve.types import UserError
from salve.values import OWN, TRANSFORMERS

#: Ratio of the resize to the crop if a preset has none.
USUAL_RATIO = 256 / 224


class Preset(NamedTuple):
    """How images are prepared, and where that comes from, in words for a report."""

    preprocess: Preprocess
    origin: str


def preset(
    library: str,
    name: str,
    weights: str,
    model: nn.Module,
    native_size: int,
    overrides: Mapping[str, Any],
    args: Mapping[str, Any] | None = None,
) -> Preset:
    """The preprocessing of the model's published weights, changed by what the user set.

    Weights from a file are assumed to be trained from the published ones. Random weights read the data at its own size,
    squashed, unless the network cannot read it. So do the weights of a model whose layers ``args`` change, and those of
    a network of one's own.

    Args:
        library, name, weights, model, args: the backbone, as for :func:`salve.backbones.load_backbone`.
        native_size: pixels of the data's own images.
        overrides: ``size`` and ``resize`` in pixels (``size`` alone keeps the preset's ratio between the two),
            ``squash`` (true: no crop; false: a crop, even if the preset has none), ``interpolation``, ``mean``,
            ``std``; those that are ``None`` are not set.

    Raises:
        UserError: a size that the architecture cannot read, or settings that contradict each other.
    """
    fixed, strict, argument = _fixed_size(library, model)
    chosen, origin = _published(library, name, model)
    ratio = USUAL_RATIO if chosen.resize is None else chosen.resize / chosen.size
    if fixed is not None and fixed != chosen.size:
        chosen = _resized(chosen, int(fixed))
        origin += f" at its fixed size of {fixed} pixels"
    elif fixed is None and (
        library == OWN or weights == "random" or (args and not _is_published(library, name, model, args))
    ):
        size = _readable(model, native_size, chosen.size)
        chosen = replace(chosen, size=size, resize=None)
        why = "the weights are random"
        if library == OWN:
            why = "a network of one's own has no preset"
        elif weights != "random":
            why = f"{name} is published without its backbone.args"
        origin = f"the data's own size, since {why}"
        if size != native_size:
            origin = f"a size that {name} can read, which the data's own {native_size} pixels are not"
    given = {key: value for key, value in overrides.items() if value is not None}
    if given:
        origin += f", with {', '.join(given)} set by backbone.preprocess"
    if "size" in given:
        size = int(given.pop("size"))
        if strict and fixed not in (None, size):
            raise UserError(
                f"backbone.preprocess.size={size} does not fit this {type(model).__name__}, which reads {fixed} "
                f"pixels; set backbone.args.{argument}={size} too."
            )
        chosen = _resized(chosen, size)
    squash = given.pop("squash", None)
    if squash and "resize" in given:
        raise UserError(
            f"backbone.preprocess.resize={given['resize']} is the shorter side before a crop, but "
            "backbone.preprocess.squash=true leaves out the crop; set only one of them."
        )
    if squash:
        chosen = replace(chosen, resize=None)
    elif squash is False and chosen.resize is None:
        chosen = replace(chosen, resize=round(ratio * chosen.size))
    for key in ("mean", "std"):
        if key in given:
            given[key] = tuple(float(value) for value in given[key])
    chosen = replace(chosen, **given)
    words = chosen.describe()
    if library == OWN:  # nobody else says how its images are normalised
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (chosen.mean, chosen.std))
        usual = (chosen.mean, chosen.std) == (IMAGENET_MEAN, IMAGENET_STD)
        words += f", normalised with {'the usual ' if usual else ''}mean {mean} and std {std}"
    return Preset(chosen, f"{origin}: {words}")


def _fixed_size(library: str, model: nn.Module) -> tuple[int | None, bool, str]:
    """The size that a network is built for, if it says one; whether it reads no other; and what argument sets it."""
    if library == "torchvision":
        return getattr(model, "image_size", None), True, "image_size"
    if library == "timm":
        embed = getattr(model, "patch_embed", None)
        size = (getattr(embed, "img_size", None) or (None,))[0]
        return size, getattr(embed, "strict_img_size", False), "img_size"
    return None, False, ""


def _readable(model: nn.Module, native_size: int, published: int) -> int:
    """The size of the data's own images, if the network can read them; otherwise the published, or its own."""
    for size in (native_size, published, own_size(model)):
        if can_read(model, size):
            return size
    return native_size  # what is wrong with it is said when it is tried


def _published(library: str, name: str, model: nn.Module) -> tuple[Preprocess, str]:
    """What was published with the network, and where that comes from; ImageNet's mean and deviation if nothing was."""
    if library == "torchvision":
        return _torchvision_preset(name), f"torchvision's preset of {name}"
    if library == "timm":
        return _timm_preset(model), f"timm's preset of {name}"
    chosen, remark = hugging_face.preprocess_of(name) if library == TRANSFORMERS else (None, "")
    if chosen is not None:
        return chosen, f"the preprocessor_config.json of {name}{remark}"
    usual = Preprocess(own_size(model), None, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    return usual, f"the usual, since {name} has no preprocessor_config.json that names a size"


def _torchvision_preset(name: str) -> Preprocess:
    try:
        transform = torchvision_models.get_model_weights(name).DEFAULT.transforms()
        return Preprocess(
            size=transform.crop_size[0],
            resize=transform.resize_size[0],
            interpolation="bicubic" if transform.interpolation.value == "bicubic" else "bilinear",
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )
    except (ValueError, AttributeError):
        return Preprocess(size=224, resize=256, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _timm_preset(model: nn.Module) -> Preprocess:
    config = timm.data.resolve_model_data_config(model)
    size = int(config["input_size"][-1])
    return Preprocess(
        size=size,
        # Rounded down, as timm does it.
        resize=None if config["crop_mode"] == "squash" else math.floor(size / config["crop_pct"]),
        interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _resized(preset: Preprocess, size: int) -> Preprocess:
    resize = None if preset.resize is None else round(size * preset.resize / preset.size)
    return replace(preset, size=size, resize=resize)


def _is_published(library: str, name: str, model: nn.Module, args: Mapping[str, Any]) -> bool:
    """Whether the model has the layers of the published one, so that its weights may be trained from those."""
    if library == TRANSFORMERS:
        return hugging_face.configuration(name, args) == hugging_face.configuration(name, {})
    make = torchvision_models.get_model if library == "torchvision" else timm.create_model
    with torch.device("meta"):
        published = make(name, num_classes=2)
    layers, others = _layers(model), _layers(published)
    # Not the number of outputs, which for the head is that of the data's classes.
    return layers.keys() == others.keys() and all(layers[path][1:] == others[path][1:] for path in layers)


def _layers(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the weights of convolutions and linear layers; other shapes may depend on the size of the image."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    return {path: layer.weight.shape for path, layer in layers.items()}
