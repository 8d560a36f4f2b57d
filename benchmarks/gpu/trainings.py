"""SAE trainings: ``salve`` against a bare loop, and against peers.

The bare loop is ``peers/train_bare.py`` with the fused Adam: the same loss, optimiser and projection, and its rows lie
on the card. Every way trains in a process of its own, in turn with the others (``training.race``).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

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


class Size(NamedTuple):
    """Width ``M``, dictionary size ``d``, rows of a batch, and seconds of a slice at the bare loop's pace."""

    width: int
    dictionary_size: int
    batch: int
    slice: float = 0.2


QUICK = Size(32, 128, 64, 0.02)


def train(work: Work) -> None:
    """768 → 12288 in fp32 and bf16, L1 and TopK."""
    if work.quick:
        measure(work, (FUSED, SALVE), QUICK, [("l1", "fp32")])
        return
    cells = [(kind, precision) for precision in ("fp32", "bf16") for kind in ("l1", "topk")]
    measure(work, (FUSED, SALVE, LOOPED, IN_MEMORY), Size(768, 12288, 4096), cells)


def train_large(work: Work) -> None:
    """1024 → 65536 in bf16, L1 and TopK."""
    if work.quick:
        measure(work, (FUSED, LOOPED), QUICK._replace(dictionary_size=256), [("topk", "bf16")])
        return
    measure(work, (FUSED, SALVE, LOOPED), Size(1024, 65536, 4096), [("l1", "bf16"), ("topk", "bf16")])


def train_peers(work: Work) -> None:
    """768 → 12288 against each peer that can be imported, in the precisions that it has."""
    peers = [contender for contender in CONTENDERS if contender.is_peer]
    if work.quick:
        measure(work, (FUSED, LOOPED, *peers), QUICK, [("topk", "fp32")])
        return
    cells = [(kind, precision) for precision in ("bf16", "fp32") for kind in ("l1", "topk")]
    # Shorter slices, because some peers take several times as long as the bare loop.
    measure(work, (FUSED, SALVE, *peers), Size(768, 12288, 4096, 0.15), cells)


def measure(work: Work, ways: Sequence[Contender], size: Size, cells: Iterable[tuple[str, str]]) -> None:
    """Race the ways in each cell, and record a line for each.

    Args:
        work: the part's orders. ways: who takes part; the first is what the others are compared with.
        size: of the SAE and its batches. cells: kind and precision of each race.
    """
    width, dictionary_size, batch, seconds = size
    file = str(planted(width).resolve())
    children = [Child(way, "fp32", here=True) for way in ways]
    for child in children:
        child.start()
    try:
        for child in children:
            child.ready()
            if child.lost:
                print(f"{child.contender.name}:\n{child.last_words()}", flush=True)
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
            each = slice_steps(there[0], cell, seconds)
            cell = replace(cell, steps=WARM_UP + work.rounds * each)
            for result in race(there, cell, work.rounds, each, until=work.deadline):
                work.record.add(line_of(work, result, cell, what, result.contender == ways[0].name))
    finally:
        for child in children:
            child.end()


def line_of(work: Work, result: Result, cell: Cell, what: str, reference: bool) -> Line:
    """One contender's rates, with the operations and bytes that a row takes."""
    flops = flops_per_sample(cell.width, cell.dictionary_size, cell.kind, cell.k)
    moved = bytes_per_step(cell.width, cell.dictionary_size, cell.batch, cell.kind, cell.precision)
    learned = f"FVE {result.fve:.3f}, L0 {result.l0:.0f}" if math.isfinite(result.fve) else ""
    return Line(
        part=work.part,
        group=f"SAE training, {what}: {flops * cell.batch / 1e9:,.1f} GFLOP and {moved / 1e9:,.3f} GB a step",
        name=result.contender,
        unit="rows/s",
        rates=[] if result.why else result.rates,
        memory=result.memory,
        flops=flops,
        moved=moved / cell.batch,
        precision=cell.precision,
        reference=reference,
        note=result.why or learned,
    )
