"""SAE trainings: ``salve`` against a bare loop, and against peers.

The bare loop is ``peers/train_bare.py`` with the fused Adam: the same loss, optimiser and projection, and its rows lie
on the card. Every way trains in a process of its own, in turn with the others (``training.race``).
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

from contenders import CONTENDERS, FUSED, LOOPED, SALVE, Child, Contender
from machine import bytes_per_step, flops_per_sample
from peers.contender import Cell
from results import Result
from training import WARM_UP, planted, race, slice_steps

from gpu.report import Line
from gpu.work import Work

#: Rows stay in main memory, from where ``salve`` takes those that it captured.
IN_MEMORY = Contender("salve, rows in main memory", "train_salve.py", "memory")
K, SPARSITY, RATE = 32, 1.0, 1e-3


def train(work: Work) -> None:
    """768 → 12288 in fp32 and bf16, L1 and TopK."""
    width, size, batch = (32, 128, 64) if work.quick else (768, 12288, 4096)
    cells = [(kind, precision) for precision in ("fp32", "bf16") for kind in ("l1", "topk")]
    ways = (FUSED, SALVE) if work.quick else (FUSED, SALVE, LOOPED, IN_MEMORY)
    measure(work, ways, width, size, batch, cells[:1] if work.quick else cells)


def train_large(work: Work) -> None:
    """1024 → 65536 in bf16, L1 and TopK."""
    width, size, batch = (32, 256, 64) if work.quick else (1024, 65536, 4096)
    cells = [("l1", "bf16"), ("topk", "bf16")]
    ways = (FUSED, LOOPED) if work.quick else (FUSED, SALVE, LOOPED)
    measure(work, ways, width, size, batch, cells[1:] if work.quick else cells)


def train_peers(work: Work) -> None:
    """768 → 12288 against each peer that can be imported, in the precisions that it has."""
    width, size, batch = (32, 128, 64) if work.quick else (768, 12288, 4096)
    cells = [(kind, precision) for precision in ("bf16", "fp32") for kind in ("l1", "topk")]
    peers = [contender for contender in CONTENDERS if contender.is_peer]
    measure(
        work, (FUSED, LOOPED if work.quick else SALVE, *peers), width, size, batch, cells[:1] if work.quick else cells
    )


def measure(
    work: Work,
    ways: Sequence[Contender],
    width: int,
    dictionary_size: int,
    batch: int,
    cells: Iterable[tuple[str, str]],
) -> None:
    """Race the ways in each cell, and record a line for each.

    Args:
        work: the part's orders. ways: who takes part; the first is what the others are compared with.
        width: ``M``. dictionary_size: ``d``. batch: rows of a step. cells: kind and precision of each race.
    """
    file = str(planted(width).resolve())
    children = [Child(way, "fp32", here=True) for way in ways]
    for child in children:
        child.start()
    try:
        for child in children:
            child.ready()
            if child.lost:
                work.record.note(
                    **{f"lost {child.contender.name}": f"{child.contender.name} is not there: {child.lost}"}
                )
        there = [child for child in children if not child.lost]
        for kind, precision in cells:
            what = f"{width} → {dictionary_size}, {kind}, {precision}, batch {batch}"
            if work.is_late:
                work.cut(what)
                continue
            print(what, flush=True)
            for child in there:
                child.precision = precision
            cell = Cell(
                file=file,
                width=width,
                dictionary_size=dictionary_size,
                kind=kind,
                batch=batch,
                steps=0,
                sparsity=SPARSITY,
                k=min(K, dictionary_size // 8),
                rate=RATE,
                seed=0,
                device=work.device,
                precision=precision,
                matmul="highest",
            )
            each = slice_steps(there[0], cell, 0.02 if work.quick else 0.3)
            cell = replace(cell, steps=WARM_UP + work.rounds * each)
            for result in race(there, cell, work.rounds, each, until=work.deadline):
                line = line_of(work, result, cell, f"SAE training, {what}")
                line.reference = result.contender == ways[0].name
                work.record.add(line)
    finally:
        for child in children:
            child.end()


def line_of(work: Work, result: Result, cell: Cell, title: str) -> Line:
    """One contender's rates, with the operations and bytes that a row takes."""
    width, size = cell.width, cell.dictionary_size
    moved = bytes_per_step(width, size, cell.batch, cell.kind, cell.precision) / cell.batch
    learned = f"FVE {result.fve:.3f}, L0 {result.l0:.0f}" if math.isfinite(result.fve) else ""
    return Line(
        part=work.part,
        group=title,
        name=result.contender,
        unit="rows/s",
        rates=result.rates if not result.why else [],
        memory=result.memory,
        flops=flops_per_sample(width, size, cell.kind, cell.k),
        moved=moved,
        precision=cell.precision,
        note=result.why or learned,
    )


if sys.platform != "linux":
    raise SystemExit("The check needs Linux: its trainings read the memory they use from /proc.")
