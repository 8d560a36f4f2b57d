"""dictionary-learning: ``update`` of its StandardTrainer and TopKTrainer, as its ``trainSAE`` calls it.

Its L1 loss is that of ``Cell``. Warm-ups and AuxK are off. TopKTrainer clips gradients, and starts its decoder's bias
from the geometric median of the first batch; neither can be turned off. Its bf16 is for GPUs only.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from contender import Cell, Contender, RefusedError, Rows, leave_out, serve
from torch import Tensor

leave_out("nnsight")  # its buffer of a language model's activations

from dictionary_learning.trainers import StandardTrainer, TopKTrainer  # noqa: E402


class DictionaryLearning(Contender):
    """One of its trainers."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        if cell.precision == "bf16" and cell.device == "cpu":
            raise RefusedError("its autocast is for GPUs only")
        common: dict[str, Any] = {
            "steps": cell.steps + 1,
            "activation_dim": cell.width,
            "dict_size": cell.dictionary_size,
            "lr": cell.rate,
            "warmup_steps": 0,
            "seed": cell.seed,
            "device": cell.device,
            "layer": 0,
            "lm_name": "none",
        }
        if cell.kind == "l1":
            self.trainer = StandardTrainer(l1_penalty=cell.sparsity, sparsity_warmup_steps=None, **common)
        else:
            self.trainer = TopKTrainer(k=cell.k, auxk_alpha=0.0, **common)
        self.step = 0

    def train(self, batches: Iterable[Tensor]) -> None:
        mixed = self.cell.precision == "bf16"
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                self.trainer.update(self.step, batch.to(torch.bfloat16) if mixed else batch)
            self.step += 1

    def encode(self, activations: Tensor) -> Tensor:
        latents: Tensor = self.trainer.ae.encode(activations)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        reconstruction: Tensor = self.trainer.ae.decode(latents)
        return reconstruction


if __name__ == "__main__":
    serve(DictionaryLearning)
