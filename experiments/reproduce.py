"""``python -m experiments.reproduce``: make the paper's figures and judge its claims, as far as this machine can."""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from experiments.testbeds import Setup, Testbed, add_setup, as_command, parsed, setup_of
from salve.ending import run_child

if TYPE_CHECKING:  # they take seconds, during which a signal would not be handled
    from rich.console import Console

    from experiments.experiment import Experiment

EPILOG = """\
written into <output-dir>/paper:
  index.html               claims, what we measured, whether they hold; every figure
  claims.csv, claims.md    the table
  <experiment>/            figures (PDF, SVG, PNG), their numbers (CSV), findings.json

Each experiment runs in its own process, and finished work is not done again. SETTING
is any of salve's, such as trainer=cpu or cluster=joblib. Without Imagenette:
  python -m experiments.reproduce --on scenes
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if something failed, 0 if all that can be run was."""
    return as_command("reproduce", partial(_main, arguments))


def _main(arguments: list[str] | None) -> int:
    from rich.console import Console

    from experiments.catalogue import EXPERIMENTS

    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=f"The paper's experiments: {', '.join(EXPERIMENTS)}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), metavar="EXPERIMENT", default=list(EXPERIMENTS),
                        help="these experiments, and the page of all that are done")  # fmt: skip
    add_setup(parser)
    given = parsed(parser, arguments)
    failed = reproduce(setup_of(given), given.only, given.on, Console(markup=False, emoji=False))
    return 1 if failed else 0


def reproduce(setup: Setup, only: Sequence[str], on: Sequence[str] | None, console: "Console") -> list[str]:
    """Run experiments one after the other, ``on`` these testbeds or each on its own, and write the page of all.

    Returns:
        The names of those that failed.
    """
    from experiments.catalogue import EXPERIMENTS
    from experiments.experiment import paper_folder
    from experiments.page import NotRun, write_page

    missing: list[NotRun] = []
    failed = []
    began = time.monotonic()
    only = list(dict.fromkeys(only))
    for number, name in enumerate(only, start=1):
        experiment = EXPERIMENTS[name]
        here, out = experiment.testbeds_here(on, setup)
        missing += [NotRun(experiment.title, testbed.title, experiment.lacks(setup, testbed)) for testbed in out]
        if not here:
            continue
        console.rule(f"{number} of {len(only)}: {experiment.title}", align="left")
        status = run_child(_command(experiment, here, setup))
        if status:
            failed.append(name)
            where = ", ".join(testbed.title for testbed in here)
            missing.append(NotRun(experiment.title, where, "it failed, see its output"))
    page = write_page(paper_folder(setup), list(EXPERIMENTS.values()), missing)
    minutes = (time.monotonic() - began) / 60
    for row in missing:
        console.print(
            f"not run: {row.experiment} on {row.testbed}: {row.reason}", highlight=False, soft_wrap=True, markup=False
        )
    console.print(f"{minutes:.1f} minutes. The page: {page}", highlight=False, soft_wrap=True, markup=False)
    return failed


def _command(experiment: "Experiment", testbeds: Sequence[Testbed], setup: Setup) -> list[str]:
    """The command of an experiment with the same setup."""
    options = ["--on", *(testbed.name for testbed in testbeds), "--output-dir", str(setup.output_dir)]
    for name, folder in setup.folders.items():
        options += [f"--{name}", folder]
    for name, file in setup.weights.items():
        options += ["--weights", f"{name}={file}"]
    options += ["--download"] * setup.download + ["--quick"] * setup.quick
    return [sys.executable, "-m", experiment.module, *options, "--", *setup.settings]


if __name__ == "__main__":
    sys.exit(main())
