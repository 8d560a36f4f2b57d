"""One check of everything on a GPU: the tests marked ``gpu``, then the benchmarks at sizes that fill the card.

    python benchmarks/gpu_check.py [--out outputs/gpu_check] [--minutes 8] [--parts tests card …]
    python benchmarks/gpu_check.py --device cpu --quick      # every part at toy sizes, to try the script
    python benchmarks/gpu_check.py carry outputs/gpu_wheels  # wheels for a machine without a network

It needs one NVIDIA GPU (written for an H100 or H200), Linux, and a Python with PyTorch, torchvision, Lightning,
torchmetrics, timm, pandas, SciPy and matplotlib. Packages that this Python lacks are taken from ``--wheels``, where
``carry`` put them; what it has itself is used as it is. Nothing is downloaded.

Each part is a process of its own with a time limit: one that fails or hangs loses neither the others nor what it had
measured. Ways are measured in turn; tables show medians over rounds, and the slowest and fastest round. Shares are of
what the card did in the same run: a product of 8192 × 8192 matrices, and a copy of 2 GiB (bytes read and written). For
a training, operations and the fewest bytes of a step are computed by ``machine.flops_per_sample`` and
``machine.bytes_per_step``; for a capture, operations are counted by PyTorch. TopK counts only what it needs, not what a
dense step does. ``GB`` is the card's memory at the peak, beyond the rows.

It writes ``gpu_check.json``, ``gpu_check.md`` (the tables, ready for docs/benchmarks.md) and ``gpu_check.log``. Exit
status: 0 if every part ended well, 1 if not, 2 without a GPU.
"""

import argparse
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from gpu.budget import PLANNED, Budget
from gpu.carry import collect, declare, unpack_missing

ROOT = Path(__file__).resolve().parents[1]
#: Module and function of each part.
PARTS = {
    "tests": ("gpu.suite", "run_tests"),
    "card": ("gpu.card", "measure_card"),
    "training": ("gpu.trainings", "train"),
    "large": ("gpu.trainings", "train_large"),
    "ensemble": ("gpu.others", "train_ensemble"),
    "capture": ("gpu.others", "capture_backbones"),
    "tails": ("gpu.inside", "gate_inside"),
    "peers": ("gpu.trainings", "train_peers"),
}
#: Exit status without a GPU.
NO_GPU = 2


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/gpu_check"), help="folder for the results")
    add("--wheels", type=Path, default=Path("outputs/gpu_wheels"), help="folder of carried wheels, if there is one")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--minutes", type=float, default=8.0, help="for everything")
    add("--parts", nargs="+", default=list(PLANNED), choices=PLANNED, help="default: all; shares need card")
    add("--quick", action="store_true", help="toy sizes and one round: tries the script, measures nothing")
    commands = parser.add_subparsers(dest="command", metavar="")
    carry = commands.add_parser("carry", help="collect pure-Python wheels in a folder")
    carry.add_argument("folder", type=Path)
    carry.add_argument("--python", default="3.12", help="version of the Python that will use them")
    part = commands.add_parser("part")  # a part's own process
    part.add_argument("name")
    part.add_argument("record", type=Path)
    part.add_argument("seconds", type=float)
    return parser.parse_args()


def run_part(given: argparse.Namespace) -> None:
    """One part, in this process. Only its own module is imported."""
    from gpu.report import Record
    from gpu.work import Work

    module, function = PARTS[given.name]
    run = getattr(import_module(module), function)
    deadline = time.monotonic() + Budget.SOFT * given.seconds
    with tempfile.TemporaryDirectory() as scratch:
        run(Work(given.name, given.device, given.quick, deadline, Record(given.record), Path(scratch)))


def main() -> None:
    """Entry point."""
    begun = time.monotonic()
    given = arguments()
    if given.command == "carry":
        for remark in collect(given.folder, given.python):
            print(remark)
        return
    if given.command == "part":
        run_part(given)
        return
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as scratch:
        unpacked = Path(scratch) / "site"
        unpack_missing(given.wheels, unpacked)
        declare(ROOT, unpacked)
        sys.path.append(str(unpacked))
        # For the parts, and the processes that they start.
        own = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        os.environ["PYTHONUNBUFFERED"] = "1"  # a part that is stopped has printed everything
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *own, str(unpacked)])
        import torch

        if given.device == "cuda" and not torch.cuda.is_available():
            print("PyTorch finds no GPU here: run this on a machine with one, or try it with --device cpu --quick.")
            sys.exit(NO_GPU)
        from gpu.check import check

        sys.exit(check(given, unpacked, begun))


if __name__ == "__main__":
    main()
