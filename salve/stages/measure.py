# SPDX-License-Identifier: MIT
"""Measures of a finished SAE, computed block by block: memory does not grow with the number of images."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from salve.activations import Captured
from salve.backbones.tail import LinearTail
from salve.metrics import Downstream, FractionOfVarianceExplained, LatentUsage, ReconstructionCosine
from salve.sae import SAE
from salve.types import Diverged, UserError

#: An SAE is refused if its mean squared error is more than this times the mean square of the activations.
#: Reconstructing nothing at all gives 1; an SAE that has hardly been trained may be somewhat above.
MOST_ERROR = 10.0
#: Of activations that are all the same, the variance over the mean square; float32 leaves a trace of it.
_CONSTANT = 1e-12

#: Numbers in one array that is made of a block of rows.
AT_ONCE = 1 << 22


def blocks(split: Captured, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations and labels in blocks of rows, in order, small enough for arrays ``[rows, columns]`` of them."""
    rows = max(1, AT_ONCE // max(columns, split.rows.shape[1]))
    start = 0
    for activations in split.rows.split(rows):
        # Not from the labels of all rows, which at a map take eight bytes for each.
        yield activations, split.labels[torch.arange(start, start + len(activations)) // split.sampled]
        start += len(activations)


def check_activations(split: Captured, of: str) -> tuple[float, float]:
    """The mean square and the variance of activations, both summed over channels.

    Args:
        split: raw activations. of: names them in the error, such as their site.

    Raises:
        UserError: they are the same for every image, so neither the network's outputs nor an edit depend on the image.
    """
    total = torch.zeros(split.rows.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for activations, _ in blocks(split, 1):
        total += activations.sum(dim=0, dtype=torch.float64)
        squares += activations.to(torch.float64, copy=True).square_().sum(dim=0)
    mean, square = total / len(split.rows), float(squares.sum()) / len(split.rows)
    variance = square - float(mean.square().sum())
    if not variance > _CONSTANT * square:
        raise UserError(
            f"The activations at {of} are the same for every image, as with weights of zero: the network predicts the "
            "same for all of them; check backbone.weights and the training of the classifier."
        )
    return square, variance


def check_sae(record: Mapping[str, Any], select: Captured, site: str) -> None:
    """Refuse an SAE that reconstructs select images far worse than an output of zeros would.

    The FVE alone does not tell: where activations share a large mean, an SAE that slightly misses the mean has an FVE
    far below zero.

    Args:
        record: the measures of :func:`measure_sae`. select: raw activations. site: its name, for errors.

    Raises:
        Diverged: the error is undefined, or more than :data:`MOST_ERROR` times that of an output of zeros.
        UserError: see :func:`check_activations`.
    """
    fve = record["select_fve"]
    if fve is not None and -1 <= fve < 1 and fve != 0:  # activations without variance have an FVE of 0 or 1
        return
    square, variance = check_activations(select, f"{site}, of the select split,")
    error = math.inf if fve is None else (1 - fve) * variance / square
    if error > MOST_ERROR:
        raise Diverged(
            f"The training of the SAE diverged: its error on select images is {error:.2g} times that of an output of "
            f"zeros (FVE {'undefined' if fve is None else f'{fve:.2g}'}), more than the limit of {MOST_ERROR:g}; lower "
            "sae.learning_rate."
        )


@torch.no_grad()
def measure_sae(
    sae: SAE, train: Captured, held_out: Mapping[str, Captured], tail: LinearTail | None
) -> dict[str, float | None]:
    """Measure a finished SAE on raw activations, which would also reveal a wrong fold.

    Args:
        sae: in eval mode, folded.
        train: raw activations and labels.
        held_out: the same by split, such as ``select`` and ``test``.
        tail: what lies behind the site; None if that is not one linear layer.

    Returns:
        Measures by name; None where one is undefined (see :func:`salve.metrics.recovered_share`), since JSON has no
        NaN.

        - On test: ``fve``, ``cosine``, ``l0``, ``l1``, and with a tail all that :func:`salve.metrics.downstream`
          returns. Its mean-ablation feeds the tail the mean activation of the train split. Those of another held-out
          split bear its name, such as ``select_fve``.
        - On train, where rare latents show best: ``dead_fraction``, ``almost_dead_fraction`` and ``dense_fraction``
          (:func:`salve.metrics.usage_fractions`).
    """
    size = sae.dictionary_size
    use, mean = LatentUsage(size, sae.firing_threshold), torch.zeros(sae.width, dtype=torch.float64)
    for activations, _ in blocks(train, size):
        use.update(sae.encode(activations), activations)
        mean += activations.sum(dim=0, dtype=torch.float64) / len(train.rows)
    on_train = use.compute()
    measures = {name: on_train[name] for name in ("dead_fraction", "almost_dead_fraction", "dense_fraction")}
    for split, captured in held_out.items():
        measures |= named(split, _of_reconstructions(sae, captured, tail, mean))
    return finite_or_none(measures)


def named(split: str, measures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Measures of a split by name; those of another split than test bear its name."""
    prefix = "" if split == "test" else f"{split}_"
    return {prefix + name: value for name, value in measures.items()}


def finite_or_none(measures: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Measures as numbers; None for NaN and infinity."""
    values = {name: float(value) for name, value in measures.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _of_reconstructions(sae: SAE, split: Captured, tail: LinearTail | None, mean: Tensor) -> dict[str, Tensor]:
    """Measures of the reconstructions of a split; ``mean`` ``[M]`` is the activation of the mean-ablation."""
    use = LatentUsage(sae.dictionary_size, sae.firing_threshold)
    fve, cosine, downstream = FractionOfVarianceExplained(sae.width), ReconstructionCosine(), Downstream()
    for activations, labels in blocks(split, max(sae.dictionary_size, 0 if tail is None else len(tail))):
        reconstruction, latents = sae(activations)
        use.update(latents, activations)
        fve.update(activations, reconstruction)
        cosine.update(activations, reconstruction)
        if tail is not None:
            zero_logits, mean_logits = tail.bias[None], tail(mean.to(tail.weight.dtype))  # [1, C]
            downstream.update(labels, tail(activations), tail(reconstruction), zero_logits, mean_logits)
    usage = use.compute()
    own = {"fve": fve.compute(), "cosine": cosine.compute(), "l0": usage["l0"], "l1": usage["l1"]}
    return own if tail is None else {**own, **downstream.compute()}
