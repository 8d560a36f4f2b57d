# SPDX-License-Identifier: MIT
"""Compare dictionaries, whose columns are the features: two SAEs with each other, or an SAE with planted features."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from salve.types import UserError


class Matching(NamedTuple):
    """Pairs of columns of two dictionaries, ``k = min(d, e)`` of them, in the order of the first.

    Attributes:
        first, second: ``[k]``, the columns' indices.
        cosines: ``[k]``; absolute where a column and its negative count as one feature.
        signs: ``[k]``, −1 where the pair points in opposite directions and that is allowed, else 1.
    """

    first: Int[Tensor, " k"]
    second: Int[Tensor, " k"]
    cosines: Float[Tensor, " k"]
    signs: Int[Tensor, " k"]


def cosines(first: Float[Tensor, "M d"], second: Float[Tensor, "M e"]) -> Float[Tensor, "d e"]:
    """Cosine of every column with every other, float64 ``[d, e]``; 0 with a column of zeros.

    Raises:
        UserError: dictionaries of different widths, or that are not finite.
    """
    if first.shape[0] != second.shape[0]:
        raise UserError(
            f"The dictionaries have widths {first.shape[0]} and {second.shape[0]}: only columns of one width can be "
            "compared."
        )
    for name, dictionary in (("first", first), ("second", second)):
        if not bool(dictionary.isfinite().all()):
            raise UserError(f"The {name} dictionary holds values that are not finite.")
    return F.normalize(first.double(), dim=0).T @ F.normalize(second.double(), dim=0)


def match_columns(first: Float[Tensor, "M d"], second: Float[Tensor, "M e"], signed: bool = False) -> Matching:
    """The one-to-one pairing of columns with the largest sum of cosines (the Hungarian method, Kuhn 1955).

    Some columns of the larger dictionary stay without a partner. The time grows as ``k² max(d, e)``.

    Args:
        first: ``[M, d]``. second: ``[M, e]``. Columns may have any length.
        signed: latents take both signs (linear SAEs), so that a column and its negative are the same feature. Pairs
            are then chosen by ``|cos|``, and ``signs`` says which are opposite.

    Raises:
        UserError: dictionaries of different widths, or that are not finite.
    """
    # Imported here, since everything imports salve.metrics and scipy.optimize is slow to import.
    from scipy.optimize import linear_sum_assignment

    cosine = cosines(first, second)
    rows, columns = linear_sum_assignment((cosine.abs() if signed else cosine).cpu().numpy(), maximize=True)
    row, column = (torch.as_tensor(found, dtype=torch.long, device=cosine.device) for found in (rows, columns))
    matched = cosine[row, column]
    signs = torch.where((matched < 0) & signed, -1, 1)
    return Matching(row, column, matched * signs, signs)


def stability(
    first: Float[Tensor, "M d"], second: Float[Tensor, "M e"], signed: bool = False, threshold: float = 0.7
) -> dict[str, Float[Tensor, ""]]:
    """How similar two SAEs' dictionaries are, such as those of two seeds.

    Leave dead latents out, as in ``decoder[:, frequency > 0]``: they keep their initial columns and pull the numbers
    towards chance. Chance is not 0, since a large dictionary has a column near every direction of a narrow activation:
    compare with :func:`random_stability`.

    Args:
        first: ``[M, d]`` and second: ``[M, e]``, decoders. signed: see :func:`match_columns`.
        threshold: cosine from which two columns are taken for the same feature.

    Returns:
        Over the ``min(d, e)`` pairs of :func:`match_columns`: ``matched_cosine``, the mean (Song et al. 2025, PW-MCC);
        ``shared_fraction``, of at least ``threshold`` (after Paulo & Belrose 2025); ``flipped_fraction``, of opposite
        sign. ``max_cosine``: see :func:`mean_max_cosine`. NaN where a dictionary has no column.
    """
    matching = match_columns(first, second, signed)
    return {
        "matched_cosine": matching.cosines.mean(),
        "shared_fraction": (matching.cosines >= threshold).double().mean(),
        "flipped_fraction": (matching.signs < 0).double().mean(),
        "max_cosine": mean_max_cosine(first, second, signed),
    }


def random_stability(
    width: int, first: int, second: int, signed: bool = False, threshold: float = 0.7, pairs: int = 1000, seed: int = 0
) -> dict[str, Float[Tensor, ""]]:
    """The chance level of :func:`stability`: its mean over pairs of dictionaries of random directions.

    Args:
        width: ``M``. first, second: numbers of columns, ``d`` and ``e``. signed, threshold: see :func:`stability`.
        pairs: number of matched columns over all draws, at least. seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = math.ceil(pairs / max(1, min(first, second)))
    found = []
    for _ in range(draws):
        one, other = (torch.randn(width, columns, generator=generator) for columns in (first, second))
        found.append(stability(one, other, signed, threshold))
    return {name: torch.stack([draw[name] for draw in found]).mean() for name in found[0]}


def mean_max_cosine(
    first: Float[Tensor, "M d"], second: Float[Tensor, "M e"], signed: bool = False
) -> Float[Tensor, ""]:
    """``mean_i max_j cos(first_i, second_j)``, of ``|cos|`` if ``signed`` (Sharkey et al. 2022).

    Not symmetric, and columns may share a partner; arguments as in :func:`match_columns`. NaN where a dictionary has no
    column.
    """
    cosine = cosines(first, second)
    if not cosine.numel():
        return cosine.new_tensor(torch.nan)
    return (cosine.abs() if signed else cosine).max(dim=1).values.mean()


def planted_recovery(
    decoder: Float[Tensor, "M d"], truth: Float[Tensor, "M G"], signed: bool = False, threshold: float = 0.9
) -> dict[str, Float[Tensor, ""]]:
    """How many of the features that generated the data an SAE has found.

    Args:
        decoder: ``[M, d]``. truth: ``[M, G]``, the planted features. signed: see :func:`match_columns`.
        threshold: cosine from which a feature counts as recovered.

    Returns:
        ``mcc``: mean over the ``G`` features of the cosine with the column matched to each; ``recovered_fraction``:
        share of them with at least ``threshold``. A feature without a column (``d < G``) counts as 0 and as lost.
    """
    found = match_columns(truth, decoder, signed).cosines
    features = truth.shape[1]
    return {"mcc": found.sum() / features, "recovered_fraction": (found >= threshold).double().sum() / features}
