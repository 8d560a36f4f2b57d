# SPDX-License-Identifier: MIT
"""Variants of TopK: a fixed number of latents fires, per image or on average, without a sparsity penalty."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from salve.distributed import rank_and_world_size
from salve.sae.base import SAE, SAEOutput
from salve.sae.losses import squared_errors
from salve.sae.sparse import SparsePattern, encode_sparse, largest, pattern_of_indices, pattern_of_mask
from salve.types import Activations, Latents

#: From this ratio of ``d`` to ``k`` on, sparse products are faster on a CPU.
SPARSE_RATIO = 16
#: Steps over which the inference threshold is averaged.
WINDOW = 100


class TopK(SAE):
    """Keep the ``k`` largest pre-activations of each image, if positive (Makhzani & Frey 2013; Gao et al. 2024).

    Args:
        k: latents that may fire for one image, ``1 ≤ k ≤ d``.
    """

    variant = "topk"

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None, k: int = 8) -> None:
        self.check(dictionary_size, k=k)
        super().__init__(width, dictionary_size, generator)
        self.k = k

    def start_strength(self) -> float:
        """``√(M/d)`` for ``d > M``: the reconstruction sums only ``k`` columns, and a weaker start kills latents."""
        return math.sqrt(super().start_strength())

    def activate(self, pre: Latents) -> Latents:
        """Keep the ``k`` largest entries of each row, zero the rest."""
        values, indices = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def run_alone(self, activations: Activations) -> SAEOutput:
        """As :meth:`run`; on a CPU with ``d ≥ 16 k`` everything after choosing the latents is sparse."""
        if not self.training or self.dictionary_size < SPARSE_RATIO * self.k or activations.device.type != "cpu":
            return self.run(activations)
        centred = activations - self.b_dec
        with torch.no_grad():
            pre = self.pre_activations(activations)
        found = encode_sparse(pre, centred, self.encoder, self.bias, self.choose(pre))
        sparse = found._replace(values=found.values.relu())
        return SAEOutput(pre, None, sparse.decode(self.decoder) + self.b_dec, sparse)

    def choose(self, pre: Latents) -> SparsePattern:
        """The latents that may fire in training."""
        return pattern_of_indices(largest(pre, self.k), self.dictionary_size)


class BatchTopK(TopK):
    """Keep the ``k N`` largest pre-activations of a batch of ``N`` images (Bussmann et al. 2024, arXiv 2412.06410).

    One image may use more than ``k`` latents, another fewer. In train mode, latents depend on the whole batch of all
    ranks. In eval mode a latent fires above ``threshold``, the running mean over training batches of the smallest
    value that was kept.

    Args:
        k: latents that fire for an image on average, ``1 ≤ k ≤ d``.

    Attributes:
        threshold: scalar; 0 before training.
    """

    variant = "batch_topk"
    in_units = ("bias", "b_dec", "threshold")

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None, k: int = 8) -> None:
        super().__init__(width, dictionary_size, generator, k)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def activate(self, pre: Latents) -> Latents:
        """Keep the batch's ``k N`` largest entries or, in eval mode, those above the threshold."""
        return torch.where(self._fires(pre) if self.training else pre > self.threshold, pre, 0.0)

    def choose(self, pre: Latents) -> SparsePattern:
        """The entries that the batch keeps."""
        return pattern_of_mask(self._fires(pre))

    def _fires(self, pre: Latents) -> Bool[Tensor, "N d"]:
        return (pre >= batch_cut(pre.detach(), self.k)) & (pre > 0)


class Matryoshka(BatchTopK):
    """Nested dictionaries: every prefix must reconstruct alone (Bussmann et al. 2025, arXiv 2503.17547).

        loss = Σ_m ‖a − (D_{1:m} z_{1:m} + b_dec)‖²

    The sum is over prefixes of ``m`` latents, the last of which is the whole dictionary. Early latents stay general
    instead of being split up by later ones.

    Args:
        k: as for the base.
        prefixes: shares of the dictionary, increasing to 1.
        base: how latents are chosen, batch_topk or topk.
    """

    variant = "matryoshka"

    def __init__(
        self,
        width: int,
        dictionary_size: int,
        generator: torch.Generator | None = None,
        k: int = 8,
        prefixes: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1),
        base: str = "batch_topk",
    ) -> None:
        self.check(dictionary_size, k=k, prefixes=prefixes, base=base)
        super().__init__(width, dictionary_size, generator, k)
        self.prefixes = [float(share) for share in prefixes]
        self.base = base
        #: Number of latents of each prefix; in a small dictionary two shares may give the same number.
        self.sizes = sorted({max(1, round(share * dictionary_size)) for share in prefixes})

    def activate(self, pre: Latents) -> Latents:
        """As the base does."""
        return super().activate(pre) if self.base == BatchTopK.variant else TopK.activate(self, pre)

    def choose(self, pre: Latents) -> SparsePattern:
        """As the base does."""
        return super().choose(pre) if self.base == BatchTopK.variant else TopK.choose(self, pre)

    def losses(
        self, activations: Activations, output: SAEOutput, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """The base's loss plus the squared errors of the smaller prefixes."""
        losses = super().losses(activations, output, sparsity)
        partial = self.b_dec
        for start, stop in pairwise((0, *self.sizes[:-1])):
            partial = partial + self._decode_part(output, start, stop)
            losses = losses + squared_errors(activations, partial)
        return losses

    def _decode_part(self, output: SAEOutput, start: int, stop: int) -> Activations:
        """What latents ``start … stop − 1`` add to the reconstruction."""
        if output.sparse is not None:
            return output.sparse.within(start, stop).decode(self.decoder)
        return output.latents[:, start:stop] @ self.decoder[:, start:stop].T


def batch_cut(pre: Latents, k: int) -> Float[Tensor, ""]:
    """The ``k N``-th largest positive entry of the batch of all ranks; 0 if fewer are positive."""
    values, rows, ranks = pre.relu().flatten(), len(pre), rank_and_world_size()[1]
    if ranks == 1:
        return values.topk(k * rows).values[-1] if rows else values.new_zeros(())
    total = torch.tensor(rows, device=pre.device)
    distributed.all_reduce(total)
    budget = k * int(total)
    mine = values.new_zeros(budget)
    largest = values.topk(min(budget, len(values))).values
    mine[: len(largest)] = largest
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(everyone, mine)
    return torch.cat(everyone).topk(budget).values[-1]


@torch.no_grad()
def learn_threshold(threshold: Float[Tensor, "*G"], latents: Float[Tensor, "*G N d"], step: int) -> Float[Tensor, "*G"]:
    """Update the running mean of each batch's smallest positive latent.

    The mean is over all batches at first, and later over about the last ``WINDOW``.

    Args:
        threshold: before the batch. latents: of this rank's part of it. step: number of batches so far.
    """
    smallest = latents.new_full(threshold.shape, math.inf)
    if latents.shape[-2]:
        smallest = latents.masked_fill(latents <= 0, math.inf).amin(dim=(-2, -1))
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    moved = threshold + (smallest - threshold) * max(1 / (step + 1), 1 / WINDOW)
    return torch.where(smallest.isfinite(), moved, threshold)
