"""Results of ``training.py``: a CSV file, and tables."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from contenders import BARE, CONTENDERS, FUSED, LOOPED, SALVE
from rich.table import Table

PEERS = {contender.name for contender in CONTENDERS if contender.is_peer}
NAN = float("nan")


class Look(NamedTuple):
    """FVE, L0 and loss of a contender after so many steps, by ``contender.measure``."""

    steps: int
    fve: float
    l0: float
    loss: float


@dataclass
class Result:
    """One contender in one cell.

    Attributes:
        rate, slowest, fastest: rows per second: median and range of the rounds. steps: of the whole training.
        fve, l0, loss: on held-out rows at the end, by ``contender.measure``.
        memory: bytes that the training added at its peak.
        share_of_peak: of the machine's matrix products, counting what the loss needs (``machine.flops_per_sample``).
        share_of_limit: of the rate with products at their peak and Adam at the bandwidth.
        load: of the machine, before. why: reason why it took no part.
        looks, rates: of each round; not in the CSV.
    """

    size: str
    kind: str
    batch: int
    contender: str
    precision: str
    rate: float = NAN
    slowest: float = NAN
    fastest: float = NAN
    steps: int = 0
    fve: float = NAN
    l0: float = NAN
    loss: float = NAN
    memory: float = NAN
    share_of_peak: float = NAN
    share_of_limit: float = NAN
    device: str = ""
    threads: int = 0
    torch: str = ""
    load: float = NAN
    why: str = ""
    looks: list["Look"] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """Milliseconds of a step."""
        return 1000 * self.batch / self.rate


def write(results: list[Result], file: Path) -> None:
    """Write results as CSV, at once."""
    part = file.with_suffix(".part")
    with part.open("w", newline="") as out:
        names = [field.name for field in fields(Result) if field.name not in ("looks", "rates")]
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows({name: getattr(result, name) for name in names} for result in results)
    part.rename(file)


def best(results: Iterable[Result]) -> Result | None:
    """The fastest; None if none ran."""
    return max((result for result in results if result.rate > 0), key=lambda result: result.rate, default=None)


def cell_table(results: list[Result]) -> Table:
    """A table of one cell: a row for each contender that ran, and below it those that did not."""
    ran, first = [result for result in results if result.rate > 0], results[0]
    top = best(result for result in ran if result.contender in PEERS)
    title = f"{first.size.replace('x', ' → ')}, {first.kind}, batch {first.batch}, {first.steps} steps"
    missing = [f"{result.contender}, {result.precision}: {result.why}" for result in results if result.why]
    table = Table(title=title, caption="\n".join(f"not run: {line}" for line in missing), caption_justify="left")
    table.add_column("")
    for column in ("rows/s", "slowest – fastest", "ms/step", "vs best peer", "FVE", "L0", "MB"):
        table.add_column(column, justify="right")
    with_machine = any(result.share_of_limit == result.share_of_limit for result in ran)
    for column in ("of peak", "of limit") if with_machine else ():
        table.add_column(column, justify="right")
    for result in ran:
        ratio = f"{result.rate / top.rate:.2f} ×" if top else ""
        cells = [
            f"{result.contender}, {result.precision}",
            f"{result.rate:,.0f}",
            f"{result.slowest:,.0f} – {result.fastest:,.0f}",
            f"{result.milliseconds:.2f}",
            ratio,
            f"{result.fve:.4f}",
            f"{result.l0:.1f}",
            f"{result.memory / 1e6:,.0f}",
        ]
        if with_machine:
            cells += [f"{result.share_of_peak:.0%}", f"{result.share_of_limit:.0%}"]
        table.add_row(*cells, style="bold" if result.contender == SALVE.name else None)
    return table


def summary(results: list[Result]) -> Table:
    """A table of all cells: ``salve`` over the best peer and the best bare loop, and the Trainer's time."""
    caption = "over peer, over bare: of the fastest in fp32; over any: of the fastest peer in any precision"
    table = Table(title="salve", caption=caption, caption_justify="left")
    for column in ("", "best peer"):
        table.add_column(column, no_wrap=True)
    ratios = ("fp32 over peer", "bf16 over peer", "bf16 over any", "fp32 over bare", "bf16 over bare")
    for column in (*ratios, "FVE − peer's", "… in bf16", "Trainer, ms/step", "… in bf16"):
        table.add_column(column, justify="right")
    for size, kind, batch in dict.fromkeys((result.size, result.kind, result.batch) for result in results):
        ran = [one for one in results if (one.size, one.kind, one.batch) == (size, kind, batch) and one.rate > 0]
        found = {(result.contender, result.precision): result for result in ran}
        peers = [result for result in ran if result.contender in PEERS]
        top, any_top = best(peer for peer in peers if peer.precision == "fp32"), best(peers)
        bare = best(
            result for result in ran if result.contender in (BARE.name, FUSED.name) and result.precision == "fp32"
        )
        fp32, bf16 = (found.get((SALVE.name, precision)) for precision in ("fp32", "bf16"))
        loops = [found.get((LOOPED.name, precision)) for precision in ("fp32", "bf16")]
        table.add_row(
            f"{size.replace('x', ' → ')}, {kind}, {batch}",
            top.contender if top else "–",
            *(_ratio(*pair) for pair in ((fp32, top), (bf16, top), (bf16, any_top), (fp32, bare), (bf16, bare))),
            *(f"{mine.fve - top.fve:+.4f}" if mine and top else "–" for mine in (fp32, bf16)),
            *(_cost(mine, loop) for mine, loop in zip((fp32, bf16), loops, strict=True)),
        )
    return table


def _ratio(mine: Result | None, other: Result | None) -> str:
    return f"{mine.rate / other.rate:.2f} ×" if mine and other else "–"


def _cost(mine: Result | None, loop: Result | None) -> str:
    return f"{mine.milliseconds - loop.milliseconds:+.2f}" if mine and loop else "–"
