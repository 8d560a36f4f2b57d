"""Activations larger than memory: training that streams them from disk, under a limit too low to hold them.

    python benchmarks/memory.py [--allowed 256] [--epochs 3] [--folder FOLDER]

A train split four times as large as the allowed memory is written to disk, class by class. Each way then runs in a
process of its own, on the CPU. An SAE is trained on the split, streamed or held in memory, each with and without the
limit; and a split of that size is captured under the limit. The limit is on the address space (``ulimit -v``) and is
set once everything is imported and warm: it allows so much on top. Files in the page cache do not count.
"""

import argparse
import ctypes
import json
import logging
import math
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from salve.activations import Shards, load_captured
from salve.activations.capture import SHARD_ROWS, capture
from salve.artifacts import Artifact, Store, save_tensors
from salve.backbones import Site
from salve.backbones.cut import Cut
from salve.backbones.site import Reader
from salve.backbones.tail import LinearTail
from salve.processes.ranks import Ranks
from salve.processes.trainer import TrainerFactory
from salve.stages import BackboneSettings, SAESettings, StageContext, train_sae

MIB = 2**20
WIDTH, DICTIONARY, CLASSES, FEATURES, ACTIVE = 512, 512, 10, 128, 8
#: Rows of the select split, and of the test split.
HELD_OUT = 4096
#: Size of the split over the allowed memory.
TIMES = 4
#: Exit status of a way that ran out of memory.
OUT_OF_MEMORY = 3


class Took(NamedTuple):
    """MiB of address space that a way took, and rows/s; for a training its FVE and rows of a block."""

    peak: float
    rate: float
    fve: float = math.nan
    block: int | None = None


class HeadContext(StageContext):
    """A context whose classifier is a drawn head."""

    def cut(self, classifier: Artifact) -> Any:
        return SimpleNamespace(
            linear=LinearTail(
                torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1)), torch.zeros(CLASSES)
            )
        )


class Clock(pl.Callback):
    """Times the epochs, from the first one's start to the last one's end."""

    took = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        self.took = time.perf_counter() - self._start


def drawn(store: Store, rows: int) -> Artifact:
    """Draw rows class by class: the class's direction, some of many shared features, and noise, behind a ReLU."""

    def make(folder: Path, _: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(FEATURES, WIDTH, generator=generator) / WIDTH**0.5
        classes = 2 * torch.randn(CLASSES, WIDTH, generator=generator) / WIDTH**0.5
        for split, count in (("train", rows), ("select", HELD_OUT), ("test", HELD_OUT)):
            for shard, start in enumerate(range(0, count, SHARD_ROWS)):
                size = min(SHARD_ROWS, count - start)
                labels = torch.arange(start, start + size) * CLASSES // count
                which = torch.rand(size, FEATURES, generator=generator).topk(ACTIVE, dim=1).indices
                codes = torch.zeros(size, FEATURES).scatter(1, which, 1 + torch.rand(size, ACTIVE, generator=generator))
                noise = 0.03 * torch.randn(size, WIDTH, generator=generator)
                tensors = {Shards.NAME: (classes[labels] + codes @ features + noise).relu(), "labels": labels}
                save_tensors(folder / f"{split}-{shard:05d}.safetensors", tensors)

    return store.get_or_make("activations", {"drawn": rows}, make)


def memory_of_process(field: str) -> float:
    """MiB of this process: ``VmSize`` of its address space, ``VmRSS`` resident; ``VmPeak``, ``VmHWM`` the most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


@contextmanager
def limited(allowed: float) -> Iterator[None]:
    """Allow so many MiB of address space more than now."""
    most = int((memory_of_process("VmSize") + allowed) * MIB)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def train(store: Store, activations: Artifact, epochs: int, memory: float) -> Took:
    """Train an SAE on activations of :data:`WIDTH` channels; ``memory`` is ``trainer.memory`` in MiB."""
    clock, trainer_factory = Clock(), TrainerFactory("cpu", None, 1, "32-true", None, False)

    def make_trainer(stage: str, most: int, callbacks: list[pl.Callback]) -> pl.Trainer:
        return trainer_factory(stage, most, [*callbacks, clock])

    data: Any = None
    backbone, cpu = BackboneSettings("timm", "none", "random"), torch.device("cpu")
    context = HeadContext(
        *(store, data, backbone, "last", 0, make_trainer, cpu, lambda *_: nullcontext(lambda _: None), Ranks("cpu")),
        memory=memory / 1024,
    )
    settings = SAESettings("topk", DICTIONARY, 0.0, 16, False, 3e-3, 256, steps=0, seed=0, ensemble=1, epochs=epochs)
    classifier = store.get_or_make("classifier", {}, lambda *_: None)
    before = memory_of_process("VmSize")
    record = train_sae(context, settings, classifier, activations).record("sae.json")
    peak = memory_of_process("VmPeak") - before
    rows = len(load_captured(activations.path, "train").rows)
    return Took(peak, rows * epochs / clock.took, record["fve"], record["shuffled_within"])


def captured(folder: Path, rows: int) -> Took:
    """Capture a split from drawn images, by a very small network."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    site = Site("hidden", (Reader("3.weight"),), WIDTH, map="0")

    def batches(indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(indices), 256):
            count = min(256, len(indices) - start)
            yield torch.rand(count, 3, 8, 8), torch.zeros(count, dtype=torch.long)

    before, start = memory_of_process("VmSize"), time.perf_counter()
    read = Cut(model, site, torch.arange(CLASSES)).read
    capture(read, site.name, rows, batches, folder, "train", torch.device("cpu"))
    took = time.perf_counter() - start
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert written >= rows * WIDTH * 4, "not all rows are on the disk"
    return Took(memory_of_process("VmPeak") - before, rows / took)


def child(way: str, allowed: float, epochs: int, folder: Path) -> Took:
    """Run one way in this process."""
    rows = rows_of(allowed)
    limit = nullcontext() if way.endswith("no limit") else limited(allowed)
    if way.startswith("capture"):
        for name, count, around in (("warm", SHARD_ROWS, nullcontext()), ("measured", rows, limit)):
            with tempfile.TemporaryDirectory(dir=folder, prefix=name) as shards, around:
                took = captured(Path(shards), count)
        return took
    memory = allowed / 2 if way.startswith("streamed") else math.inf
    with tempfile.TemporaryDirectory(dir=folder) as warm:
        warming = Store(Path(warm))
        train(warming, drawn(warming, 2 * SHARD_ROWS), 1, 8.0 if way.startswith("streamed") else math.inf)
    # A store of its own, so that no way finds another's SAE.
    store = Store(folder / way.replace(" ", "-").replace(",", ""))
    store.root.mkdir()
    (store.root / "activations").symlink_to(folder / "activations", target_is_directory=True)
    # Memory that the warm-up left on the heap would not count towards the limit.
    ctypes.CDLL(None).malloc_trim(0)
    with limit:
        return train(store, drawn(store, rows), epochs, memory)


def rows_of(allowed: float) -> int:
    """Rows of a split ``TIMES`` as large as the allowed memory."""
    return int(TIMES * allowed * MIB / (4 * WIDTH))


WAYS = (
    "streamed, limit",
    "streamed, no limit",
    "in memory, no limit",
    "in memory, limit",
    "capture, limit",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allowed", type=float, default=256, help="MiB")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the split is written and removed; needs 2 × 4 × allowed")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if given.child:
        try:
            print(json.dumps(child(given.child, given.allowed, given.epochs, given.folder)))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
                raise
            sys.exit(OUT_OF_MEMORY)
        return
    rows = rows_of(given.allowed)
    size = f"{rows:,} × {WIDTH} ({rows * WIDTH * 4 / MIB:,.0f} MiB) on disk, class by class"
    table = Table(
        title=f"Allowed: {given.allowed:.0f} MiB; train split {size}\ntopk, d={DICTIONARY}, {given.epochs} epochs"
    )
    for column in ("", "peak, MiB", "rows/s", "FVE on test", "shuffled within"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        drawn(Store(Path(name)), rows)
        for way in WAYS:
            options = ["--allowed", str(given.allowed), "--epochs", str(given.epochs), "--folder", name]
            command = [sys.executable, __file__, *options, "--child", way]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == OUT_OF_MEMORY:
                table.add_row(way, "out of memory")
                continue
            if done.returncode:
                sys.exit(f"{way}:\n{done.stderr}")
            took = Took(*json.loads(done.stdout.splitlines()[-1]))
            fve = "" if math.isnan(took.fve) else f"{took.fve:.4f}"
            table.add_row(way, f"{took.peak:,.0f}", f"{took.rate:,.0f}", fve, f"{took.block:,}" if took.block else "")
    Console().print(table)


if __name__ == "__main__":
    main()
