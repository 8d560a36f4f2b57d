# SPDX-License-Identifier: MIT
"""``salve-sweep``: sum up a sweep in one table, with its standard figures."""

import argparse
import sys
from functools import partial
from pathlib import Path

from salve.ending import as_told
from salve.system import in_one_sentence
from salve.types import UserError

EPILOG = """\
written into FOLDER:
  sweep.csv            one row per finished run: its key, every setting that
                       varies (dotted names), its measures
  sweep.html           the runs as points and rows: hover for a run's settings,
                       click for its page
  figures/fve-l0       variance explained against active latents, Pareto front,
                       on select images
  figures/selectivity-sparsity, alpha-flip-sparsity
                       measures of the edits against λ (…-k for TopK SAEs),
                       mean and standard deviation over seeds; selectivity on
                       select images, α_flip on test images
Choose a run by measures on select images: the columns select_… of sweep.csv.
The columns of the same names without select_ are measured on test images:
report them for the run that you have chosen.
Each figure is a PNG and an SVG. salve-sweep leaves out, and names, a figure
whose axes do not vary or whose stage did not run.

The folder may be moved or copied: nothing outside it is read, except the SAEs
with --stability. It compares the dictionaries of runs that differ in sae.seed
alone, and writes
  stability.csv        one row per pair of such runs: mean cosine of matched
                       latents, share of latents that both have, and the same
                       two numbers for random directions

example:
  salve -m sae.sparsity=1,2,5 seed=0,1,2 sweep.name=lambda
  salve-sweep outputs/sweeps/lambda
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return as_told(partial(_main, arguments), "salve-sweep: stopped; the same command writes everything anew.")


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="salve-sweep",
        description="Gather the finished runs of a sweep into one table, print it, draw the standard figures, and "
        "say which runs are missing and why. You can run it while the sweep runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="<output_dir>/sweeps/<sweep.name>")
    parser.add_argument("--stability", action="store_true", help="also compare the SAEs of different seeds")
    parser.add_argument(
        "--artifacts",
        type=Path,
        help="<output_dir>/artifacts, where --stability finds the SAEs; needed if the sweep was moved",
    )
    given = parser.parse_args(arguments)
    # Imported here because they take seconds.
    from rich.console import Console

    from salve.sweep.summary import print_summary, summarise_sweep

    console = Console(markup=False, emoji=False)
    try:
        summary = summarise_sweep(given.folder, given.artifacts)
        print_summary(summary, console)
        if given.stability or given.artifacts:
            from salve.sweep.stability import compare_seeds, print_stability

            print_stability(compare_seeds(summary), console)
    except UserError as error:
        print(f"salve-sweep: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"salve-sweep: {in_one_sentence(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
