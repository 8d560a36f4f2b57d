# SPDX-License-Identifier: MIT
"""Monosemanticity: how similar the images are for which a latent fires, according to another image encoder."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from salve.types import Latents

#: If pairs of different images have less than this share of the total weight, it is only rounding.
_NO_PAIRS = 1e-12


class _Sums(NamedTuple):
    """Sums over images from which the score is computed, in float64.

    Over batches they add up, but ``smallest`` is a minimum. With ``s = |z|`` and unit embeddings ``ê``: ``images``,
    their number; ``smallest [d]`` of ``s``; ``total = Σ s [d]``, ``squares = Σ s² [d]``, ``directions = Σ ê [F]`` and
    ``weighted = Σ s ê [d, F]``.
    """

    images: Tensor
    smallest: Tensor
    total: Tensor
    squares: Tensor
    directions: Tensor
    weighted: Tensor


def monosemanticity(latents: Latents, embeddings: Float[Tensor, "N F"]) -> Float[Tensor, " d"]:
    """Mean cosine similarity of the images for which a latent fires, weighted by the latent (Pach et al. 2025).

    ``MS_l = Σ_{n≠m} w_nl w_ml ê_n·ê_m / Σ_{n≠m} w_nl w_ml``, with unit embeddings ``ê``, and ``w_nl = |z_nl|`` minus
    its smallest value over the images. No pairs are formed: the sums are ``‖Σ_n w_n ê_n‖² − Σ_n w_n²`` and
    ``(Σ_n w_n)² − Σ_n w_n²``.

    Args:
        latents: ``[N, d]``, zero where a latent does not fire.
        embeddings: ``[N, F]`` of the same images, not zero. They must come from another model than the one that is
            explained, because with its own activations the score would be circular.

    Returns:
        ``[d]`` float64, 1 if all these images have the same embedding; NaN for a latent with fewer than two images of
        weight above zero.
    """
    return _score(_sums(latents, embeddings))


def _sums(latents: Latents, embeddings: Float[Tensor, "N F"]) -> _Sums:
    size, directions = latents.double().abs(), F.normalize(embeddings.double(), dim=1)
    return _Sums(
        images=torch.tensor(float(len(size)), dtype=size.dtype, device=size.device),
        smallest=size.amin(dim=0) if len(size) else torch.full_like(size.sum(dim=0), torch.inf),
        total=size.sum(dim=0),
        squares=size.square().sum(dim=0),
        directions=directions.sum(dim=0),
        weighted=size.T @ directions,
    )


def _score(sums: _Sums) -> Float[Tensor, " d"]:
    # w = s − least, but the smallest value is known only after the last batch, so that the sums are of s.
    least = sums.smallest
    total = sums.total - sums.images * least
    squares = sums.squares - 2 * least * sums.total + sums.images * least.square()
    resultant = (sums.weighted - least[:, None] * sums.directions).square().sum(dim=1)
    pairs = total.square() - squares
    return torch.where(pairs > _NO_PAIRS * sums.total.square(), (resultant - squares) / pairs, torch.nan)


class Monosemanticity(Metric):
    """:func:`monosemanticity` over all batches.

    Args:
        dictionary_size: ``d``. embedding_width: ``F``.
    """

    full_state_update = False

    def __init__(self, dictionary_size: int, embedding_width: int) -> None:
        super().__init__()
        nothing = _sums(torch.zeros(0, dictionary_size), torch.zeros(0, embedding_width))
        for name, value in nothing._asdict().items():
            self.add_state(name, value, dist_reduce_fx="min" if name == "smallest" else "sum")

    def update(self, latents: Tensor, embeddings: Tensor) -> None:
        """Add latents ``[N, d]``, zero where they do not fire, and embeddings ``[N, F]`` of the same images."""
        for name, value in _sums(latents, embeddings)._asdict().items():
            state = getattr(self, name)
            setattr(self, name, torch.minimum(state, value) if name == "smallest" else state + value)

    def compute(self) -> Tensor:
        """``[d]``."""
        return _score(_Sums(*(getattr(self, name) for name in _Sums._fields)))
