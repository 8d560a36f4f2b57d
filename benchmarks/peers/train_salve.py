"""This project's SAE, as its users train it: :class:`salve.sae.SparseAutoencoder` through Lightning's Trainer.

    python train_salve.py         with the Trainer
    python train_salve.py loop    its objective and Adam in a bare loop, which shows the Trainer's cost
    python train_salve.py memory  with the Trainer, and the rows in main memory, as after a capture
    python train_salve.py data    with the Trainer, and ``sae.centre=true sae.learn_b_dec=true sae.start=data``

Nothing is measured or saved on the way. The learning rate is constant, as for all.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
import torch
from contender import Cell, Contender, EndError, Line, Rows, now, serve
from torch import Tensor, nn

from salve.activations import ActivationsData, Schedule
from salve.sae import SAE, SparseAutoencoder, make_sae
from salve.sae.adam import Adam
from salve.sae.memory import keep_freed_memory
from salve.sae.objective import step_loss
from salve.stages.training import quiet_lightning

FOREVER = 10**9
PRECISION: dict[str, Any] = {"fp32": "float32", "bf16": "bf16"}


def made(cell: Cell) -> tuple[SAE, float]:
    """The SAE of a cell, and its λ."""
    generator = torch.Generator().manual_seed(cell.seed)
    if cell.kind == "l1":
        return make_sae("relu_l1", cell.width, cell.dictionary_size, generator), cell.sparsity
    return make_sae("topk", cell.width, cell.dictionary_size, generator, k=cell.k), 0.0


class Slices(pl.Callback):
    """Answers how long the ordered steps took, then waits for the next order, between two steps of the optimiser.

    It follows the optimiser, because one ``training_step`` makes many steps.
    """

    def __init__(self, line: Line, device: str) -> None:
        self.line, self.device = line, device
        self.slices: Iterator[int] = line.slices()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.optimizers[0].register_step_pre_hook(self.before_step)
        self.wait()

    def before_step(self, *_: Any) -> None:
        """Count the steps, and answer once all that were ordered are done."""
        if self.done == self.ordered:
            self.line.took(self.done, now(self.device) - self.start)
            self.wait()
        self.done += 1

    def wait(self) -> None:
        """Wait for the next order."""
        self.ordered, self.done = next(self.slices, 0), 0
        if not self.ordered:
            raise EndError
        self.start = now(self.device)


class Salve(Contender):
    """The SAE, its encoder and decoder; the subclasses train it."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        self.sae, self.sparsity = made(cell)
        if "data" in sys.argv:
            mean, generator = rows.train.mean(dim=0).cpu(), torch.Generator().manual_seed(cell.seed)
            drawn = torch.randperm(len(rows.train), generator=generator)[: cell.dictionary_size]
            self.sae.b_dec.copy_(mean)
            self.sae.start_from(rows.train[drawn].cpu(), mean)
            self.sae.learn_b_dec()
        self.sae.to(cell.device)

    def train(self, batches: Iterable[Tensor]) -> None:
        raise NotImplementedError

    def encode(self, activations: Tensor) -> Tensor:
        return self.sae.to(activations.device).eval().encode(activations)

    def decode(self, latents: Tensor) -> Tensor:
        return self.sae.decode(latents)


class Trained(Salve):
    """Trained through the Trainer, which asks for the orders by a callback."""

    def run(self, line: Line) -> None:
        cell = self.cell
        head = nn.Linear(cell.width, 2).requires_grad_(False)  # for the downstream accuracy, which is not measured here
        labels = torch.zeros(len(self.rows.held_out), dtype=torch.long)
        schedule = Schedule.of_epochs(len(self.rows.train), cell.batch, FOREVER)
        train = self.rows.train.cpu() if "memory" in sys.argv else self.rows.train
        data = ActivationsData(train, self.rows.held_out, labels, schedule)
        precision = PRECISION[cell.precision]
        module = SparseAutoencoder(self.sae, self.sparsity, cell.rate, head, precision=precision, warmup=0.0, decay=0.0)
        with quiet_lightning(), suppress(EndError):
            trainer = pl.Trainer(
                accelerator="gpu" if cell.device == "cuda" else "cpu",
                devices=1,
                max_epochs=FOREVER,
                limit_val_batches=0,
                callbacks=[Slices(line, cell.device)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, datamodule=data)


class Looped(Salve):
    """Trained with the same objective, optimiser and projection, without the Trainer."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        super().__init__(cell, rows)
        trained = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]
        self.optimizer = Adam(trained, lr=cell.rate)
        keep_freed_memory()

    def train(self, batches: Iterable[Tensor]) -> None:
        mixed = self.cell.precision == "bf16"
        for batch in batches:
            with torch.autocast(self.cell.device, torch.bfloat16, enabled=mixed):
                loss, _ = step_loss(self.sae, batch, self.sparsity)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.sae.normalise_decoder()


if __name__ == "__main__":
    serve(Looped if "loop" in sys.argv else Trained)
