"""Latents that have died: who they are, and two ways to bring them back."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed

from salve.activations import AnyRows
from salve.distributed import rank_and_world_size
from salve.metrics import firing
from salve.sae.base import SAE, Pass
from salve.sae.losses import squared_errors
from salve.sae.sparse import encode_sparse, ranked
from salve.types import Activations, Latents

#: Weight of the auxiliary loss (Gao et al. 2024, α).
AUXILIARY = 1 / 32


def auxk_losses(
    sae: SAE, activations: Activations, passed: Pass, dead: Bool[Tensor, " d"], count: int
) -> Float[Tensor, " N"]:
    """AuxK: ``‖e − D ẑ‖²``, where ``ẑ`` are the ``count`` dead latents with the largest pre-activations.

    The error ``e = a − â`` is held fixed, and ``D ẑ`` has no ``b_dec``: the loss teaches dead latents, and only them,
    what the living ones leave over. Zero where none is dead.

    Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
    """
    values, indices = passed.pre.masked_fill(~dead, -torch.inf).topk(count, dim=1)
    error = (activations - passed.reconstruction).detach()
    if passed.sparse is None:
        latents = torch.zeros_like(passed.pre).scatter(1, indices, values.relu())
        rebuilt = latents @ sae.decoder.T
    else:
        sparse = encode_sparse(passed.pre, activations - sae.b_dec, sae.encoder, sae.bias, ranked(indices, len(dead)))
        # Where fewer are dead than asked for, some of the living are among the indices.
        rebuilt = sparse._replace(values=sparse.values.relu() * dead[sparse.pairs.columns]).decode(sae.decoder)
    return torch.where(dead.any(), squared_errors(error, rebuilt), 0.0)


@torch.no_grad()
def silence(
    silent: Int[Tensor, " d"], latents: Latents, activations: Activations, firing_threshold: float
) -> Int[Tensor, " d"]:
    """For how many rows each latent has not fired, after one more batch of all ranks.

    Args:
        silent: before the batch. latents, activations: of this rank's part. firing_threshold: see
            :func:`salve.metrics.firing`.
    """
    fired = firing(latents, activations, firing_threshold).any(dim=0).to(silent.dtype)
    rows = torch.tensor(len(latents), device=silent.device)
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(fired, distributed.ReduceOp.MAX)
        distributed.all_reduce(rows)
    return torch.where(fired > 0, 0, silent + rows)


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    activations: AnyRows,
    dead: Bool[Tensor, " d"],
    sparsity: float,
    generator: torch.Generator,
) -> int:
    """Let dead latents begin anew where the SAE is worst, in place.

    Each takes the direction of the error of a row drawn with probability proportional to the square of the row's loss,
    has an encoder of a fifth of the living's mean norm, no bias, and no history in Adam.

    Two things differ from the source, where few die and inputs are centred. There the direction is the row's own: raw
    activations all point much the same way. And no more begin anew at a time than are alive: hundreds that answer to
    the same rows outweigh the living, and the training collapses.

    Args:
        activations: ``[N, M]`` to draw from, in memory or on disk. generator: on the CPU.

    Returns:
        How many; 0 too if no row has a loss to draw by.

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
    rows = torch.multinomial(weights, len(which), replacement=short, generator=generator)
    chosen = activations[rows].to(sae.b_dec)
    directions = chosen - sae.run(chosen).reconstruction
    length = directions.norm(dim=1, keepdim=True)
    sae.restart(which, torch.where(length > 0, directions / length, sae.decoder[:, which].T))
    for name, parameter in sae.named_parameters():
        for moment in optimizer.state.get(parameter, {}).values():
            if moment.shape == parameter.shape and name != "b_dec":
                moment.index_fill_(1 if name == "decoder" else 0, which, 0.0)
    return len(which)
