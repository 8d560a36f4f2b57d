"""A training loop in plain PyTorch: arithmetic and autograd, and nothing around them.

python train_bare.py [fused]      Adam as torch picks it, or its fused kernel
"""

import sys
from collections.abc import Iterable

import torch
from contender import Cell, Contender, Rows, serve
from torch import Tensor, nn

FUSED = "fused" in sys.argv


class Bare(Contender):
    """An encoder with a bias, and a decoder with unit-norm columns and no bias."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        decoder = torch.randn(cell.dictionary_size, cell.width, device=cell.device)
        self.decoder = nn.Parameter(decoder / decoder.norm(dim=1, keepdim=True))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.bias = nn.Parameter(torch.zeros(cell.dictionary_size, device=cell.device))
        parameters = [self.encoder, self.bias, self.decoder]
        self.optimizer = torch.optim.Adam(parameters, lr=cell.rate, fused=FUSED or None)

    def train(self, batches: Iterable[Tensor]) -> None:
        mixed = self.cell.precision == "bf16"
        for batch in batches:
            with torch.autocast(self.cell.device, torch.bfloat16, enabled=mixed):
                latents = self.encode(batch)
                loss = (batch - self.decode(latents)).square().sum(dim=1).mean()
                if self.cell.kind == "l1":
                    loss = loss + self.cell.sparsity * latents.sum(dim=1).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))

    def encode(self, activations: Tensor) -> Tensor:
        latents = nn.functional.linear(activations, self.encoder, self.bias).relu()
        if self.cell.kind == "l1":
            return latents
        values, indices = latents.topk(self.cell.k, dim=1)
        return torch.zeros_like(latents).scatter(1, indices, values)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.decoder


if __name__ == "__main__":
    serve(Bare)
