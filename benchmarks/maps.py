"""A dry run of a capture at a map: rows 20 times as large as the memory allowed, then an SAE trained on them.

    python benchmarks/maps.py [--allowed 256] [--shard 32] [--times 20] [--folder FOLDER]

A small network with a map of 8 × 8 positions and 512 channels looks at drawn images, and 32 positions of each are
kept, through the stages' own code: data, loader, store and SAE. The peak is that of resident memory, over what there is
once everything is imported and warm. Pages of a file count while the file is mapped. If the peak is above what is
allowed, the run fails. ``trainer.memory`` is a quarter of it; blocks of a fixed size, in which a finished SAE is
measured, come on top (docs/scale.md): about 80 MiB.

    OMP_NUM_THREADS=1 python benchmarks/maps.py --rate   # the rate of the plan in docs/scale.md
"""

import argparse
import ctypes
import hashlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from memory import CLASSES, MIB, WIDTH, memory_of_process, train
from rich.console import Console
from torch import Tensor, nn

from salve.activations import capture as shards
from salve.activations import captured
from salve.artifacts import Artifact, Store
from salve.backbones import find_site
from salve.backbones.cut import Cut
from salve.backbones.sites import graph_of
from salve.data import ImageData, Preprocess
from salve.data.base import RawImages
from salve.processes.ranks import Ranks
from salve.types import Labels, Split

SAMPLED, PIXELS = 32, 16
#: Images of the select split, and of the test split.
HELD_OUT = 256


class Streamed(NamedTuple):
    """Bytes of rows; seconds of the capture; MiB at most in capture, and in capture and training; rows/s; FVE."""

    size: int
    seconds: float
    capture_peak: float
    peak: float
    rate: float
    fve: float
    block: int | None


class Drawn(ImageData):
    """Images of noise, each drawn when it is read."""

    name = "drawn"

    def __init__(self, train_images: int) -> None:
        super().__init__(batch_size=32)
        self._counts = {"train": train_images, "select": HELD_OUT, "test": HELD_OUT}
        self.bind(Preprocess(size=PIXELS, resize=None))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("abcdefghij"[:CLASSES])

    def raw(self, split: Split) -> RawImages:
        return Noise(self._counts[split], len(split))

    def labels(self, split: Split) -> Labels:
        return torch.arange(self._counts[split]) % CLASSES

    def fingerprint(self) -> str:
        return hashlib.sha256(str(self._counts).encode()).hexdigest()


class Noise:
    """So many images of noise with labels."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self._seed << 32 | index)
        image = torch.randint(0, 256, (3, PIXELS, PIXELS), dtype=torch.uint8, generator=generator)
        return image, index % CLASSES


def cut() -> Cut:
    """A network cut at the map ``[n, 64, 512]`` that its last convolution reads."""
    torch.manual_seed(0)
    parts = nn.Conv2d(3, WIDTH, 2, 2), nn.ReLU(), nn.Conv2d(WIDTH, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*parts).eval()
    return Cut(model, find_site(model, "2", PIXELS), torch.arange(CLASSES), graph_of(model, PIXELS))


@contextmanager
def silent(_: str, __: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def capture(store: Store, images: int) -> Artifact:
    """Capture the map, as the stage does."""
    return captured(store, cut(), Drawn(images), Ranks("cpu"), silent, SAMPLED)


def stream(folder: Path, allowed: float, times: float, shard: float) -> Streamed:
    """Capture and train on ``times`` as many bytes as the MiB that are allowed; ``shard``: MiB of a file."""
    shards.SHARD_BYTES = int(shard * MIB)
    images = int(times * allowed * MIB / (4 * SAMPLED * WIDTH))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        warming = Store(Path(name))
        train(warming, capture(warming, HELD_OUT), 1, 2.0)
    # Memory that the warm-up left on the heap would not count.
    ctypes.CDLL(None).malloc_trim(0)
    before, store = memory_of_process("VmRSS"), Store(folder)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    start = time.perf_counter()
    activations = capture(store, images)
    seconds, capture_peak = time.perf_counter() - start, memory_of_process("VmHWM") - before
    took = train(store, activations, 1, allowed / 4)
    size = sum(path.stat().st_size for path in activations.path.glob("train-*.safetensors"))
    assert size >= images * SAMPLED * WIDTH * 4, "not all rows are on the disk"
    return Streamed(size, seconds, capture_peak, memory_of_process("VmHWM") - before, took.rate, took.fve, took.block)


def seconds_per_image(images: int = 32) -> float:
    """CPU seconds that ViT-B/16 takes for an image of 224 pixels, read before the MLP of block 8."""
    model, seen = timm.create_model("vit_base_patch16_224", num_classes=CLASSES).eval(), list[Tensor]()
    model.get_submodule("blocks.8.mlp.fc1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def read(batch: Tensor) -> Tensor:
        seen.clear()
        model(batch)
        return seen[0]

    def batches(rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(0, len(rows), 8):
            yield torch.randn(8, 3, 224, 224), torch.zeros(8, dtype=torch.long)

    sample, start = partial(shards.sampled_positions, 0, "train", 197, 16), 0.0
    for count in (8, images):  # the first is a warm-up
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            shards.capture(read, "x", count, batches, Path(folder), "train", torch.device("cpu"), sample=sample)
    return (time.process_time() - start) / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allowed", type=float, default=256, help="MiB")
    parser.add_argument("--shard", type=float, default=shards.SHARD_BYTES / MIB, help="MiB of rows in a file")
    parser.add_argument("--times", type=float, default=20, help="size of the rows over the memory")
    parser.add_argument("--folder", type=Path, help="where rows are written and removed; needs times × allowed")
    parser.add_argument("--rate", action="store_true", help="only time ViT-B/16, for the plan in docs/scale.md")
    given = parser.parse_args()
    if given.rate:
        print(f"ViT-B/16: {seconds_per_image():.3f} CPU seconds an image, {torch.get_num_threads()} threads")
        return
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = stream(Path(folder), given.allowed, given.times, given.shard)
    rows = found.size // (4 * WIDTH)
    Console().print(
        f"allowed {given.allowed:.0f} MiB; rows {rows:,} × {WIDTH}, {found.size / MIB:,.0f} MiB on disk\n"
        f"capture: peak {found.capture_peak:.0f} MiB, {found.seconds:.0f} s, {rows / found.seconds:,.0f} positions/s, "
        f"{found.size / MIB / found.seconds:.0f} MiB/s\n"
        f"capture and training: peak {found.peak:.0f} MiB, {found.rate:,.0f} rows/s in training, shuffled within "
        f"{found.block or rows:,} rows, FVE on test {found.fve:.3f}",
        highlight=False,
    )
    if found.peak > given.allowed:
        parser.exit(1, "The peak is above what is allowed.\n")


if __name__ == "__main__":
    main()
