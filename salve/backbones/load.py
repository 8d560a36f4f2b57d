# SPDX-License-Identifier: MIT
"""Load networks with their weights: torchvision's, timm's, Hugging Face's and the user's own."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from salve.backbones import hugging_face, own
from salve.backbones.adapt import adapted, check_finite, load_strictly
from salve.backbones.probe import outputs_of
from salve.backbones.sites import head_site
from salve.backbones.weights import read_checkpoint
from salve.files import digest_of
from salve.timm_alone import timm
from salve.types import UserError
from salve.untrusted import reason, some
from salve.values import LIBRARIES, OWN, PUBLISHED, TRANSFORMERS


class Loaded(NamedTuple):
    """A backbone with its weights.

    Attributes:
        model: the network, with as many outputs as it is used with. It gives a tensor of logits.
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
    """Build a network with its weights.

    Checkpoints of training scripts are read too: see :func:`salve.backbones.weights.read_checkpoint` and
    :func:`salve.backbones.adapt.adapted`.

    Args:
        library: ``torchvision``, ``timm``, ``transformers`` or ``own``.
        name: the library's name of the model; of one's own, ``package.module.name`` of what makes it.
        weights: ``random``; ``imagenet``, the download of torchvision or timm; ``pretrained``, those that a network of
            ``transformers`` or one's own comes with; or the path of a ``state_dict`` or checkpoint (``.safetensors``,
            or a torch file that loads with ``weights_only=True``).
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
    net = _Network(library, name, dict(args or {}))
    if library not in LIBRARIES:
        raise UserError(f"backbone.library={library} is unknown; the libraries are {some(LIBRARIES, len(LIBRARIES))}.")
    if weights in PUBLISHED.values() and weights != PUBLISHED[library]:
        raise UserError(
            f"backbone.weights={weights} is not for backbone.library={library}; set it to random, {PUBLISHED[library]} "
            "or the path of a state_dict."
        )
    if weights == "random" and outputs is not None:
        raise UserError(
            "data.outputs names the output units of a trained network, but backbone.weights=random; set it to "
            f"{PUBLISHED[library]} or to the path of a state_dict."
        )
    done: list[str] = []
    if weights == "random":
        model, count = net.make(num_classes), num_classes
        if library == OWN and (count := _outputs(model)) != num_classes:
            model = _with_outputs(net, model, num_classes)
        return Loaded(model, False)
    if weights in PUBLISHED.values():
        model, count = net.published(None if outputs is not None else num_classes)
        fits = library in (TRANSFORMERS, OWN) and count == num_classes
    else:
        path = Path(os.path.expanduser(weights))
        if not path.is_file():
            raise UserError(f"backbone.weights={weights} is neither random, {PUBLISHED[library]} nor a file.")
        model, count, done = _load_file(net, path, num_classes)
        fits = count == num_classes
    if outputs is not None:
        _check_outputs(count, outputs, weights)
        fits = True
    elif not fits:
        if weights != "imagenet":
            had = f"its head of {count} outputs is left out" if count else "it has no head"
            done.append(
                f"{had}, and one of {num_classes} outputs must be trained (finetune=probe trains only the head, "
                "finetune=full or scratch the whole network; data.outputs keeps the head of the file)"
            )
        if count:
            model = _with_outputs(net, model, num_classes)
    return Loaded(model, fits, f"{weights}: {'; '.join(done)}." if done else "")


def code_of(library: str, name: str, args: Mapping[str, Any], model: nn.Module) -> str:
    """A digest of what the name of a network does not say, so that results are made anew when it changes.

    It is of the code of one's own network, and of the configuration of one of Hugging Face's; empty for the others.
    """
    if library == OWN:
        return own.code_of(model, name)
    return digest_of(hugging_face.configuration(name, args)) if library == TRANSFORMERS else ""


class _Network(NamedTuple):
    """Which network; see :func:`load_backbone`."""

    library: str
    name: str
    args: dict[str, Any]

    def make(self, classes: int | None) -> nn.Module:
        """Build it with random weights and so many outputs, or as many as it has by itself."""
        if self.library == TRANSFORMERS:
            model = hugging_face.build(self.name, classes, self.args)
        elif self.library == OWN:
            model = own.build(self.name, classes, self.args)
        else:
            model = _create(self.library, self.name, classes, self.args)
        return _giving_logits(model)

    def published(self, classes: int | None) -> tuple[nn.Module, int]:
        """Build it with the weights that it comes with; and how many outputs these have, 0 if they have no head.

        Args:
            classes: of the data; None keeps all outputs of the weights.
        """
        if self.library == OWN:
            model = self.make(classes)
            check_finite(model.state_dict(), self.name)
            return model, _outputs(model)
        if self.library == TRANSFORMERS:
            model, missing = hugging_face.pretrained(self.name, self.args)
            model = _giving_logits(model)
            check_finite(model.state_dict(), self.name)
            head = _head(model)
            if head is not None and missing and {key.rpartition(".")[0] for key in missing} == {head[0]}:
                return _with_outputs(self, model, classes) if classes else model, 0
            if missing:
                raise UserError(f"The weights of {self.name} lack {some(missing)}.")
            return model, _outputs(model)
        # torchvision's weights load only into a model with their own head; timm adapts the head, if there is one.
        adapts = classes if self.library == "timm" else None
        model = _giving_logits(_create(self.library, self.name, adapts, self.args, pretrained=True))
        if getattr(model, "num_classes", None) == 0:
            return model, 0
        return model, _outputs(model)


def _giving_logits(model: nn.Module) -> nn.Module:
    """Let a network give a tensor also where it returns logits among other things; nothing in it gets another name."""
    model.register_forward_hook(_logits_of)
    return model


def _logits_of(_: nn.Module, __: object, output: Any) -> Any:
    """The logits in a dictionary, or in an output object, as transformers and torchvision's auxiliary heads have it."""
    return output.get("logits", output) if isinstance(output, Mapping) else getattr(output, "logits", output)


def _load_file(net: _Network, path: Path, num_classes: int) -> tuple[nn.Module, int, list[str]]:
    """The network with the weights and the head of a file; the file's outputs, 0 without a head; what was done."""
    state, entry = read_checkpoint(path)
    model = net.make(num_classes)
    head = _head(model)
    state, done = adapted(state, model, head[0] if head else "")
    done = [f"its entry {entry} is read"] * bool(entry) + done
    if head is None:
        return *_load_without_one_head(net, model, state, str(path)), done
    reader, layer = head
    own_head = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] == reader}
    headless = not own_head.keys() & state.keys()
    weight = state.get(f"{reader}.weight")
    if headless:
        state |= own_head
    elif weight is not None and weight.ndim == layer.weight.ndim and weight.shape[1:] == layer.weight.shape[1:]:
        _replace_head(model, reader, len(weight))
    load_strictly(model, state, str(path))
    return model, 0 if headless else _outputs(model), done


def _load_without_one_head(
    net: _Network, model: nn.Module, state: dict[str, Tensor], origin: str
) -> tuple[nn.Module, int]:
    """As :func:`_load_file`, for a network whose outputs are not those of one layer: several heads, or a map's mean."""
    of_classes = _of_classes(net)
    if of_classes and not of_classes & state.keys():
        state = state | {name: tensor for name, tensor in model.state_dict().items() if name in of_classes}
        load_strictly(model, state, origin)
        return model, 0
    counts = {len(state[name]) for name in of_classes & state.keys() if state[name].ndim}
    if len(counts) == 1 and (count := counts.pop()) != _outputs(model):
        model = net.make(count)
    load_strictly(model, state, origin)
    return model, _outputs(model)


def _of_classes(net: _Network) -> set[str]:
    """Names of the tensors whose shapes depend on the number of outputs."""
    with torch.random.fork_rng(devices=[]):
        few, more = (
            {name: tensor.shape for name, tensor in net.make(classes).state_dict().items()} for classes in (2, 3)
        )
    return {name for name, shape in few.items() if more.get(name) != shape}


def _with_outputs(net: _Network, model: nn.Module, classes: int) -> nn.Module:
    """The network with a new head of so many outputs."""
    head = _head(model)
    if head is not None:
        _replace_head(model, head[0], classes)
        return model
    of_classes = _of_classes(net)
    if not of_classes:
        raise UserError(
            f"This {type(model).__name__} has {_outputs(model)} outputs, but the data have {classes} classes: let "
            f"{net.name} take the argument num_classes, or set data.outputs."
        )
    other = net.make(classes)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in of_classes}
    other.load_state_dict({**other.state_dict(), **kept})
    return other


def _check_outputs(count: int, outputs: Sequence[int], weights: str) -> None:
    if count == 0:
        raise UserError(f"data.outputs names output units, but backbone.weights={weights} has no head.")
    if outside := [unit for unit in outputs if not 0 <= unit < count]:
        raise UserError(
            f"data.outputs names unit {outside[0]}, but the head of backbone.weights={weights} has the units 0 to "
            f"{count - 1}."
        )


def _create(library: str, name: str, classes: int | None, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
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


def _head(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """Path and layer of the head; None if the logits are not the outputs of one layer."""
    try:
        reader = head_site(model).readers[0].path
    except UserError:
        return None
    layer = model.get_submodule(reader)
    return (reader, layer) if isinstance(layer, nn.Linear | nn.Conv2d) else None


def _outputs(model: nn.Module) -> int:
    """How many outputs the network has."""
    head = _head(model)
    return len(head[1].weight) if head else outputs_of(model)


def _replace_head(model: nn.Module, reader: str, classes: int) -> None:
    head = model.get_submodule(reader)
    parent, _, leaf = reader.rpartition(".")
    biased = head.bias is not None
    if isinstance(head, nn.Conv2d):
        new: nn.Module = nn.Conv2d(head.in_channels, classes, 1, bias=biased)
    else:
        assert isinstance(head, nn.Linear)
        new = nn.Linear(head.in_features, classes, biased)
    setattr(model.get_submodule(parent), leaf, new)
