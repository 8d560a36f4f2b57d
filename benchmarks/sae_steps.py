"""SAEs on more or fewer images, trained for a number of steps or of epochs.

    salve name=steps stages=[discover] data.train_per_class=1000 data.select_per_class=150
    python benchmarks/sae_steps.py outputs/artifacts/classifier/KEY outputs/artifacts/activations/KEY

The run prints both folders. The script takes the first captured train images of each class, as many as ``--sizes``
says. On each size it trains the default SAE (linear L1) for ``--steps`` and for ``--epochs``, with the same seeds. It
measures on the select split, and reads nothing of the test split. *Separates*: some strength removes the class and
costs the others no more than ``salve.editing.verdict.LIMITS`` allows. *Cosine*: of the classes' latents with those of
the largest size, trained in the same way from the same seed; latents are chosen by ``margin``, as in a run.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from salve.activations import Captured, Schedule, load_captured
from salve.backbones.tail import LinearTail
from salve.editing import contribution
from salve.editing.curves import edit_curves
from salve.editing.verdict import effect, separated
from salve.features import class_means, select_latents
from salve.metrics import LatentUsage, fraction_of_variance_explained
from salve.sae import SAE, learning_rate_factor, make_sae, objective
from salve.sae.adam import Adam

ALPHAS = torch.tensor([0, *(0.2 * 1.15**n for n in range(45))])


@dataclass
class Found:
    """Measures of one SAE on the select split, and the directions ``[C, M]`` of the classes' latents."""

    fve: float
    l0: float
    dead: float
    separate: int
    directions: Tensor


def first_of_each_class(train: Captured, count: int) -> tuple[Tensor, Tensor]:
    """Activations ``[N, M]`` and labels of the first ``count`` images of each class."""
    labels = train.labels
    rows = torch.cat([(labels == k).nonzero()[:count, 0] for k in range(int(labels.max()) + 1)])
    return train.activations[rows], labels[rows]


def trained(rows: Tensor, schedule: Schedule, seed: int, given: argparse.Namespace) -> SAE:
    """Train an SAE as ``salve`` does, without measuring on the way."""
    scale = float(rows.double().square().mean().sqrt())
    sae = make_sae("linear_l1", rows.shape[1], given.size, torch.Generator().manual_seed(seed)).train()
    optimizer = Adam([it for it in sae.parameters() if it.requires_grad], lr=given.rate)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.rate * learning_rate_factor(step, schedule.steps)
        batch = rows[schedule.order(seed, range(step, step + 1))] / scale
        loss, _ = objective(sae, batch, given.sparsity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalise_decoder()
    sae.eval().fold(scale)
    return sae.requires_grad_(False)


def measured(sae: SAE, rows: Tensor, labels: Tensor, select: Captured, tail: LinearTail) -> Found:
    """Measure on the select split; dead latents, and the classes' latents, on the train rows ``[N, M]``."""
    classes = len(tail)
    means = class_means(sae.encode(rows), labels, classes)
    chosen, separate, directions = select_latents(means, "margin"), 0, []
    for k, latent in enumerate(chosen.tolist()):
        own = np.arange(classes) == k
        column = contribution(sae.decoder, latent)
        accuracy = edit_curves(tail, select.activations, select.labels, column, ALPHAS)[0].numpy()
        separate += bool(separated(effect(accuracy[0], accuracy, own)).any())
        directions.append(column * means[k, latent].sign())
    on_train, on_select = (LatentUsage(sae.dictionary_size, sae.firing_threshold) for _ in range(2))
    on_train.update(sae.encode(rows), rows)
    reconstruction, latents = sae(select.activations)
    on_select.update(latents, select.activations)
    fve = float(fraction_of_variance_explained(select.activations, reconstruction))
    dead, l0 = float(on_train.compute()["dead_fraction"]), float(on_select.compute()["l0"])
    return Found(fve, l0, dead, separate, torch.stack(directions))


def head_of(file: Path, width: int) -> LinearTail:
    """The last linear layer of a file of weights."""
    weights = load_file(file)
    for name, matrix in reversed(weights.items()):
        bias = weights.get(name.removesuffix("weight") + "bias")
        if matrix.ndim == 2 and matrix.shape[1] == width and bias is not None and bias.shape == matrix.shape[:1]:
            return LinearTail(matrix, bias)
    raise SystemExit(f"{file} has no linear layer that reads {width} channels.")


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=Path, help="folder of the artifact")
    parser.add_argument("activations", type=Path, help="folder of the artifact")
    parser.add_argument("--sizes", nargs="+", type=int, default=[60, 250, 1000], help="train images of each class")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.003, help="learning rate")
    parser.add_argument("--size", type=int, default=256, help="of the dictionary")
    parser.add_argument("--sparsity", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), Console(width=None if sys.stdout.isatty() else 120)
    train, select = (load_captured(given.activations, split) for split in ("train", "select"))
    head = head_of(given.classifier / "model.safetensors", train.activations.shape[1])
    table = Table("", "images", "steps", "FVE", "L0", "dead", "classes that separate", "cosine", "s/SAE")
    for way in ("epochs", "steps"):
        largest: list[Found] = []
        lines = []
        for size in sorted(given.sizes, reverse=True):
            rows, labels = first_of_each_class(train, size)
            schedule = Schedule(len(rows), given.batch, given.steps)
            if way == "epochs":
                schedule = Schedule.of_epochs(len(rows), given.batch, given.epochs)
            start, found = time.perf_counter(), []
            for seed in range(given.seeds):
                found.append(measured(trained(rows, schedule, seed, given), rows, labels, select, head))
            took = (time.perf_counter() - start) / given.seeds
            largest = largest or found
            pairs = zip(found, largest, strict=True)
            cosine = np.mean([float((a.directions * b.directions).sum(dim=1).mean()) for a, b in pairs])
            fve, l0, dead = (np.mean([getattr(one, name) for one in found]) for name in ("fve", "l0", "dead"))
            separate = ", ".join(str(one.separate) for one in found)
            numbers = (f"{fve:.3f}", f"{l0:.1f}", f"{dead:.0%}", separate, f"{cosine:.3f}", f"{took:.0f}")
            lines.append((f"{getattr(given, way)} {way}", f"{len(rows):,}", f"{schedule.steps:,}", *numbers))
        for line in reversed(lines):
            table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    main()
