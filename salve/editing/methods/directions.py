# SPDX-License-Identifier: MIT
"""The directions that edits along a direction follow, and the controls that they must beat."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from salve.editing.methods.base import Fitting, Method, Target
from salve.types import UserError

#: ``latent``: the decoder columns of the target's latents; ``class_mean``: from the mean activation to that of the
#: target's classes; ``random``: drawn evenly from the sphere; ``random_latent``: the columns of other latents, drawn
#: from those that are alive.
Direction: TypeAlias = Literal["latent", "class_mean", "random", "random_latent"]


def check_direction(direction: str) -> None:
    """Raises UserError unless it is one of :data:`Direction`."""
    if direction not in get_args(Direction):
        raise UserError(f"direction={direction} is unknown; choose {', '.join(get_args(Direction))}.")


@dataclass(frozen=True)
class AlongDirection(Method):
    """A method that follows a direction.

    Attributes:
        direction: see :data:`Direction`.

    Raises:
        UserError: there is no such direction.
    """

    direction: str = "latent"

    def __post_init__(self) -> None:
        check_direction(self.direction)

    @property
    def needs_sae(self) -> bool:
        """See :class:`Method`."""
        return self.direction in ("latent", "random_latent")

    @property
    def draws(self) -> bool:
        """See :class:`Method`."""
        return self.direction in ("random", "random_latent")


def directions(fitting: Fitting, target: Target, direction: str, method: str) -> Float[Tensor, "S M"]:
    """The unit directions that an edit of a target follows, each with the sign that it has for the target.

    Args:
        fitting: knows the SAE and the moments. target: with ``S`` latents.
        direction: see :data:`Direction`. method: its name, for messages.

    Raises:
        UserError: the direction needs an SAE, or train images of the target, and there are none.
    """
    check_direction(direction)
    if direction == "class_mean":
        return F.normalize(fitting.own_mean(target) - fitting.mean, dim=0)[None].float()
    generator = drawing(fitting, target)
    if direction == "random":
        drawn = torch.randn(max(1, len(target.latents)), fitting.rows.shape[1], generator=generator)
        return F.normalize(drawn, dim=1)
    sae = fitting.known_sae(method, target)
    latents, signs = list(target.latents), torch.tensor(target.signs, dtype=torch.float32)
    if direction == "random_latent":
        alive = [latent for latent in _alive(fitting).tolist() if latent not in latents]
        if len(alive) < len(latents):
            raise UserError(f"direction=random_latent finds no living latent beside those of {target.name}.")
        order = torch.randperm(len(alive), generator=generator)[: len(latents)].tolist()
        latents, signs = [alive[at] for at in order], torch.ones(len(latents))
    return sae.decoder.detach()[:, latents].T * signs[:, None]


def drawing(fitting: Fitting, target: Target) -> torch.Generator:
    """Of a target's random draw: another for every class, and for sets of classes."""
    own = sum((at + 1) * (label + 1) for at, label in enumerate(target.classes))
    return torch.Generator().manual_seed(fitting.seed * 100_003 + own)


@torch.no_grad()
def _alive(fitting: Fitting) -> Tensor:
    """The latents that are not zero for some of the rows."""
    assert fitting.sae is not None
    fires = torch.zeros(fitting.sae.dictionary_size, dtype=torch.bool)
    for block in fitting.rows[: 2**14].split(2**12):
        fires |= (fitting.sae.encode(block) != 0).any(dim=0)
    return fires.nonzero()[:, 0]
