"""Run the parts of a check one after the other, each in a process of its own, and write what they find."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from gpu import facts, report
from gpu.budget import PLANNED, RESERVE, Budget


class Log:
    """Prints lines, and keeps them in a file, which is emptied first."""

    def __init__(self, file: Path) -> None:
        file.write_text("")
        self._file = file

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self._file.open("a") as out:
            out.write(line + "\n")


def start_part(given: argparse.Namespace, name: str, record: Path, limit: float, say: Log) -> str:
    """Run a part in a process of its own, which is killed with all it started at its limit; returns how it ended."""
    options = ["--device", given.device, *(["--quick"] if given.quick else [])]
    command = [sys.executable, sys.argv[0], *options, "part", name, str(record), str(limit)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )

    def pump() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                say(f"[{name}] {line.rstrip()}")

    reader = threading.Thread(target=pump, daemon=True)
    reader.start()
    try:
        process.wait(limit)
        ended = "done" if process.returncode == 0 else f"failed (status {process.returncode})"
    except subprocess.TimeoutExpired:
        ended = "stopped at its limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(timeout=5)
    return ended


def check(given: argparse.Namespace, unpacked: Path, begun: float) -> int:
    """Run the parts, and write what they have found after each.

    Args:
        given: the options of ``gpu_check.py``.
        unpacked: the folder of carried packages; its parent takes the parts' records.
        begun: when the whole began, on the clock of :func:`time.monotonic`.

    Returns:
        0 if every part ended well, else 1.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    say = Log(given.out / "gpu_check.log")
    about = facts.facts(given.device, unpacked)
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "quick": given.quick, "facts": about, "parts": []}
    found["remarks"] = []
    facts.show(about, say)
    planned = {name: seconds for name, seconds in PLANNED.items() if name in given.parts}
    budget, lines, peaks = Budget(60 * given.minutes - RESERVE, planned), list[report.Line](), report.Peaks()
    for name in planned:
        started = time.monotonic()
        limit, record = budget.limit(name, started - begun), unpacked.parent / f"{name}.jsonl"
        say(f"--- {name}: at most {limit:.0f} s")
        ended = start_part(given, name, record, limit, say) if limit else "left out: no time was left"
        measured, notes = report.Record(record).read()
        lines += measured
        peaks = report.Peaks(**notes.pop("peaks")) if "peaks" in notes else peaks
        outcome = "; ".join(part for part in (notes.pop("outcome", ""), ended) if part)
        took = time.monotonic() - started
        found["parts"].append({"name": name, "outcome": outcome, "ended": ended, "seconds": took, "limit": limit})
        found["remarks"] += [text for text in notes.values() if isinstance(text, str)]
        found["remarks"] += [f"failed: {test}" for test in notes.pop("failed", [])]
        say(f"--- {name}: {outcome}, {took:.0f} s")
        report.write(given.out, found, lines, peaks)
    report.show(Console(width=None if sys.stdout.isatty() else 170), found, lines, peaks, say)
    return int(any(part["ended"] != "done" for part in found["parts"]))
