"""Backbones by name: torchvision's and timm's models, their weights, and the preprocessing that the weights expect."""

import os
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from torchvision import models as torchvision_models

from salve.backbones.sites import find_site
from salve.backbones.weights import read_state_dict, reason
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from salve.types import UserError


def load_backbone(
    library: str, name: str, weights: str, num_classes: int, args: Mapping[str, Any] | None = None
) -> tuple[nn.Module, bool]:
    """Build a plain torchvision or timm model with its weights.

    Args:
        library: ``torchvision`` or ``timm``.
        name: the library's own name of the model.
        weights: ``random``, ``imagenet`` (the library's download) or the path of a ``state_dict``
            (``.safetensors``, or a torch file that loads with ``weights_only=True``).
        num_classes: ``C``, classes of the data.
        args: further arguments of the library's constructor.

    Returns:
        The model with ``num_classes`` outputs, and whether its head came with the weights. A head of another size
        is replaced by a fresh one, which then has to be trained.

    Raises:
        UserError: unknown name, missing or unreadable file, weights that do not fit the model.
    """
    args = dict(args or {})
    if weights == "random":
        return _create(library, name, num_classes, args), False
    if weights == "imagenet":
        # torchvision loads its weights into a model of their own size only; timm fits the head, and some have none.
        classes = num_classes if library == "timm" else None
        model = _create(library, name, classes, args, pretrained=True)
        fits = False  # ImageNet's classes in ImageNet's order are not the data's, even when there are as many.
    else:
        path = Path(os.path.expanduser(weights))
        if not path.is_file():
            raise UserError(f"backbone.weights={weights} is neither random, imagenet nor a file.")
        state = read_state_dict(path)
        model = _create(library, name, num_classes, args)
        head = state.get(f"{find_site(model, 'last').readers[0]}.weight")
        if head is not None and head.ndim == 2:
            _replace_head(model, len(head))
        _load_strictly(model, state, weights)
        fits = _head(model).out_features == num_classes
    if not fits:
        _replace_head(model, num_classes)
    return model, fits


def _create(library: str, name: str, classes: int | None, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    if library not in ("torchvision", "timm"):
        raise UserError(f"backbone.library={library} is unknown; the libraries are torchvision and timm.")
    if classes is not None:
        args = {**args, "num_classes": classes}
    try:
        if library == "torchvision":
            return torchvision_models.get_model(name, weights="DEFAULT" if pretrained else None, **args)
        return timm.create_model(name, pretrained=pretrained, **args)
    except OSError as error:  # urllib's and the hub's errors are OSErrors, and sometimes ValueErrors too
        raise UserError(
            f"The ImageNet weights of {name} could not be downloaded by {library} ({reason(error)}); "
            "give backbone.weights the path of a state_dict, or random."
        ) from error
    except (ValueError, RuntimeError, TypeError, AssertionError, KeyError) as error:
        known = torchvision_models.list_models() if library == "torchvision" else timm.list_models()
        if name.split(".")[0] in known:
            given = f" with backbone.args={args}" if args else ""
            raise UserError(f"backbone {name} of {library} could not be built{given}: {reason(error)}.") from error
        near = get_close_matches(name, known, 5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"backbone.name={name} is no model of {library}{hint}.") from error


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    for keys, complaint in ((missing, "lacks"), (unknown, "has unknown"), (sorted(shapes), "has another shape for")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{origin} does not fit {type(model).__name__}: it {complaint} {', '.join(keys[:3])}{more}."
            )
    model.load_state_dict(state)


def _head(model: nn.Module) -> nn.Linear:
    head = model.get_submodule(find_site(model, "last").readers[0])
    assert isinstance(head, nn.Linear)
    return head


def _replace_head(model: nn.Module, num_classes: int) -> None:
    head = _head(model)
    parent, _, leaf = find_site(model, "last").readers[0].rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Linear(head.in_features, num_classes, head.bias is not None))


def preset(
    library: str, name: str, model: nn.Module, native_size: int, overrides: Mapping[str, Any], pretrained: bool
) -> Preprocess:
    """The preprocessing for a backbone: its weights' preset, changed by what the user set.

    Args:
        library, name, model: the backbone.
        native_size: pixels; used where neither the weights nor the architecture fix a size.
        overrides: fields of :class:`Preprocess`; ``None`` values are not set. A ``size`` alone keeps the preset's
            ratio between resize and crop.
        pretrained: whether the weights are the library's own ImageNet ones.

    Raises:
        UserError: a size that the architecture cannot read.
    """
    if library == "torchvision":
        chosen = _torchvision_preset(name)
        fixed, strict, argument = getattr(model, "image_size", None), True, "image_size"
    else:
        config = timm.data.resolve_model_data_config(model)
        size = int(config["input_size"][-1])
        chosen = Preprocess(
            size=size,
            resize=None if config["crop_mode"] == "squash" else round(size / config["crop_pct"]),
            interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
        embed = getattr(model, "patch_embed", None)
        fixed, strict = (getattr(embed, "img_size", None) or (None,))[0], getattr(embed, "strict_img_size", False)
        argument = "img_size"
    if fixed is not None and fixed != chosen.size:
        chosen = _resized(chosen, int(fixed))
    elif fixed is None and not pretrained:
        chosen = replace(_resized(chosen, native_size), resize=None)
    given = {key: value for key, value in overrides.items() if value is not None}
    if "size" in given:
        size = int(given.pop("size"))
        if strict and fixed not in (None, size):
            raise UserError(
                f"backbone.preprocess.size={size}, but this {type(model).__name__} reads {fixed} pixels; "
                f"give backbone.args.{argument}={size} with it."
            )
        chosen = _resized(chosen, size)
    if given.pop("squash", False):
        given["resize"] = None
    for key in ("mean", "std"):
        if key in given:
            given[key] = tuple(float(value) for value in given[key])
    return replace(chosen, **given)


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


def _resized(preset: Preprocess, size: int) -> Preprocess:
    resize = None if preset.resize is None else round(size * preset.resize / preset.size)
    return replace(preset, size=size, resize=resize)
