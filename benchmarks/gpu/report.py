"""Measured lines of a check, and the tables made of them."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import table
from rich.console import Console

NAN = float("nan")


@dataclass
class Line:
    """One way to do one thing.

    Attributes:
        part: of the check. group: title of its table; lines of a group are compared with each other.
        name: of the way. unit: of the rate, such as ``rows/s``.
        rates: one for each round. memory: bytes of the card that it took at its peak.
        flops, moved: floating-point operations, and the fewest bytes of the card's memory, for one unit (row, image).
        precision: ``fp32`` or ``bf16``.
        reference: whether the lines of its group are compared with it.
        note: why a line has no rates, or what else was found.
    """

    part: str
    group: str
    name: str
    unit: str
    rates: list[float]
    memory: float = NAN
    flops: float = NAN
    moved: float = NAN
    precision: str = "fp32"
    reference: bool = False
    note: str = ""

    @property
    def rate(self) -> float:
        """The median over rounds."""
        return statistics.median(self.rates) if self.rates else NAN


@dataclass(frozen=True)
class Peaks:
    """What the card did in this run: products in FLOP/s by precision, and copying in bytes/s, read and written."""

    fp32: float = NAN
    bf16: float = NAN
    bandwidth: float = NAN

    def of(self, precision: str) -> float:
        """The rate of products in a precision."""
        return self.bf16 if precision == "bf16" else self.fp32


class Record:
    """A file of lines, one JSON object each, written as they are measured: a part that is stopped keeps what it has.

    Args:
        file: appended to.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, line: Line) -> None:
        """Append a line."""
        with self._file.open("a") as out:
            out.write(json.dumps({"line": asdict(line)}) + "\n")

    def note(self, **what: Any) -> None:
        """Append anything else that a part has to say."""
        with self._file.open("a") as out:
            out.write(json.dumps({"note": what}) + "\n")

    def read(self) -> tuple[list[Line], dict[str, Any]]:
        """All lines, and all notes together; a last line that was cut short is left out."""
        lines, notes = [], {}
        for text in self._file.read_text().splitlines() if self._file.is_file() else ():
            try:
                entry = json.loads(text)
            except json.JSONDecodeError:
                continue
            if "line" in entry:
                lines.append(Line(**entry["line"]))
            else:
                notes.update(entry["note"])
        return lines, notes


COLUMNS = (
    *("", "rate", "slowest – fastest", "rounds", "ratio", "of bf16 peak", "of its precision's peak", "of bandwidth"),
    *("GB", "note"),
)


def cells(line: Line, group: Sequence[Line], peaks: Peaks) -> list[str]:
    """A line's cells under :data:`COLUMNS`.

    Args:
        line: one of the group. group: all lines of its table. peaks: what the card did.
    """
    if not line.rates:
        return [line.name, "not measured", *[""] * (len(COLUMNS) - 3), line.note]
    against = next((other.rate for other in group if other.reference), NAN)
    return [
        line.name,
        f"{line.rate:,.0f} {line.unit}",
        f"{min(line.rates):,.0f} – {max(line.rates):,.0f}",
        str(len(line.rates)),
        _shown(line.rate / against, "{:.2f} ×"),
        _shown(line.rate * line.flops / peaks.bf16, "{:.1%}"),
        _shown(line.rate * line.flops / peaks.of(line.precision), "{:.1%}"),
        _shown(line.rate * line.moved / peaks.bandwidth, "{:.1%}"),
        _shown(line.memory / 1e9, "{:.2f}"),
        line.note,
    ]


def _shown(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "–"


def groups(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by the title of their table, in the order in which they were measured."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.group, []).append(line)
    return found


def markdown(found: dict[str, Any], lines: Sequence[Line], peaks: Peaks) -> str:
    """The whole check as a page.

    Args:
        found: as in ``gpu_check.json``. lines: of all parts. peaks: what the card did.
    """
    about = found["facts"]
    smi, nominal = about["nvidia-smi"], about["nominal"]
    head = [about["device"], f"driver {smi['driver_version']}" if smi else "", f"CUDA {about['cuda'] or '–'}"]
    head += [f"Python {about['python']}"]
    shown = [it for it in about["packages"] if it["name"] in ("torch", "timm", "pytorch-lightning")]
    head += [f"{it['name']} {it['version']}" for it in shown]
    text = [
        "## GPU check",
        "",
        ", ".join(part for part in head if part) + f"; {found['date']}.",
        "",
    ]
    text += [
        f"Measured in the same run: bf16 products {peaks.bf16 / 1e12:,.1f} TFLOP/s, fp32 products (no TF32) "
        f"{peaks.fp32 / 1e12:,.1f} TFLOP/s, copying {peaks.bandwidth / 1e12:,.2f} TB/s, read and written.",
    ]
    if nominal:
        text += [
            f"By the data sheet: {nominal['bf16'] / 1e12:,.0f} TFLOP/s and {nominal['bandwidth'] / 1e12:,.2f} TB/s.",
        ]
    text += ["", "| part | outcome | seconds | limit |", "|---|---|---|---|"]
    text += [
        f"| {part['name']} | {part['outcome']} | {part['seconds']:.0f} | {part['limit']:.0f} |"
        for part in found["parts"]
    ]
    for title, group in groups(lines).items():
        text += ["", f"**{title}**", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        text += ["| " + " | ".join(cells(line, group, peaks)) + " |" for line in group]
    if found["remarks"]:
        text += ["", *(f"- {remark}" for remark in found["remarks"])]
    return "\n".join(text) + "\n"


def write(folder: Path, found: dict[str, Any], lines: Sequence[Line], peaks: Peaks) -> None:
    """Write ``gpu_check.json`` and ``gpu_check.md``; numbers that are not known are null in the first."""
    measured = [
        {**asdict(line), "rate": line.rate, "peak_share": line.rate * line.flops / peaks.bf16} for line in lines
    ]
    whole = finite({**found, "peaks": asdict(peaks), "lines": measured})
    (folder / "gpu_check.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    (folder / "gpu_check.md").write_text(markdown(found, lines, peaks))


def finite(value: Any) -> Any:
    """The same value with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(
    console: Console, found: dict[str, Any], lines: Sequence[Line], peaks: Peaks, say: Callable[[str], None]
) -> None:
    """Print a table for each group, then how each part ended."""
    for title, group in groups(lines).items():
        shown = table(title, COLUMNS)
        for line in group:
            shown.add_row(*cells(line, group, peaks))
        with console.capture() as captured:
            console.print(shown)
        say(captured.get())
    for remark in found["remarks"]:
        say(remark)
    for part in found["parts"]:
        say(f"{part['name']}: {part['outcome']}, {part['seconds']:.0f} of {part['limit']:.0f} s")
