"""Backbones by name: torchvision's and timm's models with their weights."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torchvision import models as torchvision_models

from salve.backbones.adapt import adapted, load_strictly
from salve.backbones.sites import find_site
from salve.backbones.weights import read_checkpoint
from salve.timm_alone import timm
from salve.types import UserError
from salve.untrusted import reason


class Loaded(NamedTuple):
    """A backbone with its weights.

    Attributes:
        model: with the outputs that it is used with.
        fits: whether its head came with the weights; if not, it has to be trained.
        remark: what of a file was read otherwise than it stands there, in a sentence; empty if nothing.
    """

    model: nn.Module
    fits: bool
    remark: str = ""


def load_backbone(
    library: str,
    name: str,
    weights: str,
    num_classes: int,
    args: Mapping[str, Any] | None = None,
    outputs: Sequence[int] | None = None,
) -> Loaded:
    """Build a plain torchvision or timm model with its weights.

    A file may hold them as training scripts leave them: see :func:`salve.backbones.weights.read_checkpoint` and
    :func:`salve.backbones.adapt.adapted`.

    Args:
        library: ``torchvision`` or ``timm``.
        name: the library's own name of the model.
        weights: ``random``, ``imagenet`` (the library's download) or the path of a ``state_dict`` or checkpoint
            (``.safetensors``, or a torch file that loads with ``weights_only=True``).
        num_classes: ``C``, classes of the data.
        args: further arguments of the library's constructor.
        outputs: ``[C]``, the output unit of each class, for a network that has more outputs than the data have classes.

    Returns:
        Without ``outputs`` the model has ``num_classes`` outputs: a head of another size, or none, is replaced by a
        fresh one, and ``fits`` is false; so it is for ImageNet's, whose classes are others even where they are as many.
        With ``outputs`` it keeps the head of its weights as it is, and ``fits`` is true.

    Raises:
        UserError: unknown name, missing or unreadable file, weights that do not fit the model or are not finite;
            weights without the output units that are named.
    """
    args = dict(args or {})
    if weights == "random":
        if outputs is not None:
            raise UserError(
                "data.outputs names the output units of a trained network, but backbone.weights=random; give imagenet "
                "or the path of a state_dict."
            )
        return Loaded(_create(library, name, num_classes, args), False)
    done: list[str] = []
    if weights == "imagenet":
        # torchvision loads its weights into a model of their own size only; timm fits the head, and some have none.
        classes = num_classes if library == "timm" and outputs is None else None
        model, fits = _create(library, name, classes, args, pretrained=True), False
        headless = getattr(model, "num_classes", None) == 0
    else:
        path = Path(os.path.expanduser(weights))
        if not path.is_file():
            raise UserError(f"backbone.weights={weights} is neither random, imagenet nor a file.")
        model = _create(library, name, num_classes, args)
        headless, done = _load_file(model, path)
        fits = not headless and _head(model).out_features == num_classes
    if outputs is not None:
        _check_outputs(0 if headless else _head(model).out_features, outputs, weights)
        fits = True
    elif not fits:
        if weights != "imagenet":
            had = "it has no head" if headless else f"its head of {_head(model).out_features} outputs is left out"
            done.append(
                f"{had}, and one of {num_classes} has to be trained: finetune=probe trains it alone, finetune=full or "
                "scratch the whole network, and data.outputs keeps the head that there is"
            )
        if not headless:
            _replace_head(model, num_classes)
    return Loaded(model, fits, f"{weights}: {'; '.join(done)}." if done else "")


def _load_file(model: nn.Module, path: Path) -> tuple[bool, list[str]]:
    """Whether the file lacks a head, and what was done to read the rest; the model's head becomes the file's."""
    state, entry = read_checkpoint(path)
    reader = find_site(model, "last").readers[0]
    state, done = adapted(state, model, reader)
    head = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] == reader}
    headless = not head.keys() & state.keys()
    weight = state.get(f"{reader}.weight")
    if headless:
        state |= head
    elif weight is not None and weight.ndim == 2 and weight.shape[1] == _head(model).in_features:
        _replace_head(model, len(weight))
    load_strictly(model, state, str(path))
    return headless, [f"its entry {entry} is read"] * bool(entry) + done


def _check_outputs(count: int, outputs: Sequence[int], weights: str) -> None:
    if count == 0:
        raise UserError(f"data.outputs names output units, but backbone.weights={weights} has no head.")
    if outside := [unit for unit in outputs if not 0 <= unit < count]:
        raise UserError(
            f"data.outputs names unit {outside[0]}, but the head of backbone.weights={weights} has the units 0 to "
            f"{count - 1}."
        )


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


def _head(model: nn.Module) -> nn.Linear:
    head = model.get_submodule(find_site(model, "last").readers[0])
    assert isinstance(head, nn.Linear)
    return head


def _replace_head(model: nn.Module, num_classes: int) -> None:
    head = _head(model)
    parent, _, leaf = find_site(model, "last").readers[0].rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Linear(head.in_features, num_classes, head.bias is not None))
