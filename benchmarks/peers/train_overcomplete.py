"""overcomplete: its SAE and TopKSAE through its ``train_sae``, silent, with the losses of its documentation.

Its ``mse_l1`` is the mean over all elements plus a penalty times the sum of all latents of the batch. The loss of
``Cell`` divided by ``M`` has the penalty ``λ / (M B)``. Its bf16 is ``train_sae_amp`` (fp16 on a GPU). Clipping is off.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from contender import Cell, Contender, Rows, leave_out, serve
from torch import Tensor

leave_out("overcomplete.visualization")  # its plots use what matplotlib 3.11 no longer has

from overcomplete.sae import SAE, TopKSAE  # noqa: E402
from overcomplete.sae.losses import mse_l1  # noqa: E402
from overcomplete.sae.train import train_sae, train_sae_amp  # noqa: E402


def mse(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    """The criterion of its README for TopK."""
    return (x - x_hat).square().mean()


class Overcomplete(Contender):
    """Its SAE; the dictionary is normalised whenever training uses it."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        self.criterion: Any = mse
        if cell.kind == "l1":
            self.model = SAE(cell.width, cell.dictionary_size, device=cell.device)
            self.criterion = partial(mse_l1, penalty=cell.sparsity / (cell.width * cell.batch))
        else:
            self.model = TopKSAE(cell.width, cell.dictionary_size, top_k=cell.k, device=cell.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=cell.rate)

    def train(self, batches: Iterable[Tensor]) -> None:
        trains = train_sae_amp if self.cell.precision == "bf16" else train_sae
        how = {"nb_epochs": 1, "clip_grad": 0.0, "monitoring": 0, "device": self.cell.device}
        trains(self.model, batches, self.criterion, self.optimizer, **how)

    def encode(self, activations: Tensor) -> Tensor:
        self.model.eval()
        latents: Tensor = self.model.encode(activations)[1]
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        reconstruction: Tensor = self.model.decode(latents)
        return reconstruction


if __name__ == "__main__":
    serve(Overcomplete)
