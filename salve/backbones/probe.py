"""Find the head of any network, and the spatial map in front of it, by running the network once on noise.

No line names an architecture.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salve.types import UserError

#: Most tokens that may stand before those of the image.
MOST_PREFIX_TOKENS = 16
#: The share of a map's positions on which the activation must depend.
SEEN = 0.5


class Head(NamedTuple):
    """A linear layer whose outputs are the logits.

    Attributes:
        reader: path of the linear layer.
        width: ``M``, the number of channels that it reads.
        map: path of the module whose output, ``[N, M', H, W]``, ``[N, H, W, M']`` or ``[N, T, M']``, is the last map
            of which at least half of the positions have an influence on the activation; empty if there is none.
        prefix_tokens: how many of the ``T`` tokens come before those of the image.
    """

    reader: str
    width: int
    map: str
    prefix_tokens: int


def own_size(model: nn.Module) -> int:
    """Side in pixels of the images that a network is made for; 224 if it does not say."""
    published = getattr(model, "pretrained_cfg", None) or {}
    for size in (getattr(model, "image_size", None), (published.get("input_size") or (None,))[-1]):
        if isinstance(size, int):
            return size
    return 224


def probed_head(model: nn.Module, size: int) -> Head:
    """Find the head of a network.

    Args:
        model: an image classifier; it is not changed.
        size: side of its square images in pixels.

    Raises:
        UserError: the network cannot read such images, or its logits are not the outputs of one linear layer.
    """
    name = type(model).__name__
    weight = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    modes = [(module, module.training) for module in model.modules()]
    read: dict[str, tuple[Tensor, Tensor]] = {}
    given: list[tuple[str, Tensor]] = []
    hooks = []
    for path, module in model.named_modules():

        def keep(module: nn.Module, inputs: tuple[object, ...], output: object, path: str = path) -> None:
            if isinstance(output, Tensor):
                given.append((path, output))
                if isinstance(module, nn.Linear) and inputs and isinstance(inputs[0], Tensor):
                    read[path] = inputs[0], output

        hooks.append(module.register_forward_hook(keep))
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            images = torch.randn(2, 3, size, size, generator=generator).to(weight).requires_grad_()
            logits = model(images)
            heads = [path for path, (_, output) in read.items() if _is_same(output, logits)]
            if len(heads) != 1 or read[heads[0]][0].ndim != 2:
                raise UserError(f"This {name} does not end in one linear layer, so it has no site.")
            activations = read[heads[0]][0]
            path, prefix = _map(activations, given) if activations.requires_grad else ("", 0)
    except UserError:
        raise
    except Exception as error:  # a model that was never seen before raises what it likes
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise UserError(
            f"This {name} cannot read {size} × {size} images ({type(error).__name__}: {first}), so its site is unknown."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return Head(heads[0], activations.shape[1], path, prefix)


def _is_same(output: Tensor, logits: object) -> bool:
    """Whether a tensor is the logits, perhaps in another shape."""
    return isinstance(logits, Tensor) and (
        output is logits or (output.numel() == logits.numel() and output.data_ptr() == logits.data_ptr())
    )


def _map(activations: Tensor, given: list[tuple[str, Tensor]]) -> tuple[str, int]:
    """Path and prefix tokens of the last map that the activation depends on at most of its positions."""
    last = {id(tensor): (path, tensor) for path, tensor in given}  # a tensor goes by the outermost module
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
    return 2 if tensor.ndim == 3 and _prefix(tensor) >= 0 else None


def _prefix(tensor: Tensor) -> int:
    """Tokens before those that form a square grid; −1 if none do, 0 of a map."""
    if tensor.ndim != 3:
        return 0
    tokens = tensor.shape[1]
    for prefix in range(min(MOST_PREFIX_TOKENS, tokens) + 1):
        if tokens - prefix > 1 and math.isqrt(tokens - prefix) ** 2 == tokens - prefix:
            return prefix
    return -1
