"""sae-lens: its StandardTrainingSAE and TopKTrainingSAE through ``step`` of its SAETrainer, as its ``fit`` calls it.

Its L1 loss is that of ``Cell``, with a price on ``z ‖d‖`` in place of unit-norm columns. It clips gradients, which
cannot be turned off. The window of its AuxK is longer than the training. Its bf16 is its ``autocast``.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from contender import Cell, Contender, Rows, leave_out, serve
from torch import Tensor

if find_spec("wandb") is None:
    leave_out("wandb")  # its logger

from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


class SAELens(Contender):
    """Its trainer, which gets the batches one by one."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        sizes: dict[str, Any] = {"d_in": cell.width, "d_sae": cell.dictionary_size, "device": cell.device}
        self.sae: Any
        if cell.kind == "l1":
            self.sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=cell.sparsity, **sizes))
        else:
            self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=cell.k, **sizes))
        config = SAETrainerConfig(
            total_training_samples=cell.steps * cell.batch,
            train_batch_size_samples=cell.batch,
            lr=cell.rate,
            lr_end=cell.rate,  # must be set; the schedule is constant
            device=cell.device,
            autocast=cell.precision == "bf16",
            dead_feature_window=cell.steps + 1,
        )
        self.trainer: Any = SAETrainer(config, self.sae, iter(()))

    def train(self, batches: Iterable[Tensor]) -> None:
        for batch in batches:
            self.trainer.maybe_reset_sparsity()
            self.trainer.step(batch)
            self.trainer.n_training_steps += 1

    def encode(self, activations: Tensor) -> Tensor:
        latents: Tensor = self.sae.eval().encode(activations)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        reconstruction: Tensor = self.sae.decode(latents)
        return reconstruction


if __name__ == "__main__":
    serve(SAELens)
