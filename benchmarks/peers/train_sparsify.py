"""eai-sparsify: its SparseCoder, stepped as in its Trainer, which itself needs a language model.

Only TopK, with the loss ``Σ (a − â)² / Σ (a − ā)²``: that of ``Cell`` up to a factor. The decoder's bias starts from
the mean of the first batch. Its Trainer lowers Adam's rate to zero; here it is constant, as for all. On a GPU its
forward pass is always bf16, on a CPU never.
"""

import os
from collections.abc import Iterable

import torch
from contender import Cell, Contender, RefusedError, Rows, serve
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; its Triton kernel is for GPUs

from sparsify import SparseCoder, SparseCoderConfig


class Sparsify(Contender):
    """Its sparse coder and optimiser, and its Trainer's count of rows since each latent fired."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        if cell.kind == "l1":
            raise RefusedError("it has no L1")
        if (cell.precision == "bf16") != (cell.device == "cuda"):
            raise RefusedError("its forward pass is bf16 on GPUs and fp32 on CPUs")
        config = SparseCoderConfig(num_latents=cell.dictionary_size, k=cell.k)
        self.sae = SparseCoder(cell.width, config, cell.device, torch.float32)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=cell.rate)
        self.since_fired = torch.zeros(cell.dictionary_size, dtype=torch.long, device=cell.device)
        self.fired = torch.zeros(cell.dictionary_size, dtype=torch.bool, device=cell.device)
        self.step = 0

    def train(self, batches: Iterable[Tensor]) -> None:
        for batch in batches:
            if self.step == 0:
                self.sae.b_dec.data = batch.mean(0)
            self.sae.set_decoder_norm_to_unit_norm()
            out = self.sae(batch, total_variance=(batch - batch.mean(0)).pow(2).sum())
            self.fired[out.latent_indices.flatten()] = True
            out.fvu.backward()
            self.sae.remove_gradient_parallel_to_decoder_directions()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.since_fired += len(batch)
            self.since_fired[self.fired] = 0
            self.fired.zero_()
            self.step += 1

    def encode(self, activations: Tensor) -> Tensor:
        values, indices, _ = self.sae.encode(activations)
        return activations.new_zeros(len(activations), self.cell.dictionary_size).scatter(1, indices, values)

    def decode(self, latents: Tensor) -> Tensor:
        # Densely: decoding is not timed here.
        return latents @ self.sae.W_dec + self.sae.b_dec


if __name__ == "__main__":
    serve(Sparsify)
