"""How fast SAEs train together: an ensemble against one SAE after the other, in one process or in one each.

    python benchmarks/ensemble.py [--device cuda] [--members 1 8 32] [--epochs 3] [--rounds 2]

All ways train linear L1 SAEs on the same drawn activations, of the sizes of the quickstart and of ResNet-18 on
Imagenette, and measure them every epoch. Every way is timed in every round, in turn, and the best round counts. A few
epochs are timed. ``s/SAE`` is the time of 60 epochs at that pace, with the time before and after them: for a process
that includes start-up, imports and reading the activations.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from salve.activations import ActivationsData, Schedule, WholeData
from salve.artifacts import load_tensors, save_tensors
from salve.sae import Member, SAEEnsemble, SparseAutoencoder, make_sae

FULL = 60


class Size(NamedTuple):
    """Rows of the train and select splits, width ``M`` and dictionary size ``d``."""

    name: str
    train: int
    select: int
    width: int
    dictionary_size: int


SIZES = (Size("quickstart", 4000, 500, 256, 256), Size("ResNet-18, Imagenette", 9469, 3925, 512, 256))
CLASSES, BATCH, RATE = 10, 256, 1e-3


class Took(NamedTuple):
    """Seconds of the timed epochs, and of everything else."""

    epochs: float
    rest: float


class Clock(pl.Callback):
    """Times the epochs, from the first one's start to the last one's end."""

    def on_train_epoch_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.start = now()

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        self.took = now() - self.start


def now() -> float:
    """Seconds, once the device has caught up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def activations(size: Size) -> dict[str, Tensor]:
    """Draw activations as behind a ReLU: not negative, with a direction for each class."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(CLASSES, size.width, generator=generator)
    drawn: dict[str, Tensor] = {}
    for split, rows in (("train", size.train), ("select", size.select)):
        labels = torch.randint(CLASSES, (rows,), generator=generator)
        noise = torch.randn(rows, size.width, generator=generator)
        drawn |= {split: (directions[labels] + 0.5 * noise).relu(), f"{split}_labels": labels}
    return drawn


def member(size: Size, number: int) -> Member:
    """A member of a grid of four seeds and as many λ as needed."""
    seed = number % 4
    sae = make_sae("linear_l1", size.width, size.dictionary_size, torch.Generator().manual_seed(seed))
    return Member(sae, 0.5 * (1 + number // 4), seed)


def fit(module: pl.LightningModule, data: pl.LightningDataModule, device: str, epochs: int) -> Took:
    """Train as ``salve`` does, without checkpoints."""
    clock, start = Clock(), now()
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=epochs,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return Took(clock.took, now() - start - clock.took)


def alone(size: Size, drawn: dict[str, Tensor], device: str, epochs: int) -> Took:
    """Train one SAE through :class:`SparseAutoencoder`."""
    schedule = Schedule.of_epochs(size.train, BATCH, epochs)
    data = ActivationsData(drawn["train"], drawn["select"], drawn["select_labels"], schedule)
    head = nn.Linear(size.width, CLASSES).requires_grad_(False)
    one = member(size, 0)
    return fit(SparseAutoencoder(one.sae, one.sparsity, RATE, head), data, device, epochs)


def together(size: Size, drawn: dict[str, Tensor], device: str, epochs: int, members: int) -> Took:
    """Train several SAEs through :class:`SAEEnsemble`."""
    schedule = Schedule.of_epochs(size.train, BATCH, epochs)
    data = WholeData(drawn["train"], drawn["select"], drawn["select_labels"], schedule)
    head = nn.Linear(size.width, CLASSES).requires_grad_(False)
    chosen = [member(size, number) for number in range(members)]
    return fit(SAEEnsemble(chosen, schedule, RATE, head), data, device, epochs)


def process(size: Size, file: Path, device: str, epochs: int) -> Took:
    """Train one SAE in a fresh process, which prints the seconds of its epochs."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--device", device, "--epochs", str(epochs), "--child", str(file), size.name]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    took = float(said.split()[-1])
    return Took(took, time.perf_counter() - start - took)


def compare(size: Size, device: str, epochs: int, counts: list[int], rounds: int) -> list[tuple[str, int, Took]]:
    """Time every way; returns its name, the number of SAEs and its best round."""
    drawn = activations(size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "activations.safetensors"
        save_tensors(file, drawn)
        ways: dict[tuple[str, int], Callable[[], Took]] = {
            ("a process each", 1): partial(process, size, file, device, epochs),
            ("one by one", 1): partial(alone, size, drawn, device, epochs),
        }
        for count in counts:
            ways[f"{count} together", count] = partial(together, size, drawn, device, epochs, count)
        alone(size, drawn, device, 1)  # warms up what is set up once
        found: dict[tuple[str, int], list[Took]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                found[way].append(run())
    return [(name, count, min(took, key=sum)) for (name, count), took in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if given.child:
        file, name = given.child
        [size] = [size for size in SIZES if size.name == name]
        print(alone(size, load_tensors(Path(file)), given.device, given.epochs).epochs)
        return
    device = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    console = Console()
    for size in SIZES:
        sizes = f"N={size.train}, M={size.width}, d={size.dictionary_size}, batch {BATCH}"
        table = Table(title=f"{size.name}: {sizes}\n{device}, {load}")
        for column in ("", "rows/s, all SAEs", "s/SAE", "vs a process each", "vs one by one"):
            table.add_column(column, justify="right" if column else "left")
        found = compare(size, given.device, given.epochs, given.members, given.rounds)
        seconds = {name: (took.rest + took.epochs * FULL / given.epochs) / count for name, count, took in found}
        for name, count, took in found:
            ratios = [f"{seconds[other] / seconds[name]:.1f} ×" for other in ("a process each", "one by one")]
            rate = count * size.train * given.epochs / took.epochs
            table.add_row(name, f"{rate:,.0f}", f"{seconds[name]:.2f}", *ratios)
        console.print(table)


if __name__ == "__main__":
    main()
