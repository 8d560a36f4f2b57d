"""A sweep against as many separate cold runs: how much time shared artifacts save.

    python benchmarks/sweep.py                  # 20 values of λ, about a quarter of an hour on two cores
    python benchmarks/sweep.py --points 4       # a quick look

Both alternate, so that a machine that is busy for a while slows both. After each block of cold runs, each in an empty
folder and a process of its own, comes one whole sweep of all points, also from an empty folder. The sweep is timed
without and with ``sae.ensemble``. All times include starting Python.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: The quickstart's data and backbone with fewer images and epochs, and the stages that depend on λ.
SMALLER = (
    *("data.train_per_class=40", "data.select_per_class=20", "data.test_per_class=20", "finetune.epochs=4"),
    *("stages=[discover,control,diagnose]", "edit.evaluate=0", "trainer=cpu"),
)


def timed(folder: Path, *arguments: str, flags: tuple[str, ...] = ()) -> float:
    """Seconds of a ``salve`` command that writes to ``folder``, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "salve.cli", *flags, *SMALLER, f"output_dir={folder}", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20, help="values of λ (default 20)")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of cold runs (default 2)")
    chosen = parser.parse_args()
    points = [round(0.5 * 1.25**i, 3) for i in range(chosen.points)]
    swept = "sae.sparsity=" + ",".join(map(str, points))
    kinds = {"sweep, one run after the other": [], "sweep with sae.ensemble=32": ["sae.ensemble=32"]}
    cold: list[float] = []
    sweeps: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        for block in range(chosen.blocks):
            for point in points[block :: chosen.blocks]:
                cold.append(timed(folder, f"sae.sparsity={point}"))
                print(f"cold run, λ = {point}: {cold[-1]:.1f} s", flush=True)
            for kind, arguments in kinds.items():
                sweeps[kind].append(timed(folder, swept, *arguments, flags=("-m",)))
                print(f"{kind}: {sweeps[kind][-1]:.1f} s", flush=True)
    total = sum(cold)
    print(f"\n{len(points)} cold runs: {total:.0f} s (median {statistics.median(cold):.1f} s each)")
    for kind, seconds in sweeps.items():
        mean = statistics.fmean(seconds)
        print(f"{kind}: {mean:.0f} s ({', '.join(f'{s:.0f}' for s in seconds)}), {total / mean:.1f} times as fast")


if __name__ == "__main__":
    main()
