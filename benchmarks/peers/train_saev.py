"""saev: its SparseAutoencoder, stepped as its ``train`` does, which reads its batches from shards of its own.

Only L1, with the mean over all elements: the loss of ``Cell`` divided by ``M`` has the price ``λ / M``. Its optimiser
is the fused Adam. It has no mixed precision.
"""

from collections.abc import Iterable

import torch
from contender import Cell, Contender, RefusedError, Rows, serve
from saev.config import SparseAutoencoder as Config
from saev.nn import SparseAutoencoder
from torch import Tensor


class Saev(Contender):
    """Its module and optimiser. Columns are normalised before each pass; gradients along them are removed."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        if cell.kind != "l1":
            raise RefusedError("it has no TopK")
        if cell.precision != "fp32":
            raise RefusedError("it has no mixed precision")
        if cell.dictionary_size % cell.width:
            raise RefusedError("its dictionaries are multiples of the width")
        factor = cell.dictionary_size // cell.width
        config = Config(d_vit=cell.width, exp_factor=factor, sparsity_coeff=cell.sparsity / cell.width, seed=cell.seed)
        self.sae = SparseAutoencoder(config).to(cell.device).train()
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=cell.rate, fused=True)

    def train(self, batches: Iterable[Tensor]) -> None:
        for batch in batches:
            self.sae.normalize_w_dec()
            _, _, losses = self.sae(batch)
            losses.loss.backward()
            self.sae.remove_parallel_grads()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def encode(self, activations: Tensor) -> Tensor:
        latents: Tensor = self.sae(activations)[1]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        reconstruction: Tensor = self.sae.decode(latents)
        return reconstruction


if __name__ == "__main__":
    serve(Saev)
