# SPDX-License-Identifier: MIT
"""Noisy linear imputation: remove pixels without making an image that no network has seen."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve
from torch import Tensor

#: Weights of a pixel's neighbours, by rows and columns from it.
_WEIGHTS = {
    **dict.fromkeys(((0, 1), (0, -1), (1, 0), (-1, 0)), 1 / 6),
    **dict.fromkeys(((1, 1), (1, -1), (-1, 1), (-1, -1)), 1 / 12),
}


def imputed(
    image: Float[Tensor, "C H W"], removed: Bool[Tensor, "H W"], noise: float = 0.01, seed: int = 0
) -> Float[Tensor, "C H W"]:
    """Replace removed pixels by a blend of the pixels around them, so that no edge shows where they were.

    Each removed pixel is the weighted mean of its neighbours (1/6 at its sides, 1/12 at its corners; at the border of
    the image, of those that there are) plus Gaussian noise. For all of them together this is one sparse linear system.

    Args:
        image: ``[C, H, W]``. removed: ``[H, W]``. noise: standard deviation, in the image's unit. seed: of the noise.

    Returns:
        ``[C, H, W]``; zeros and noise if every pixel is removed.

    Source: Rong et al. 2022 (ROAD), *A consistent and efficient evaluation strategy for attribution methods*.
    """
    if not removed.any():
        return image.clone()
    gone = removed.cpu().numpy()
    count, known = int(gone.sum()), image.double().cpu().numpy()
    generator = torch.Generator().manual_seed(seed)
    added = noise * torch.randn(len(image), count, generator=generator, dtype=torch.float64)
    values = np.zeros((count, len(image)))
    if not gone.all():
        number = np.full(gone.shape, -1)
        number[gone] = np.arange(count)
        padded = np.pad(gone, 1)  # outside, nothing is removed; and nothing is there
        inside = np.pad(np.ones_like(gone), 1)
        numbers, pixels = np.pad(number, 1), np.pad(known, ((0, 0), (1, 1), (1, 1)))
        rows, columns = np.nonzero(gone)
        total, right = np.zeros(count), np.zeros((count, len(image)))
        links: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for (down, along), weight in _WEIGHTS.items():
            at = (rows + 1 + down, columns + 1 + along)
            unknown, there = padded[at], inside[at]
            total += weight * there
            right += weight * (there & ~unknown)[:, None] * pixels[:, at[0], at[1]].T
            links.append((np.flatnonzero(unknown), numbers[at][unknown], np.full(int(unknown.sum()), -weight)))
        one, other, weights = (np.concatenate(parts) for parts in zip(*links, strict=True))
        system = (coo_matrix((weights, (one, other)), shape=(count, count)) + diags(total)).tocsc()
        values = spsolve(system, right).reshape(count, len(image))
    filled = image.double().cpu()
    filled[:, removed.cpu()] = torch.from_numpy(values.T.copy()) + added
    return filled.to(image)
