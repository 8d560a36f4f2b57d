# SPDX-License-Identifier: MIT
"""What maps of latents are compared with: a map that knows no image, and a network that has learned nothing."""

import math
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salve.types import UserError


def centred_gaussian(size: int, width: float = 0.25) -> Float[Tensor, "S S"]:
    """A map that lies in the middle of every image, as most objects of photographs do.

    Args:
        size: side in pixels. width: the standard deviation, as a share of the side. Scores that depend on the order of
            pixels alone (all but the relevance mass and boxes around a threshold that is fixed) do not depend on it.
    """
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    along = torch.exp(-place.square() / (2 * width**2))
    return (along[:, None] * along).float()


@torch.no_grad()
def randomised(model: nn.Module, share: float = 1.0, seed: int = 0) -> nn.Module:
    """A copy of a network of which the layers behind have forgotten what they learned.

    The entries of each weight, bias and running statistic are shuffled, so that their size and spread stay and signals
    neither vanish nor explode. Modules come in the order in which the network defines them, the last ones first, and
    the head at least: rising shares are the cascade of Adebayo et al.

    Args:
        model: any network; left as it was.
        share: of the modules with weights of their own, in 0..1.
        seed: of the shuffles; a module's does not depend on the share.

    Raises:
        UserError: the share is out of range.

    Source: Adebayo et al. 2018, *Sanity checks for saliency maps*, who draw weights anew.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share={share} must lie in 0 to 1.")
    copy, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    holders = [module for module in copy.modules() if _own(module)]
    for module in holders[::-1][: max(1, math.ceil(share * len(holders)))]:
        for tensor in _own(module):
            order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
            tensor.copy_(tensor.flatten()[order].view_as(tensor))
    return copy


def _own(module: nn.Module) -> list[Tensor]:
    """The weights and statistics of a module itself, not of those in it."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]
