"""Edits without an SAE: along random directions, and along the classes' own directions."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.compare import matched_edit, random_directions
from salve.backbones.tail import LinearTail
from salve.editing.curves import edit_curves
from salve.types import Activations, Labels

RANDOM, ORACLE = "random direction", "class direction"


def class_directions(weight: Float[Tensor, "C M"], activations: Activations, labels: Labels) -> Float[Tensor, "C M"]:
    """Each class's evidence by channel, ``mean_{n ∈ k}(w_k ⊙ a_n)``, at unit norm ``[C, M]`` (docs/method.md).

    It reads the classifier's own weights and labels, which an SAE does not see.
    """
    means = torch.stack([activations[labels == k].mean(dim=0) for k in range(len(weight))])  # [C, M]
    return torch.nn.functional.normalize(weight * means, dim=1)


def alignment(columns: Float[Tensor, "C M"], directions: Float[Tensor, "C M"]) -> Float[Tensor, " C"]:
    """How well the gate of each class's latent covers the class: the cosine of ``|c_k|`` and ``|direction_k|``, 0 … 1.

    The gate acts by ``|c|``, so signs do not count. At 1 the edit closes channels as the class direction would.
    """
    return torch.nn.functional.cosine_similarity(columns.abs(), directions.abs(), dim=1)


def reference_edits(
    tail: LinearTail,
    train: tuple[Activations, Labels],
    select: tuple[Activations, Labels],
    test: tuple[Activations, Labels],
    alphas: Float[Tensor, " K"],
    classes: Sequence[str],
    seeds: Sequence[int],
) -> pd.DataFrame:
    """The edits of every class along a random direction (one for each class and seed) and along its own direction.

    Args:
        tail: the linear reader. train: gives the class directions. select: chooses each edit's strength. test:
            measures it. alphas: strengths. classes: their names. seeds: of the random directions.

    Returns:
        One row per reference, seed and class: ``reference``, ``seed``, ``class`` and the fields of ``MatchedEdit``.
    """
    drawn = [(RANDOM, seed, random_directions(len(tail), tail.weight.shape[1], seed)) for seed in seeds]
    rows = []
    for reference, seed, directions in [*drawn, (ORACLE, 0, class_directions(tail.weight, *train))]:
        for k, name in enumerate(classes):
            choosing, reporting = (
                edit_curves(tail, *images, directions[k], alphas)[0].numpy() for images in (select, test)
            )
            edit = matched_edit(alphas.numpy(), choosing, reporting, k)
            rows.append({"reference": reference, "seed": seed, "class": name, **edit._asdict()})
    return pd.DataFrame(rows)
