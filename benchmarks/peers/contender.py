"""What every contender of ``benchmarks/training.py`` shares: orders, rows, clock and measures.

A contender is a process in the environment of its library, so nothing here imports this project's package. It reads
orders from its standard input, one JSON object a line, and answers each on its standard output:

    {"cell": {…}}      make the SAE           → {}
    {"train": 20}      train 20 steps         → {"steps": 20, "seconds": 1.3}
    {"look": true}     encode held-out rows   → {"fve": 0.8, "l0": 31.2, "loss": 104.2}
    {"measure": true}  the same, and the end  → {"fve": 0.8, "l0": 31.2, "loss": 104.2, "memory": 123456}

or with ``{"refused": "why"}``. Answers begin with a mark, because libraries print other lines.
"""

import ctypes
import gc
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

MARK = "benchmark:"
CHUNK = 1024


@dataclass(frozen=True)
class Cell:
    """What is trained; only ``precision`` differs between contenders.

    Attributes:
        file: activations: ``train`` ``[N, M]`` and ``held_out`` ``[N', M]``, in units where ``mean ‖a‖² = M``.
        width: ``M``. dictionary_size: ``d``. batch: rows per step. steps: of the whole training.
        kind: ``l1``: ReLU latents with the loss ``mean(Σ (a − â)² + λ Σ z)``; ``topk``: the same loss with λ = 0.
        sparsity: λ. k: latents that fire. rate: Adam's, constant. seed: of the start and of the order of rows.
        precision: ``fp32``, or ``bf16`` for the library's own mixed precision.
        matmul: torch's float32 matmul precision: ``highest``, or ``high`` for TF32 on a GPU.
    """

    file: str
    width: int
    dictionary_size: int
    kind: str
    batch: int
    steps: int
    sparsity: float
    k: int
    rate: float
    seed: int
    device: str
    precision: str
    matmul: str


class _Absent(ModuleType):
    """A module with every name in it: a class that does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # libraries look for it to see what is installed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def leave_out(*modules: str) -> None:
    """Let a library import modules that its training never calls, whether they can be imported or not."""
    for module in modules:
        sys.modules[module] = _Absent(module)


class RefusedError(Exception):
    """The library cannot train a cell; the message says why."""


class EndError(Exception):
    """There are no orders left; raised to leave a library's own loop."""


class Rows(NamedTuple):
    """Activations on the device, ``[N, M]`` and ``[N', M]``."""

    train: Tensor
    held_out: Tensor


class Line:
    """Orders from the parent, and answers to it.

    Attributes:
        look: gives the answer to an order to look.
    """

    look: Callable[[], dict[str, float]]

    def receive(self) -> dict[str, Any]:
        """The next order; ends the process if there is none."""
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        order: dict[str, Any] = json.loads(line)
        return order

    def say(self, **what: Any) -> None:
        """Answer."""
        print(MARK + json.dumps(what), flush=True)

    def slices(self) -> Iterator[int]:
        """The steps of each order to train, until the order to measure; :meth:`took` answers each."""
        while "measure" not in (order := self.receive()):
            if "look" in order:
                self.say(**self.look())
            else:
                yield order["train"]

    def took(self, steps: int, seconds: float) -> None:
        """Answer that so many steps took so long."""
        self.say(steps=steps, seconds=seconds)


class Rehearsal(Line):
    """Orders two steps, and takes no answer."""

    def slices(self) -> Iterator[int]:
        yield 2

    def took(self, steps: int, seconds: float) -> None:
        pass


class Contender(ABC):
    """A library's SAE in training, made from a cell and the rows."""

    def __init__(self, cell: Cell, rows: Rows) -> None:
        self.cell, self.rows = cell, rows

    @abstractmethod
    def train(self, batches: Iterable[Tensor]) -> None:
        """Make one training step with each batch ``[B, M]``."""

    @abstractmethod
    def encode(self, activations: Tensor) -> Tensor:
        """Latents ``[N, d]`` of activations ``[N, M]``, as in use."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Reconstructions ``[N, M]`` of latents ``[N, d]``, as in use."""

    def run(self, line: Line) -> None:
        """Train in slices as ordered, and answer how long each took."""
        batches = shuffled(self.rows.train, self.cell.batch, self.cell.seed)
        for steps in line.slices():
            start = now(self.cell.device)
            self.train(islice(batches, steps))
            line.took(steps, now(self.cell.device) - start)

    def look(self) -> dict[str, float]:
        """Measure the SAE as it is now, without an effect on the training."""
        modules = [m for one in vars(self).values() if isinstance(one, nn.Module) for m in one.modules()]
        training = [module.training for module in modules]
        found = measure(self.encode, self.decode, self.rows.held_out, self.cell)
        for module, was in zip(modules, training, strict=True):
            module.training = was
        return found


def shuffled(rows: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches ``[B, M]`` of rows ``[N, M]``, without end, in a new order each epoch; a rest is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch]]


def now(device: str) -> float:
    """Seconds, once the device has caught up."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], rows: Tensor, cell: Cell
) -> dict[str, float]:
    """FVE with the mean taken per dimension, L0, and the loss, of held-out rows ``[N, M]``; sums in float64.

    ``FVE = 1 − Σ (a − â)² / Σ (a − ā)²`` with ``ā [M]``. L0 is the mean number of latents that are not zero. The loss
    is the mean of ``Σ_j (a_j − â_j)² + λ Σ_l |z_l| ‖d_l‖``: that of :class:`Cell`, once columns have unit norm.
    """
    mean = rows.mean(dim=0, dtype=torch.float64)
    price = rows.new_zeros(cell.dictionary_size)
    if cell.kind == "l1":
        nothing = decode(rows.new_zeros(1, cell.dictionary_size))
        for some in torch.arange(cell.dictionary_size, device=rows.device).split(CHUNK):
            units = nn.functional.one_hot(some, cell.dictionary_size).to(rows.dtype)
            price[some] = cell.sparsity * (decode(units) - nothing).norm(dim=1)
    residual = variance = fired = paid = 0.0
    for chunk in rows.split(CHUNK):
        latents = encode(chunk)
        fired += float((latents != 0).sum())
        paid += float((latents.abs() @ price).double().sum())
        exact = chunk.double()
        residual += float((exact - decode(latents).double()).square().sum())
        variance += float((exact - mean).square().sum())
    return {"fve": 1 - residual / variance, "l0": fired / len(rows), "loss": (residual + paid) / len(rows)}


def serve(make: Callable[[Cell, Rows], Contender]) -> None:
    """Train cell after cell as ordered, until there are no orders left."""
    line = Line()
    line.say(torch=torch.__version__, threads=torch.get_num_threads())
    while True:
        cell = Cell(**line.receive()["cell"])
        try:
            _serve(line, make, cell)
        except RefusedError as refusal:
            line.say(refused=str(refusal))
        gc.collect()


def _serve(line: Line, make: Callable[[Cell, Rows], Contender], cell: Cell) -> None:
    """One cell."""
    torch.manual_seed(cell.seed)
    torch.set_float32_matmul_precision(cell.matmul)
    loaded = load_file(Path(cell.file), device=cell.device)
    rows = Rows(loaded["train"], loaded["held_out"])
    # Imports and whatever else is set up once are neither timed nor counted as memory of the training.
    small = replace(cell, width=8, dictionary_size=16, batch=32, k=2, steps=2)
    make(small, Rows(*(torch.randn(64, 8, device=cell.device) for _ in rows))).run(Rehearsal())
    memory = Memory(cell.device)
    contender = make(cell, rows)
    line.look = contender.look
    line.say()
    contender.run(line)
    added = memory.added()
    line.say(memory=added, **contender.look())


class Memory:
    """Peak of memory from now on: allocated on a GPU; else resident, without the pages of files.

    These files are the libraries' code and the rows, which are mapped.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = int(torch.cuda.memory_allocated())
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use
            self.before = _resident("RssAnon")

    def added(self) -> int:
        """Bytes at the peak beyond those in use at the start."""
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated()) - self.before
        return _resident("VmHWM") - _resident("RssFile") - _resident("RssShmem") - self.before


def _resident(name: str) -> int:
    """Bytes of this process by Linux's name for them."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
