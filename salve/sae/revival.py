# SPDX-License-Identifier: MIT
"""Dead latents: counting how long each has not fired, and two ways to revive them, AuxK and resampling."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed

from salve.activations import AnyRows
from salve.distributed import rank_and_world_size
from salve.metrics import firing
from salve.sae.base import SAE, SAEOutput
from salve.sae.losses import squared_errors
from salve.sae.sparse import encode_sparse, pattern_of_indices
from salve.types import Activations, Latents

#: Weight of the auxiliary loss (Gao et al. 2024, α).
AUXILIARY = 1 / 32


def auxk_losses(
    sae: SAE, activations: Activations, output: SAEOutput, dead: Bool[Tensor, " d"], count: int
) -> Float[Tensor, " N"]:
    """The AuxK loss ``‖e − D ẑ‖²`` of each row: the largest dead latents reconstruct the error.

    The error ``e = a − â`` is held fixed, and ``D ẑ`` has no ``b_dec``: only dead latents learn from this loss.

    Args:
        sae: any with ``relu`` latents. activations: ``[N, M]``. output: of the forward pass.
        dead: ``[d]``, which latents are dead.
        count: ``ẑ`` are the dead latents with the ``count`` largest pre-activations.

    Returns:
        ``[N]``; zero where no latent is dead.

    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
    """
    values, indices = output.pre.masked_fill(~dead, -torch.inf).topk(count, dim=1)
    error = (activations - output.reconstruction).detach()
    if output.sparse is None:
        latents = torch.zeros_like(output.pre).scatter(1, indices, values.relu())
        rebuilt = latents @ sae.decoder.T
    else:
        sparse = encode_sparse(
            output.pre, activations - sae.b_dec, sae.encoder, sae.bias, pattern_of_indices(indices, len(dead))
        )
        # Where fewer than `count` latents are dead, the indices hold live ones too.
        rebuilt = sparse._replace(values=sparse.values.relu() * dead[sparse.pattern.columns]).decode(sae.decoder)
    return torch.where(dead.any(), squared_errors(error, rebuilt), 0.0)


@torch.no_grad()
def update_rows_since_fired(
    rows_since_fired: Int[Tensor, " d"], latents: Latents, activations: Activations, firing_threshold: float
) -> Int[Tensor, " d"]:
    """Count for each latent the rows since it last fired, after one more batch of all ranks.

    Args:
        rows_since_fired: before the batch. latents, activations: of this rank's part of it. firing_threshold: see
            :func:`salve.metrics.firing`.
    """
    fired = firing(latents, activations, firing_threshold).any(dim=0).to(rows_since_fired.dtype)
    rows = torch.tensor(len(latents), device=rows_since_fired.device)
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(fired, distributed.ReduceOp.MAX)
        distributed.all_reduce(rows)
    return torch.where(fired > 0, 0, rows_since_fired + rows)


#: ``torch.multinomial`` refuses more weights.
_MOST_WEIGHTS = 2**24


def draw_rows(
    weights: Float[Tensor, " N"], count: int, replacement: bool, generator: torch.Generator
) -> Int[Tensor, " count"]:
    """As ``torch.multinomial``, for any number of weights."""
    if len(weights) <= _MOST_WEIGHTS:
        return torch.multinomial(weights, count, replacement=replacement, generator=generator)
    if replacement:
        total = weights.cumsum(dim=0)
        return torch.searchsorted(total, total[-1] * torch.rand(count, dtype=total.dtype, generator=generator))
    # The largest of w / Exp(1) are a draw without replacement (Efraimidis & Spirakis 2006).
    waits = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / waits).topk(count).indices


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    activations: AnyRows,
    dead: Bool[Tensor, " d"],
    sparsity: float,
    generator: torch.Generator,
) -> int:
    """Reset dead latents to directions that the SAE reconstructs badly, in place.

    Each dead latent draws a row with probability proportional to its squared loss, and takes the direction of that
    row's error. Its encoder row gets a fifth of the live ones' mean norm; its bias and its Adam moments become zero.

    Two things differ from the source, where few latents die and inputs are centred. The source takes the direction of
    the row, not of its error; but raw activations all point much the same way. And here at most as many latents are
    reset as are alive: otherwise hundreds that fire for the same rows outweigh the live ones, and training collapses.

    Args:
        sae: the SAE. optimizer: its Adam.
        activations: ``[N, M]`` to draw from, in memory or on disk.
        dead: ``[d]``. sparsity: λ.
        generator: on the CPU.

    Returns:
        The number of latents reset; 0 if none is dead or no row has a finite, positive loss.

    Source: Bricken et al. 2023, "Neuron resampling".
    """
    which = dead.nonzero()[:, 0]
    shuffled = torch.randperm(len(which), generator=generator)
    which = which[shuffled[: max(1, int((~dead).sum()))].to(which.device)]
    blocks = (rows.to(sae.b_dec) for rows in activations.split(4096))
    weights = torch.cat([sae.losses(rows, sae.run(rows), sparsity) for rows in blocks]).double().square().cpu()
    if not len(which) or not 0 < float(weights.sum()) < torch.inf:
        return 0
    short = len(which) > int((weights > 0).sum())
    rows = draw_rows(weights, len(which), short, generator)
    chosen = activations[rows].to(sae.b_dec)
    directions = chosen - sae.run(chosen).reconstruction
    length = directions.norm(dim=1, keepdim=True)
    sae.restart(which, torch.where(length > 0, directions / length, sae.decoder[:, which].T))
    for name, parameter in sae.named_parameters():
        for moment in optimizer.state.get(parameter, {}).values():
            if moment.shape == parameter.shape and name != "b_dec":
                moment.index_fill_(1 if name == "decoder" else 0, which, 0.0)
    return len(which)
