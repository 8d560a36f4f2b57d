"""Load torchvision's and timm's models, with their weights."""

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
        model: the network, with as many outputs as it is used with.
        fits: whether the head came with the weights; otherwise it must be trained.
        remark: a sentence about what was changed to read a file; empty if nothing was.
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

    Checkpoints of training scripts are read too: see :func:`salve.backbones.weights.read_checkpoint` and
    :func:`salve.backbones.adapt.adapted`.

    Args:
        library: ``torchvision`` or ``timm``.
        name: the library's name of the model.
        weights: ``random``, ``imagenet`` (the library's download), or the path of a ``state_dict`` or checkpoint
            (``.safetensors``, or a torch file that loads with ``weights_only=True``).
        num_classes: ``C``, classes of the data.
        args: further arguments of the library's constructor.
        outputs: ``[C]``, the output unit of each class, for a network with more outputs than the data have classes.

    Returns:
        Without ``outputs``, the model gets ``num_classes`` outputs. A missing head, or one of another size, is replaced
        by a new one, and ``fits`` is false. ImageNet's head is always replaced, since its classes are others.
        With ``outputs``, the model keeps the head of its weights, and ``fits`` is true.

    Raises:
        UserError: an unknown name, a missing or unreadable file, weights that do not fit the model or are not finite,
            or output units that the weights do not have.
    """
    args = dict(args or {})
    if weights == "random":
        if outputs is not None:
            raise UserError(
                "data.outputs names the output units of a trained network, but backbone.weights=random; set it to "
                "imagenet or to the path of a state_dict."
            )
        return Loaded(_create(library, name, num_classes, args), False)
    done: list[str] = []
    if weights == "imagenet":
        # torchvision's weights load only into a model with their own head; timm adapts the head, if there is one.
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
                f"{had}, and one of {num_classes} outputs must be trained (finetune=probe trains only the head, "
                "finetune=full or scratch the whole network; data.outputs keeps the head of the file)"
            )
        if not headless:
            _replace_head(model, num_classes)
    return Loaded(model, fits, f"{weights}: {'; '.join(done)}." if done else "")


def _load_file(model: nn.Module, path: Path) -> tuple[bool, list[str]]:
    """Load a file into the model, which gets the file's head; whether it has none, and what was done to read it."""
    state, entry = read_checkpoint(path)
    reader = find_site(model, "last").readers[0].path
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
            f"The download of {library}'s ImageNet weights of {name} failed ({reason(error)}); set backbone.weights to "
            "the path of a state_dict, or to random."
        ) from error
    except (ValueError, RuntimeError, TypeError, AssertionError, KeyError) as error:
        known = torchvision_models.list_models() if library == "torchvision" else timm.list_models()
        if name.split(".")[0] in known:
            given = f" with backbone.args={args}" if args else ""
            raise UserError(f"{library}'s model {name} could not be built{given} ({reason(error)}).") from error
        near = get_close_matches(name, known, 5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"backbone.name={name} is no model of {library}{hint}.") from error


def _head(model: nn.Module) -> nn.Linear:
    head = model.get_submodule(find_site(model, "last").readers[0].path)
    assert isinstance(head, nn.Linear)
    return head


def _replace_head(model: nn.Module, num_classes: int) -> None:
    head = _head(model)
    parent, _, leaf = find_site(model, "last").readers[0].path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Linear(head.in_features, num_classes, head.bias is not None))
