"""How long trainings take to an equal loss."""

import csv
from collections.abc import Sequence
from pathlib import Path

from results import NAN, PEERS, SALVE, Look, Result
from rich.table import Table


def steps_to(looks: Sequence[Look], loss: float) -> float:
    """Steps until the loss was first as low, on straight lines between looks; NaN if it never was.

    If it was so low at the first look, those steps: what came before is not known.
    """
    last: Look | None = None
    for look in looks:
        if look.loss <= loss:
            if last is None:
                return look.steps
            share = (last.loss - loss) / (last.loss - look.loss)
            return last.steps + share * (look.steps - last.steps)
        last = look
    return NAN


def goal(results: Sequence[Result]) -> tuple[Result, Look] | None:
    """The fp32 peer with the lowest loss halfway, and that look; the others have as many steps again to reach it."""
    peers = [one for one in results if one.contender in PEERS and one.precision == "fp32" and one.looks]
    halfway = [(peer, peer.looks[(len(peer.looks) - 1) // 2]) for peer in peers]
    return min(halfway, key=lambda pair: pair[1].loss, default=None)


def seconds_to(result: Result, loss: float) -> float:
    """Seconds to a loss at the contender's rate, without the time of the looks."""
    return steps_to(result.looks, loss) * result.milliseconds / 1000


def reaching_table(results: Sequence[Result]) -> Table:
    """A table of one cell: steps and seconds of each contender to the goal."""
    ran, first = [result for result in results if result.looks], results[0]
    found = goal(ran)
    table = Table(title=f"{first.size.replace('x', ' → ')}, {first.kind}, batch {first.batch}: to an equal loss")
    table.add_column("")
    for column in ("steps", "seconds", "vs best peer", "last FVE", "L0", "loss"):
        table.add_column(column, justify="right")
    if found is None:
        return table
    peer, look = found
    table.caption = f"goal: loss {look.loss:.2f}, {peer.contender}'s after {look.steps} steps, at FVE {look.fve:.4f}"
    seconds = {id(result): seconds_to(result, look.loss) for result in ran}
    peers = [one for one in ran if one.contender in PEERS and one.precision == "fp32"]
    fastest = min(taken for taken in (seconds[id(one)] for one in peers) if taken == taken)
    for result in ran:
        taken, last = seconds[id(result)], result.looks[-1]
        reached = taken == taken
        table.add_row(
            f"{result.contender}, {result.precision}",
            f"{steps_to(result.looks, look.loss):,.0f}" if reached else "never",
            f"{taken:.2f}" if reached else "–",
            f"{fastest / taken:.2f} ×" if reached else "–",
            f"{last.fve:.4f}",
            f"{last.l0:.1f}",
            f"{last.loss:.2f}",
            style="bold" if result.contender == SALVE.name else None,
        )
    return table


def write_looks(results: Sequence[Result], file: Path) -> None:
    """Write all looks as CSV, at once."""
    part = file.with_suffix(".part")
    with part.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["size", "kind", "batch", "contender", "precision", "milliseconds", *Look._fields])
        for one in results:
            about = [one.size, one.kind, one.batch, one.contender, one.precision, one.milliseconds]
            writer.writerows([*about, *look] for look in one.looks)
    part.rename(file)
