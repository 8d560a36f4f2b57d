"""What the benchmarks share: timing in turn, the machine's highest rates, growth of time, and tables."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.table import Table

Way = Callable[[], object]


def now() -> float:
    """Seconds, once the device has caught up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(ways: Mapping[str, Way], rounds: int) -> dict[str, float]:
    """Median seconds of each way. All run once to warm up, then once a round, in turn: load affects all alike."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = now()
            run()
            if number:
                took[name].append(now() - start)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def growth(sizes: Sequence[int], make: Callable[[int], Way], rounds: int) -> float:
    """The exponent ``p`` of ``seconds ∝ size^p``: the slope of a line through the logarithms of medians and sizes."""
    seconds = interleaved({str(size): make(size) for size in sizes}, rounds)
    x = [math.log(size) for size in sizes]
    y = [math.log(seconds[str(size)]) for size in sizes]
    return statistics.linear_regression(x, y).slope


def matmul_peak(device: str, dtype: torch.dtype = torch.float32, side: int = 1536, runs: int = 8) -> float:
    """Floating-point operations per second in a product of square matrices; the best of some runs."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / best(lambda: left @ right, runs)


def copy_bandwidth(device: str, floats: int = 2**25, runs: int = 8) -> float:
    """Bytes per second, read and written, in a copy of so many floats, which no cache holds; the best of some runs."""
    source = torch.ones(floats, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / best(lambda: target.copy_(source), runs)


def best(run: Way, runs: int = 8) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(runs):
        start = now()
        run()
        seconds.append(now() - start)
    return min(seconds)


def machine(device: str) -> str:
    """The device, torch's version, and the load of the machine."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    """An empty table with names on the left and figures on the right."""
    made = Table(title=title, caption=caption or None, caption_justify="left")
    for column in columns:
        made.add_column(column, justify="right" if made.columns else "left")
    return made
