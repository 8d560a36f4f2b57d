"""Is this version slower than another? Both do the same work at the last site, in turn.

    git worktree add FOLDER COMMIT
    OMP_NUM_THREADS=1 python benchmarks/versions.py FOLDER [--rounds 9] [--only WORDS]

FOLDER holds another version of the project. Each version is a process of its own with the work of its own benchmarks:
captures (``capture.py``), Grad-FAM (``grad_fam.py``), curves, accuracies and exact critical strengths (``alpha.py``).
In a round both do each piece of work, the one and then the other; which comes first changes from round to round. A
ratio is the CPU seconds of this version over those of the other; the table shows the median over rounds, and between
which ratios the middle half of them lies. A warm-up round does not count.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
#: Images of a capture, and of Grad-FAM; latents of Grad-FAM.
CAPTURED, SEEN, LATENTS = 64, 8, 16


def works() -> dict[str, Callable[[], Any]]:
    """What is timed, by the modules of the version that this process runs."""
    import alpha
    import capture
    import grad_fam
    import torch

    from salve.backbones import find_site, load_backbone
    from salve.editing.curves import edit_accuracies

    found: dict[str, Callable[[], Any]] = {}
    for name, (library, model_name, arguments, preprocess) in capture.BACKBONES.items():
        torch.manual_seed(0)
        size = int(str(preprocess.get("size") or arguments["img_size"]))
        model = load_backbone(library, model_name, "random", 10, arguments).model.eval()
        bench = grad_fam.Bench(name, model, size, "cpu")
        found[f"Grad-FAM, {name}"] = partial(bench.ours, bench.images(SEEN), LATENTS)
        model.to(memory_format=torch.channels_last)
        decoded = [(torch.randn(CAPTURED, 3, size, size), torch.zeros(CAPTURED, dtype=torch.long))]
        given = (model, find_site(model, "last"), CAPTURED, lambda _, decoded=decoded: decoded, torch.device("cpu"))
        found[f"capture, {name}"] = partial(capture.captured, *given)
    for name, shape in alpha.SIZES.items():
        case = alpha.draw(*shape)
        alphas = alpha.grid(case).float()
        found[f"curves, {name}"] = partial(alpha.edit_curves, *case, alphas)
        found[f"accuracies, {name}"] = partial(edit_accuracies, *case, alphas)
        found[f"critical strengths, {name}"] = partial(alpha.exact, case)
    return dict(sorted(found.items()))


def child(folder: Path) -> None:
    """Do the work that is named on each line of stdin; answer with its CPU seconds and a digest of its result."""
    sys.path[:1] = [str(folder / "benchmarks"), str(folder)]
    import torch

    import salve

    assert Path(str(salve.__file__)).is_relative_to(folder), f"this is the version in {salve.__file__}"
    found = works()
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        result = found[json.loads(line)]()
        took = time.process_time() - start
        tensors = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
        digest = hashlib.sha256(b"".join(one.detach().contiguous().numpy().tobytes() for one in tensors))
        print(json.dumps([took, digest.hexdigest()]), flush=True)


class Version:
    """The process of a version."""

    def __init__(self, folder: Path) -> None:
        settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process: Any = subprocess.Popen(
            [sys.executable, __file__, str(folder), "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=settings,
            text=True,
        )
        self.names: list[str] = self._answer()

    def does(self, name: str) -> tuple[float, str]:
        """CPU seconds of a piece of work, and the digest of its result."""
        print(json.dumps(name), file=self._process.stdin, flush=True)
        seconds, digest = self._answer()
        return seconds, digest

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("A version ended early; its own message stands above.")
        return json.loads(line)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the other version")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", metavar="WORDS", help="work whose name holds them")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.folder.resolve())
        return
    from measure import machine, table
    from rich.console import Console

    this, other = Version(HERE), Version(given.folder.resolve())
    shown = table(f"This version over the other\n{machine('cpu')}", ("", "s", "ratio", "middle half", "results"))
    for name in (one for one in this.names if given.only in one):
        seconds: dict[Version, list[float]] = {this: [], other: []}
        digests = set()
        for number in range(given.rounds + 1):
            for version in (this, other) if number % 2 else (other, this):
                took, digest = version.does(name)
                digests.add(digest)
                if number:
                    seconds[version].append(took)
        ratios = [mine / theirs for mine, theirs in zip(seconds[this], seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        same = "" if name.startswith("capture") else "same bits" if len(digests) == 1 else "differ"
        cells = f"{statistics.median(seconds[this]):.4f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"
        shown.add_row(name, *cells, same)
    Console().print(shown)


if __name__ == "__main__":
    main()
