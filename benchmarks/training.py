"""How fast SAEs train, in ``salve`` and in other libraries: rows per second, memory, and FVE after the same steps.

    python benchmarks/training.py --quick              # one small cell of each kind: three minutes
    python benchmarks/training.py                      # all sizes, batches and kinds
    python benchmarks/training.py --sizes 512x1024 --batches 256 --kinds l1 --steps 5000  # train on for FVE
    python benchmarks/training.py --sizes 512x4096 --batches 256 --steps 1000 --repeats 20 --looks  # time to equal loss

Peers: overcomplete, dictionary-learning, sae-lens, eai-sparsify and saev. Each has an environment of its own
(``environments.py``), and runs its own model, loss and training step as documented, without logging and checkpoints;
``peers/train_*.py`` say how. Beside them: a loop in plain PyTorch, with torch's choice of Adam and with the fused one;
``salve`` through Lightning's Trainer; and ``salve``'s objective in a bare loop, which shows the Trainer's cost.

Each contender is a process, and only one works at a time. In every round each trains a slice of the same number of
steps, in turn, beginning with another each round. Rates are medians over rounds. Then all train on to the same number
of steps, and one function measures FVE, L0 and loss on held-out rows, from the library's own encoding and decoding.
``--looks`` also measures after each round, outside the clock, and prints how long each takes to the same loss.

The same for all: rows, held in memory, in random order (``salve`` draws its own order); float32 parameters; Adam with
one constant rate and betas (0.9, 0.999); no warm-up, AuxK or resampling; ``k``; threads; and the loss up to a factor,
which does not matter to Adam (λ is converted). Left to the libraries: the start (biases, norms); clipped gradients
(sae-lens; dictionary-learning's TopK); removing gradients along the decoder's columns (dictionary-learning,
eai-sparsify, saev); columns of any norm (sae-lens); single or fused Adam. bf16 is each library's own mixed precision,
if it has one. Compare the FVE of L1 only together with its L0.

It needs Linux, because it reads memory from ``/proc``. The first run makes the environments: a few minutes, 2.5 GB.

Rows are sums of about 16 of ``2 M`` planted directions with positive strengths, and noise.
"""

import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contenders import BARE, CONTENDERS, Child, GoneError
from machine import Machine, flops_per_sample, measure_machine, most_samples
from peers.contender import Cell
from reaching import reaching_table, write_looks
from results import Look, Result, cell_table, summary, write
from rich.console import Console
from safetensors.torch import save_file

OUTPUTS = Path("outputs/benchmarks")
SIZES, BATCHES, KINDS = ("512x1024", "512x4096", "768x12288"), (256, 1024, 4096), ("l1", "topk")
PRECISIONS = ("fp32", "bf16")
ROWS, HELD_OUT, ACTIVE, NOISE = 65_536, 8_192, 16, 0.05
WARM_UP = 3


def planted(width: int) -> Path:
    """Make a file of rows ``[N, M]`` to train on and held out, scaled so that ``mean ‖a‖² = M``, if it is not there."""
    file = OUTPUTS / f"planted-{width}-{ROWS}.safetensors"
    if file.is_file():
        return file
    # A seed that no library uses for its start.
    generator = torch.Generator().manual_seed(2**31 + width)
    features = 2 * width
    directions = torch.randn(features, width, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chunks = []
    for rows in torch.arange(ROWS + HELD_OUT).split(4096):
        active = torch.rand(len(rows), features, generator=generator) < ACTIVE / features
        strengths = 0.5 + torch.rand(len(rows), features, generator=generator)
        noise = torch.randn(len(rows), width, generator=generator)
        chunks.append((active * strengths) @ directions + (NOISE * ACTIVE / width) ** 0.5 * noise)
    drawn = torch.cat(chunks)
    drawn *= (width / drawn.square().sum(dim=1).mean()).sqrt()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file({"train": drawn[:ROWS].clone(), "held_out": drawn[ROWS:].clone()}, part)
    part.rename(file)
    return file


def slice_steps(bare: Child, cell: Cell, seconds: float) -> int:
    """How many steps take the bare loop so many seconds."""
    bare.order(cell=vars(cell))
    steps, took = WARM_UP, bare.order(train=WARM_UP)["seconds"]
    while took < min(seconds, 0.5):
        steps *= 2
        took = bare.order(train=steps)["seconds"]
    bare.order(measure=True)
    return max(1, round(steps * seconds / took))


@dataclass
class Entry:
    """A contender in one cell."""

    child: Child
    cell: Cell
    result: Result

    def order(self, **what: object) -> dict[str, Any] | None:
        """Send an order; returns the answer, or None once the contender is out."""
        if self.result.why:
            return None
        try:
            return self.child.order(**what)
        except GoneError as gone:
            self.result.why = str(gone)
            return None

    def train(self, steps: int) -> None:
        """Train so many steps, and keep the rate."""
        if took := self.order(train=steps):
            self.result.steps += took["steps"]
            self.result.rates.append(took["steps"] * self.cell.batch / took["seconds"])

    def look(self) -> None:
        """Keep the measures of what it has learned so far."""
        if found := self.order(look=True):
            self.result.looks.append(Look(self.result.steps, found["fve"], found["l0"], found["loss"]))

    def finish(self, train_on: bool) -> None:
        """Train on to the cell's steps if asked to, and measure."""
        result = self.result
        rates, rest = list(result.rates), self.cell.steps - result.steps
        if train_on and rest > 0:
            self.train(rest)
            result.rates = rates
        if (found := self.order(measure=True)) and rates:
            result.rate, result.slowest, result.fastest = statistics.median(rates), min(rates), max(rates)
            result.fve, result.l0, result.loss, result.memory = (found[it] for it in ("fve", "l0", "loss", "memory"))
            result.torch, result.threads = self.child.facts["torch"], self.child.facts["threads"]


def race(
    children: list[Child], cell: Cell, rounds: int, each: int, looks: bool = False, until: float = math.inf
) -> list[Result]:
    """Train all in turn, ``each`` steps at a time, then on to the cell's steps, and measure them.

    Args:
        children: the processes of those who take part. cell: what they train.
        rounds: slices of each. each: steps of a slice. looks: whether to measure after each round.
        until: on the clock of :func:`time.monotonic`; after it there are no further rounds, and nobody trains on.

    Returns:
        A result for each, in their order; it has one rate for each round.
    """
    size, load = f"{cell.width}x{cell.dictionary_size}", os.getloadavg()[0]
    entries = []
    for child in children:
        name, precision = child.contender.name, child.precision
        result = Result(size, cell.kind, cell.batch, name, precision, device=cell.device, load=load)
        entries.append(Entry(child, replace(cell, precision=precision), result))
    for entry in entries:
        if entry.order(cell=vars(entry.cell)) is not None:
            entry.train(WARM_UP)
            entry.result.rates.clear()
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        turn = number % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            entry.train(each)
            if looks:
                entry.look()
    for entry in entries:
        entry.finish(train_on=time.monotonic() <= until)
    return [entry.result for entry in entries]


def placed(result: Result, cell: Cell, machine: Machine) -> None:
    """Fill in a result's shares of the machine's peak and of the limit."""
    flops = flops_per_sample(cell.width, cell.dictionary_size, cell.kind, cell.k)
    most = most_samples(machine, result.precision, flops, cell.width, cell.dictionary_size, cell.batch)
    result.share_of_peak = result.rate * flops / machine.peak(result.precision)
    result.share_of_limit = result.rate / most


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [contender.name for contender in CONTENDERS]
    add("--sizes", nargs="+", default=SIZES, type=_size, metavar="MxD", help=f"default: {' '.join(SIZES)}")
    add("--batches", nargs="+", default=BATCHES, type=int, metavar="B")
    add("--kinds", nargs="+", default=KINDS, choices=KINDS)
    add("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    add("--contenders", nargs="+", default=names, choices=names, help="the bare loop always takes part")
    add("--repeats", type=int, default=5, help="rounds, each a slice of every contender")
    add("--seconds", type=float, default=1.0, help="a slice, at the bare loop's pace in float32")
    add("--steps", type=int, default=0, help="train on to so many steps before FVE is measured")
    add("--looks", action="store_true", help="measure after each round; then a round is steps / repeats steps")
    add("--rate", type=float, default=1e-3, help="learning rate")
    add("--sparsity", type=float, default=1.0, help="λ of L1")
    add("--k", type=int, default=32, help="of TopK")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--matmul", default="highest", choices=["highest", "high"], help="high: TF32 on a GPU, for all")
    add("--peak", action="store_true", help="measure the machine too, and show shares of its limit")
    add("--quick", action="store_true", help="one small cell of each kind")
    given = parser.parse_args()
    if given.quick:
        given.sizes, given.batches, given.repeats, given.seconds = SIZES[:1], BATCHES[:1], 3, 0.5
    if min(given.repeats, *given.batches) < 1 or max(given.batches) > ROWS:
        parser.error(f"--repeats and --batches must be at least 1, and a batch at most {ROWS} rows")
    if given.looks and given.steps < given.repeats:
        parser.error("--looks needs --steps, at least one for each of --repeats")
    return given


def _size(text: str) -> str:
    """Check that a size is two numbers, as in 512x1024."""
    width, x, dictionary_size = text.partition("x")
    if not (x and width.isdigit() and dictionary_size.isdigit() and int(width) and int(dictionary_size)):
        raise argparse.ArgumentTypeError(f"{text} is not a size; one is 512x4096: width and dictionary size")
    return text


def entered(given: argparse.Namespace) -> list[Child]:
    """Start the processes of all contenders."""
    children = []
    for contender in CONTENDERS:
        for precision in given.precisions:
            if contender is not BARE and contender.name not in given.contenders:
                continue
            child = Child(contender, precision)
            if precision == "bf16" and given.device not in contender.bf16:
                child.lost = f"it has no mixed precision on {given.device}"
            else:
                child.start()
            children.append(child)
    return children


def main() -> None:
    given = arguments()
    console, results = Console(width=None if sys.stdout.isatty() else 140), []
    children = entered(given)
    pace = Child(BARE, "fp32")
    pace.start()
    try:
        for child in (pace, *children):
            child.ready()
        for size in given.sizes:
            width, dictionary_size = (int(number) for number in size.split("x"))
            file = str(planted(width).resolve())
            for batch in given.batches:
                machine = (
                    measure_machine(width, dictionary_size, batch, given.device, given.matmul) if given.peak else None
                )
                for kind in given.kinds:
                    cell = Cell(
                        file=file,
                        width=width,
                        dictionary_size=dictionary_size,
                        kind=kind,
                        batch=batch,
                        steps=0,
                        sparsity=given.sparsity,
                        k=given.k,
                        rate=given.rate,
                        seed=0,
                        device=given.device,
                        precision="fp32",
                        matmul=given.matmul,
                    )
                    each = given.steps // given.repeats if given.looks else slice_steps(pace, cell, given.seconds)
                    cell = replace(cell, steps=max(given.steps, WARM_UP + given.repeats * each))
                    found = race(children, cell, given.repeats, each, given.looks)
                    for result in found:
                        if machine:
                            placed(result, cell, machine)
                    results += found
                    console.print(cell_table(found))
                    write(results, OUTPUTS / "training.csv")
                    if given.looks:
                        console.print(reaching_table(found))
                        write_looks(results, OUTPUTS / "looks.csv")
    finally:
        for child in (pace, *children):
            child.end()
    console.print(summary(results))


if __name__ == "__main__":
    main()
