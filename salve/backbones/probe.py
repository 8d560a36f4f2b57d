# SPDX-License-Identifier: MIT
"""Find the head of any network, and the spatial map in front of it, by running the network once on noise.

No line names an architecture.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salve.system import first_line
from salve.types import UserError

#: Most tokens that may stand before those of the image.
MOST_PREFIX_TOKENS = 16
#: The share of a map's positions on which the activation must depend.
SEEN = 0.5
#: Sides in pixels that are tried for a network that does not say what it is made for, the most likely first.
SIZES = (224, 32, 64, 96, 128, 256, 299, 384, 160, 192, 448, 512, 28)
#: Of the largest logit, by how much the logits may differ from what the head makes of the activations.
SAME = 1e-4


class Head(NamedTuple):
    """A layer whose outputs are the logits, and whose input is one vector for each image.

    Attributes:
        reader: path of the layer: ``nn.Linear``, which is given ``[N, M]``, or a 1 × 1 ``nn.Conv2d``, which is given
            ``[N, M, 1, 1]`` and whose weight is ``[C, M, 1, 1]``.
        width: ``M``, the number of channels that it reads.
        map: path of the module whose output, ``[N, M', H, W]``, ``[N, H, W, M']`` or ``[N, T, M']``, is the last map
            of which at least half of the positions have an influence on the activation; empty if there is none.
        prefix_tokens: how many of the ``T`` tokens come before those of the image.
    """

    reader: str
    width: int
    map: str
    prefix_tokens: int


class _Call(NamedTuple):
    """A layer that could be a head, with what it was given and what it gave."""

    layer: nn.Linear | nn.Conv2d
    given: Tensor
    output: Tensor


def own_size(model: nn.Module) -> int:
    """Side in pixels of the images that a network is made for.

    If it does not say, the first of :data:`SIZES` that it can read.
    """
    size = _said_size(model)
    return size if size is not None else next((size for size in SIZES if can_read(model, size)), SIZES[0])


def _said_size(model: nn.Module) -> int | None:
    published = getattr(model, "pretrained_cfg", None) or {}
    said = (
        getattr(model, "image_size", None),  # torchvision
        getattr(getattr(model, "patch_embed", None), "img_size", None),  # timm; what is published may be another size
        published.get("input_size"),
        getattr(getattr(model, "config", None), "image_size", None),  # transformers
    )
    for one in said:
        size = one[-1] if isinstance(one, list | tuple) and one else one
        if isinstance(size, int):
            return size
    return None


def can_read(model: nn.Module, size: int) -> bool:
    """Whether a network can read square images of so many pixels a side; it is not changed."""
    with evaluating(model), torch.no_grad():
        try:
            model(_noise(model, size))
        except Exception:  # a model that was never seen before raises what it likes
            return False
    return True


def outputs_of(model: nn.Module) -> int:
    """How many outputs a network has; it is not changed.

    Raises:
        UserError: it gives no vector of logits for each image.
    """
    with evaluating(model), torch.no_grad():
        size = own_size(model)
        try:
            logits = model(_noise(model, size))
        except Exception as error:
            raise _cannot_read(model, size, error) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(f"This {type(model).__name__} does not give one vector of logits for each image.")
    return logits.shape[1]


def probed_head(model: nn.Module, size: int) -> Head:
    """Find the head of a network.

    Args:
        model: an image classifier; it is not changed.
        size: side of its square images in pixels.

    Raises:
        UserError: the network cannot read such images, or its logits are not the outputs of one linear layer (or 1 × 1
            convolution) that reads one vector for each image.
    """
    name = type(model).__name__
    read: dict[str, _Call] = {}
    given: list[tuple[str, Tensor]] = []
    hooks = []
    for path, module in model.named_modules():

        def keep(module: nn.Module, inputs: tuple[object, ...], output: object, path: str = path) -> None:
            if isinstance(output, Tensor):
                given.append((path, output))
                if isinstance(module, nn.Linear | nn.Conv2d) and inputs and isinstance(inputs[0], Tensor):
                    read[path] = _Call(module, inputs[0], output)

        hooks.append(module.register_forward_hook(keep))
    try:
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            logits = model(_noise(model, size).requires_grad_())
            heads = [path for path, call in read.items() if _is_vector(call) and _gives(call, logits)]
            if len(heads) != 1:
                why = _why_not(logits, read)
                raise UserError(
                    f"This {name} does not end in one linear layer ({why}), so it has no site called last; salve-sites "
                    "lists those inside."
                )
            activations = read[heads[0]].given
            path, prefix = _map(activations, given) if activations.requires_grad else ("", 0)
    except UserError:
        raise
    except Exception as error:  # a model that was never seen before raises what it likes
        raise _cannot_read(model, size, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    return Head(heads[0], activations.shape[1], path, prefix)


def _cannot_read(model: nn.Module, size: int, error: Exception) -> UserError:
    hint = "; it may say in an attribute image_size what it reads" if _said_size(model) is None else ""
    return UserError(
        f"This {type(model).__name__} cannot read {size} × {size} images ({first_line(error)}), so its "
        f"site is unknown{hint}."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context with the model in eval mode; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            # Not module.train(), which would also set the children.
            module.training = training


def _noise(model: nn.Module, size: int) -> Tensor:
    """Two images ``[2, 3, size, size]``, always the same, of the kind of the model's weights."""
    weight = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(weight)


def _is_vector(call: _Call) -> bool:
    """Whether a layer is linear in one vector for each image."""
    if isinstance(call.layer, nn.Linear):
        return call.given.ndim == 2
    plain = call.layer.groups == 1 and call.layer.kernel_size == (1, 1)
    return plain and call.given.shape[2:] == call.output.shape[2:] == (1, 1)


def _gives(call: _Call, logits: object) -> bool:
    """Whether the logits are what a layer's weight makes of its input, perhaps in another shape."""
    if not isinstance(logits, Tensor) or logits.numel() != call.output.numel():
        return False
    linear = nn.functional.linear(call.given.flatten(1), call.layer.weight.flatten(1), call.layer.bias)
    flat = logits.flatten(1)
    if linear.shape != flat.shape:
        return False
    same = logits is call.output or logits.data_ptr() == call.output.data_ptr()
    # By its numbers where it is a copy; all zeros say nothing, and some fresh heads begin so.
    return (same or bool(flat.any())) and bool((linear - flat).abs().max() <= SAME * flat.abs().max())


def _why_not(logits: object, read: Mapping[str, _Call]) -> str:
    """Why no layer's outputs are the logits, in a part of a sentence."""
    if not isinstance(logits, Tensor):
        return f"it gives a {type(logits).__name__} and no tensor of logits"
    if logits.ndim != 2 or len(logits) != 2:
        return f"it gives a tensor of shape {list(logits.shape)} for two images, and not one vector of logits for each"
    last = {
        path: call
        for path, call in read.items()
        if call.layer.weight.shape[0] == logits.shape[1] and _has_effect(call.output, logits)
    }
    if len(last) > 1:
        return f"it combines the outputs of several, {', '.join(last)}"
    for path, call in last.items():
        if not _is_vector(call):
            return f"its last, {path}, reads a map and not one vector for each image"
        return f"it changes the outputs of its last, {path}, before it returns them"
    return "its logits are the outputs of no linear layer or 1 × 1 convolution in it"


def _has_effect(tensor: Tensor, logits: Tensor) -> bool:
    if not (tensor.requires_grad and logits.requires_grad):
        return False
    # Coefficients that differ, because the plain sum is constant behind a softmax.
    coefficients = torch.arange(1, logits.shape[1] + 1).cos().to(logits)
    (gradient,) = torch.autograd.grad((logits * coefficients).sum(), tensor, retain_graph=True, allow_unused=True)
    return gradient is not None


def _map(activations: Tensor, given: list[tuple[str, Tensor]]) -> tuple[str, int]:
    """Path and prefix tokens of the last map that the activation depends on at most of its positions."""
    last: dict[int, tuple[str, Tensor]] = {}
    for path, tensor in given:
        # A tensor goes by the outermost module, and has the place at which something wrote into it last.
        last.pop(id(tensor), None)
        last[id(tensor)] = path, tensor
    maps = [
        (path, tensor, channels)
        for path, tensor in last.values()
        if tensor.requires_grad and (channels := _channels(tensor)) is not None
    ]
    if not maps:
        return "", 0
    # Coefficients that differ, because the plain sum is constant behind a LayerNorm.
    coefficients = torch.arange(1, activations.shape[1] + 1).cos().to(activations)
    gradients = torch.autograd.grad(
        (activations * coefficients).sum(), [tensor for _, tensor, _ in maps], allow_unused=True
    )
    for (path, tensor, channels), gradient in zip(reversed(maps), reversed(gradients), strict=True):
        if gradient is None or len(tensor) != len(activations):
            continue
        seen = (gradient.abs().sum(dim=channels) > 0).float().mean()
        if seen >= SEEN:
            return path, _prefix(tensor)
    return "", 0


def _channels(tensor: Tensor) -> int | None:
    """The axis of a map's channels; None of what is no map of several positions."""
    shape = tensor.shape
    if tensor.ndim == 4:
        last = shape[1] == shape[2] != shape[3]
        positions = shape[1] * shape[2] if last else shape[2] * shape[3]
        return None if positions == 1 or not (last or shape[2] == shape[3]) else 3 if last else 1
    # Not [N, M, 1], which an average leaves, and whose M may be a square number.
    return 2 if tensor.ndim == 3 and tensor.shape[2] > 1 and _prefix(tensor) >= 0 else None


def _prefix(tensor: Tensor) -> int:
    """Tokens before those that form a square grid; −1 if none do, 0 of a map."""
    if tensor.ndim != 3:
        return 0
    tokens = tensor.shape[1]
    for prefix in range(min(MOST_PREFIX_TOKENS, tokens) + 1):
        if tokens - prefix > 1 and math.isqrt(tokens - prefix) ** 2 == tokens - prefix:
            return prefix
    return -1
