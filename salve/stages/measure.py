"""What a finished SAE does, measured block by block: memory does not grow with the number of images."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from salve.backbones import Captured
from salve.metrics import Downstream, FractionOfVarianceExplained, LatentUsage, ReconstructionCosine
from salve.sae import SAE

#: Numbers in one array that is made of a block of rows.
AT_ONCE = 1 << 22


def blocks(split: Captured, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations and labels in blocks of rows, in order, small enough for arrays ``[rows, columns]`` of them."""
    rows = max(1, AT_ONCE // max(columns, split.rows.shape[1]))
    yield from zip(split.rows.split(rows), split.labels.split(rows), strict=True)


@torch.no_grad()
def measure_sae(sae: SAE, train: Captured, val: Captured, weight: Tensor, bias: Tensor) -> dict[str, float | None]:
    """What the finished file does on raw activations; measured anew, so that a wrong fold would show.

    Args:
        sae: in eval mode, folded. train, val: raw activations and labels.
        weight, bias: ``[C, M]`` and ``[C]``, the classifier's head behind the site.

    Returns:
        By name; None where a measure is undefined (see :func:`salve.metrics.recovered_share`), since JSON has no NaN.

        - on val: ``fve``, ``cosine``, ``l0``, ``l1``, and all that :func:`salve.metrics.downstream` returns. Its
          mean-ablation feeds the head the mean activation of the train split.
        - on train, since what is rare shows only among many images: ``dead_fraction``, ``almost_dead_fraction`` and
          ``dense_fraction`` (:func:`salve.metrics.usage_fractions`).
    """
    size = sae.dictionary_size
    use, mean = LatentUsage(size, sae.negligible), torch.zeros(sae.width, dtype=torch.float64)
    for activations, _ in blocks(train, size):
        use.update(sae.encode(activations), activations)
        mean += activations.sum(dim=0, dtype=torch.float64) / len(train.labels)
    zero_logits, mean_logits = bias[None], (mean.to(weight.dtype) @ weight.T + bias)[None]  # [1, C]
    val_use, fve, cosine = (
        LatentUsage(size, sae.negligible),
        FractionOfVarianceExplained(sae.width),
        ReconstructionCosine(),
    )
    downstream = Downstream()
    for activations, labels in blocks(val, size):
        reconstruction, latents = sae(activations)
        val_use.update(latents, activations)
        fve.update(activations, reconstruction)
        cosine.update(activations, reconstruction)
        original, fed = (part @ weight.T + bias for part in (activations, reconstruction))
        downstream.update(labels, original, fed, zero_logits, mean_logits)
    on_train, on_val = use.compute(), val_use.compute()
    measures = {
        "fve": fve.compute(),
        "cosine": cosine.compute(),
        **{name: on_val[name] for name in ("l0", "l1")},
        **{name: on_train[name] for name in ("dead_fraction", "almost_dead_fraction", "dense_fraction")},
        **downstream.compute(),
    }
    values = {name: float(value) for name, value in measures.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
