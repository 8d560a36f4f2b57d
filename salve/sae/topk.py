"""Sparse autoencoders with a budget: so many latents fire, at no price."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from salve.distributed import rank_and_world_size
from salve.sae.base import SAE, Pass
from salve.sae.losses import squared_errors
from salve.sae.sparse import Pairs, chosen_by, encode_sparse, largest, ranked
from salve.types import Activations, Latents

#: From so many latents for each that may fire, products with those alone are faster on a CPU.
FEW = 16
#: Steps over which the inference threshold is averaged.
WINDOW = 100


class TopK(SAE):
    """The ``k`` largest pre-activations of each image, and only if positive (Makhzani & Frey 2013; Gao et al. 2024).

    Args:
        k: latents that may fire for one image, ``1 ≤ k ≤ d``.
    """

    variant = "topk"

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None, k: int = 8) -> None:
        self.check(dictionary_size, k=k)
        super().__init__(width, dictionary_size, generator)
        self.k = k

    def start_strength(self) -> float:
        """The square root of the others': a few columns add up to less, and with a weaker start fewer latents live."""
        return math.sqrt(super().start_strength())

    def activate(self, pre: Latents) -> Latents:
        """Keep the ``k`` largest entries of each row, zero the rest."""
        values, indices = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def run_alone(self, activations: Activations) -> Pass:
        """Where few latents of many fire, everything after their choice is done for those only."""
        if not self.training or self.dictionary_size < FEW * self.k or activations.device.type != "cpu":
            return self.run(activations)
        centred = activations - self.b_dec
        with torch.no_grad():
            pre = self.pre_activations(activations)
        found = encode_sparse(pre, centred, self.encoder, self.bias, self.choose(pre))
        sparse = found._replace(values=found.values.relu())
        return Pass(pre, None, sparse.decode(self.decoder) + self.b_dec, sparse)

    def choose(self, pre: Latents) -> Pairs:
        """Which latents may fire in training."""
        return ranked(largest(pre, self.k), self.dictionary_size)


class BatchTopK(TopK):
    """The ``k N`` largest pre-activations of a batch of ``N`` images (Bussmann et al. 2024, arXiv 2412.06410).

    An image may use more than ``k`` latents, and another fewer. Where there is no batch, in eval mode, a latent fires
    above ``threshold``: the expectation over training batches of the smallest value that was kept, which
    training estimates as a running mean. In train mode latents depend on the batch they are computed in, also
    over ranks: the batch is that of all of them.

    Args:
        k: latents that fire for an image on average, ``1 ≤ k ≤ d``.

    Attributes:
        threshold: scalar; 0 until training has set it.
    """

    variant = "batch_topk"
    in_units = ("bias", "b_dec", "threshold")

    def __init__(self, width: int, dictionary_size: int, generator: torch.Generator | None = None, k: int = 8) -> None:
        super().__init__(width, dictionary_size, generator, k)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def activate(self, pre: Latents) -> Latents:
        """Keep what is above the batch's cut, or in eval mode above the threshold."""
        return torch.where(self._fires(pre) if self.training else pre > self.threshold, pre, 0.0)

    def choose(self, pre: Latents) -> Pairs:
        """Those above the batch's cut."""
        return chosen_by(self._fires(pre))

    def _fires(self, pre: Latents) -> Bool[Tensor, "N d"]:
        return (pre >= batch_cut(pre.detach(), self.k)) & (pre > 0)


class Matryoshka(BatchTopK):
    """Nested dictionaries: the first latents must do alone what they can (Bussmann et al. 2025, arXiv 2503.17547).

        loss = Σ_m ‖a − (D_{1:m} z_{1:m} + s)‖²

    over prefixes of ``m`` latents, the last of which is the whole dictionary. Early latents stay general instead of
    being split up by later ones.

    Args:
        k: as for the base. prefixes: shares of the dictionary, increasing to 1. base: batch_topk or topk.
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
        #: Latents of each prefix; in a small dictionary two shares may come to the same number.
        self.sizes = sorted({max(1, round(share * dictionary_size)) for share in prefixes})

    def activate(self, pre: Latents) -> Latents:
        """That of the base."""
        return super().activate(pre) if self.base == BatchTopK.variant else TopK.activate(self, pre)

    def choose(self, pre: Latents) -> Pairs:
        """That of the base."""
        return super().choose(pre) if self.base == BatchTopK.variant else TopK.choose(self, pre)

    def losses(
        self, activations: Activations, passed: Pass, sparsity: float | Float[Tensor, ""]
    ) -> Float[Tensor, " N"]:
        """The whole dictionary's, as for the base, and the squared errors of the smaller prefixes."""
        losses = super().losses(activations, passed, sparsity)
        partial = self.b_dec
        for start, stop in pairwise((0, *self.sizes[:-1])):
            partial = partial + self._decode_part(passed, start, stop)
            losses = losses + squared_errors(activations, partial)
        return losses

    def _decode_part(self, passed: Pass, start: int, stop: int) -> Activations:
        """What latents ``start … stop − 1`` add."""
        if passed.sparse is not None:
            return passed.sparse.within(start, stop).decode(self.decoder)
        return passed.latents[:, start:stop] @ self.decoder[:, start:stop].T


def batch_cut(pre: Latents, k: int) -> Float[Tensor, ""]:
    """The ``k N``-th largest positive entry of the batch of all ranks, or 0 if it has fewer."""
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
    """The running mean of the smallest positive latent, over all batches at first and later over about ``WINDOW``.

    Args:
        threshold: as it was. latents: of a training batch; of this rank's part. step: how many came before.
    """
    smallest = latents.new_full(threshold.shape, math.inf)
    if latents.shape[-2]:
        smallest = latents.masked_fill(latents <= 0, math.inf).amin(dim=(-2, -1))
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    moved = threshold + (smallest - threshold) * max(1 / (step + 1), 1 / WINDOW)
    return torch.where(smallest.isfinite(), moved, threshold)
