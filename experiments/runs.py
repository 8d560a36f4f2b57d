"""An experiment's runs on a testbed: made by ``salve``, or found, and opened for reading."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console
from torch import Tensor

from experiments.testbeds import Setup, Testbed, quoted
from salve.activations import Captured
from salve.artifacts import Artifact, Store
from salve.ending import run_child
from salve.integrity import check_artifact, read_manifest
from salve.processes.ranks import gathered
from salve.report.inputs import Artifacts
from salve.run.build import build_context
from salve.run.folder import PLAN, RunFolder
from salve.sae import SAE
from salve.stages import StageContext
from salve.sweep.read import SweptRun, read_sweep
from salve.types import Split, UserError

#: What chooses a strength, and what reports what it does.
SPLITS: tuple[Split, Split] = ("select", "test")


def sweep_name(config: str, testbed: Testbed, setup: Setup) -> str:
    """The folder of an experiment's runs on a testbed, under ``<output_dir>/sweeps``."""
    return f"{config.replace('/', '-')}-{testbed.name}" + ("-quick" if setup.quick else "")


def command(config: str, testbed: Testbed, setup: Setup, quick: Sequence[str]) -> list[str]:
    """What makes an experiment's runs on a testbed, as arguments of ``salve``.

    Args:
        config: the experiment's recipe under ``conf/experiment``. quick: its settings for ``--quick``.
    """
    recipes = [testbed.config, config] if testbed.config else [config]
    return [
        "-m",
        f"experiment=[{','.join(recipes)}]",
        f"sweep.name={sweep_name(config, testbed, setup)}",
        f"output_dir={quoted(setup.output_dir)}",
        *setup.overrides(testbed),
        *(quick if setup.quick else ()),
        *setup.settings,
    ]


def make(config: str, testbed: Testbed, setup: Setup, quick: Sequence[str]) -> str:
    """Make the runs that are not there yet, in a process of their own.

    Returns:
        The command, as one would type it.

    Raises:
        UserError: some runs were not made; ``salve`` has said which and why.
    """
    arguments = command(config, testbed, setup, quick)
    # Runs are found by what they compute. The plan is made anew: what it once had with other settings is not asked for.
    (setup.output_dir / "sweeps" / sweep_name(config, testbed, setup) / PLAN).unlink(missing_ok=True)
    typed = "salve " + shlex.join(arguments)
    status = run_child([sys.executable, "-m", "salve.cli", *arguments])
    if status:
        raise UserError(f"the runs on {testbed.title} ended with status {status} (see above): {typed}")
    return typed


@dataclass(frozen=True)
class SAERun:
    """One SAE's run.

    Attributes:
        seed: of the SAE. settings, metrics: by dotted name. found: tables, tensors and records of its stages.
    """

    context: StageContext
    seed: int
    settings: dict[str, Any]
    metrics: dict[str, Any]
    artifacts: dict[str, Artifact]

    @cached_property
    def found(self) -> Artifacts:
        return Artifacts({kind: artifact.path for kind, artifact in self.artifacts.items()})

    @cached_property
    def sae(self) -> SAE:
        """Its SAE, on the CPU."""
        return self.context.sae(self.artifacts["sae"], self.artifacts["activations"]).requires_grad_(False)

    @cached_property
    def selected(self) -> pd.DataFrame:
        """By class, the latent chosen for its edits: ``latent``, ``sign``, ``share``, ``kind``, …; NaN for a class
        without one."""
        return self.found.table("features", "selected.csv").set_index("class").reindex(list(self.context.classes))

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """By class, the edit that stage ``control`` kept: ``alpha_used``, chosen on select, and on test
        ``accuracy_after``, ``separates``, ``separates_published``, …; NaN and False for a class without a latent."""
        table = self.found.table("control", "summary.csv").set_index("target").reindex(list(self.context.classes))
        for sense in ("separates", "separates_published"):
            table[sense] = table[sense].eq(True)
        return table

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """How many of these edits separate their class, with the interval over test images: ``separates``,
        ``separates_low``, ``separates_high``, ``separates_published``, …"""
        return self.found.record("control", "verdict.json")

    @cached_property
    def _by_target(self) -> dict[Any, pd.DataFrame]:
        """By split, mode and target; a hundred classes make a large table, which is read once."""
        return curves_by_target(self.artifacts["control"].path)

    def curves(self, split: Split, mode: str, target: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Strengths ``[K]`` and the accuracy of every class at each ``[K, C]``, of a target of stage ``control``."""
        return wide(self._by_target[split, mode, target], self.context.classes)


def curves_by_target(control: Path) -> dict[Any, pd.DataFrame]:
    """The curves of every class that stage ``control`` has written, by split, mode and target.

    Raises:
        UserError: it was not asked for them.
    """
    file = control / "curves.parquet"
    if not file.is_file():
        raise UserError(f"{control} holds no curves of every class; make its run again with edit.by_class=true.")
    return dict(list(pd.read_parquet(file).groupby(["split", "mode", "target"])))


def wide(rows: pd.DataFrame, classes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One target's curves as strengths ``[K]`` and accuracies ``[K, C]``."""
    table = rows.pivot_table("accuracy", "alpha", "class", dropna=False)[list(classes)].sort_index()
    return table.index.to_numpy(float), table.to_numpy(float)


@dataclass(frozen=True)
class Study:
    """A testbed with an experiment's finished runs on it, which share the classifier and its activations.

    Attributes:
        runs: by the seed of their SAE. context: gives images, the network and everything else that stages use.
    """

    testbed: Testbed
    context: StageContext
    runs: tuple[SAERun, ...]

    @property
    def classes(self) -> list[str]:
        return list(self.context.classes)

    @cached_property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight ``[C, M]`` and bias ``[C]`` of the reader."""
        return self.context.head(self.runs[0].artifacts["classifier"])

    @cached_property
    def train(self) -> Captured:
        """Activations ``[N, M]`` and labels of the train split."""
        return self.context.activations(self.runs[0].artifacts["activations"], "train")

    @cached_property
    def select(self) -> Captured:
        """Activations ``[N, M]`` and labels of the select split, which chooses."""
        return self.context.activations(self.runs[0].artifacts["activations"], "select")

    @cached_property
    def test(self) -> Captured:
        """Activations ``[N, M]`` and labels of the test split, which reports."""
        return self.context.activations(self.runs[0].artifacts["activations"], "test")

    @property
    def nonnegative(self) -> bool:
        """Whether the site's activations are never negative."""
        return bool(self.runs[0].artifacts["activations"].record("activations.json")["nonnegative"])


@contextmanager
def opened(config: str, testbed: Testbed, setup: Setup) -> Iterator[Study]:
    """The finished runs of an experiment on a testbed.

    Raises:
        UserError: there are none, some are not finished, or they do not share a classifier.
    """
    folder = setup.output_dir / "sweeps" / sweep_name(config, testbed, setup)
    planned = read_sweep(folder)
    if unfinished := [run for run in planned if run.state != "finished"]:
        raise UserError(f"{len(unfinished)} of {len(planned)} runs in {folder} are not finished; make them again.")
    settings = RunFolder(folder / planned[0].key).settings([f"output_dir={quoted(setup.output_dir)}"])
    store = Store(setup.output_dir / "artifacts", lambda _: None)
    with gathered(settings.trainer) as ranks:
        context = build_context(settings, store, lambda _: DummyLogger(), Console(markup=False, emoji=False), ranks)
        runs = sorted((_open(context, folder, run) for run in planned), key=lambda run: run.seed)
        if len({run.artifacts["activations"].key for run in runs}) > 1:
            raise UserError(f"The runs in {folder} do not share a classifier; choose an empty --output-dir.")
        yield Study(testbed, context, tuple(runs))


def _open(context: StageContext, sweep: Path, run: SweptRun) -> SAERun:
    made = read_manifest(sweep / run.key)["artifacts"]
    root = context.store.root
    for kind, entry in made.items():
        check_artifact(root / kind / entry["key"])
    artifacts = {
        kind: Artifact(kind, entry["key"], root / kind / entry["key"], entry["digest"], reused=True)
        for kind, entry in made.items()
    }
    return SAERun(context, int(run.settings["sae.seed"]), dict(run.settings), dict(run.metrics), artifacts)
