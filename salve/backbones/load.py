"""Backbones by name: torchvision's and timm's models, their weights, and the preprocessing that the weights expect."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models as torchvision_models

from salve.backbones.sites import find_site
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
        state = read_state_dict(Path(weights))
        model = _create(library, name, _classes_in(state, library, name, args), args)
        _load_strictly(model, state, weights)
        fits = find_site(model, "last") is not None and _head(model).out_features == num_classes
    if not fits:
        _replace_head(model, num_classes)
    return model, fits


def _create(library: str, name: str, classes: int | None, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    if classes is not None:
        args = {**args, "num_classes": classes}
    try:
        if library == "torchvision":
            return torchvision_models.get_model(name, weights="DEFAULT" if pretrained else None, **args)
        return timm.create_model(name, pretrained=pretrained, **args)
    except (ValueError, RuntimeError, TypeError) as error:
        known = torchvision_models.list_models() if library == "torchvision" else timm.list_models()
        if name.split(".")[0] in known:
            raise UserError(f"backbone {name} of {library} could not be built: {error}") from error
        near = [other for other in known if other.startswith(name[:5])][:8]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"backbone.name={name} is no model of {library}{hint}.") from error
    except OSError as error:  # urllib's and the hub's errors are OSErrors
        raise UserError(
            f"The ImageNet weights of {name} could not be downloaded by {library} ({error}); "
            "give backbone.weights the path of a state_dict, or random."
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a plain ``state_dict`` from a safetensors or torch file; half precision is cast to float32.

    Raises:
        UserError: no such file, or it holds no ``state_dict``. Nothing is ever unpickled.
    """
    if not path.is_file():
        raise UserError(f"backbone.weights={path} is neither random, imagenet nor a file.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} could not be read as a state_dict: {error}") from error
    except Exception as error:  # weights_only raises pickle.UnpicklingError, which has no narrower base
        raise UserError(f"{path} holds more than tensors, so it was not loaded: {type(error).__name__}.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no plain state_dict (parameter names to tensors).")
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in state.items()}


def _classes_in(state: Mapping[str, Tensor], library: str, name: str, args: dict[str, Any]) -> int | None:
    """How many classes the head in a state_dict has; None, the library's default, where it has no such head."""
    with torch.device("meta"):
        skeleton = _create(library, name, 1, dict(args))
    weight = state.get(f"{find_site(skeleton, 'last').readers[0]}.weight")
    return None if weight is None else int(weight.shape[0])


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
    path = find_site(model, "last").readers[0]
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Linear(_head(model).in_features, num_classes))


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
    """
    if library == "torchvision":
        chosen = _torchvision_preset(name)
        fixed = getattr(model, "image_size", None)
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
        fixed = getattr(embed, "img_size", (None,))[0]
    if fixed is not None and fixed != chosen.size:
        chosen = _resized(chosen, int(fixed))
    elif fixed is None and not pretrained:
        chosen = replace(_resized(chosen, native_size), resize=None)
    given = {key: value for key, value in overrides.items() if value is not None}
    if "size" in given:
        chosen = _resized(chosen, int(given.pop("size")))
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
