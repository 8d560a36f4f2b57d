"""Make an experiment's runs on a testbed with ``salve``, or find them, open them, and count what separates."""

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console

from experiments.compare import MatchedEdit, Reader, edit_at, strength_to
from experiments.testbeds import Setup, Testbed, quoted
from salve.activations import Captured
from salve.artifacts import Store
from salve.backbones.tail import LinearTail
from salve.editing.verdict import CONFIDENCE
from salve.ending import run_child
from salve.processes.ranks import gathered
from salve.report.text import plural
from salve.results import Run, open_sweep
from salve.results.run import PLAN
from salve.run.build import build_context
from salve.run.folder import RunFolder
from salve.stages import StageContext
from salve.types import Split, UserError

#: The split that chooses a strength, and the one that reports its effect.
SPLITS: tuple[Split, Split] = ("select", "test")
#: Whether an edit separates its class, strictly and in the published sense; the strict verdict decides.
SENSES = ("separates", "separates_published")
#: The heading of the weaker one.
PUBLISHED = "in the published sense"
#: What :func:`measures_of_edits` tells.
OF_EDITS = (
    *("share", "reached", "separating", "separating_published", "selectivity", "select_selectivity"),
    *("drift", "after", "alpha"),
)
Values = NDArray[np.float64]


def sweep_name(config: str, testbed: Testbed, setup: Setup) -> str:
    """The folder of an experiment's runs on a testbed, under ``<output_dir>/sweeps``."""
    return f"{config.replace('/', '-')}-{testbed.name}" + ("-quick" if setup.quick else "")


def command(config: str, testbed: Testbed, setup: Setup, sweep: Sequence[str]) -> list[str]:
    """The arguments of ``salve`` that make one sweep of an experiment's recipe on a testbed, with further settings."""
    recipes = [testbed.config, config] if testbed.config else [config]
    return [
        "-m",
        f"experiment=[{','.join(recipes)}]",
        f"sweep.name={sweep_name(config, testbed, setup)}",
        f"output_dir={quoted(setup.output_dir)}",
        *setup.overrides(testbed),
        *sweep,
        *setup.settings,
    ]


def make(config: str, testbed: Testbed, setup: Setup, sweeps: Sequence[Sequence[str]]) -> list[str]:
    """Make the missing runs, each sweep in another process; returns the commands, as one would type them.

    Raises:
        UserError: some runs could not be made; ``salve`` has printed which and why.
    """
    # Finished runs are found again by their keys; a new plan asks for no run of other settings that were once planned.
    (setup.output_dir / "sweeps" / sweep_name(config, testbed, setup) / PLAN).unlink(missing_ok=True)
    commands = []
    for sweep in sweeps:
        arguments = command(config, testbed, setup, sweep)
        commands.append("salve " + shlex.join(arguments))
        if status := run_child([sys.executable, "-m", "salve.cli", *arguments]):
            raise UserError(f"the runs on {testbed.title} ended with status {status} (see above): {commands[-1]}")
    return commands


class SAERun(Run):
    """A finished run, read as the experiments need it: one SAE, and the edits through its latents."""

    @property
    def seed(self) -> int:
        """The SAE's seed."""
        return int(self.flat_settings["sae.seed"])

    @property
    def layer(self) -> str:
        """The name of the SAE's site."""
        return str(self.flat_settings["layer"])

    @cached_property
    def selected(self) -> pd.DataFrame:
        """By class, the latent chosen for its edits: ``latent``, ``sign``, ``share``, ``kind``, …; NaN for a class
        without one."""
        return self.table("features", "selected.csv").set_index("class").reindex(self.classes)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """By class, the edit that stage ``control`` kept: ``alpha_used``, chosen on select, and on test
        ``accuracy_after``, ``separates``, ``separates_published``, …; NaN and False for a class without a latent."""
        table = self.table("control", "summary.csv").set_index("target").reindex(self.classes)
        for sense in SENSES:
            table[sense] = table[sense].eq(True)
        return table

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """How many of these edits separate their class, with the interval over test images: ``separates``,
        ``separates_low``, ``separates_high``, ``separates_published``, …"""
        return self.record("control", "verdict.json")

    @cached_property
    def _by_target(self) -> dict[Any, pd.DataFrame]:
        """The curves of every class by split, mode and target."""
        if "curves.parquet" not in self.files("control"):
            raise UserError(
                f"The run {self.folder} holds no curves of every class; make its run again with edit.by_class=true."
            )
        return dict(list(self.table("control", "curves.parquet").groupby(["split", "mode", "target"])))

    def curves(self, split: Split, mode: str, target: str) -> tuple[Values, Values]:
        """Strengths ``[K]`` and the accuracy of every class at each ``[K, C]``, of a target of stage ``control``.

        Raises:
            UserError: the run kept no such curves.
        """
        rows = self._by_target[split, mode, target]
        # pivot_table would take the mean of each single value, five times as slowly.
        table = rows.pivot(index="alpha", columns="class", values="accuracy")[self.classes].sort_index()  # noqa: PD010
        return table.index.to_numpy(float), table.to_numpy(float)


class Suppressed(NamedTuple):
    """A class while its latent is suppressed.

    Attributes:
        own: index of the class. name: of the class. alphas: strengths ``[K]``. select, test: accuracy of every class at
            each, by split ``[K, C]``.
        edit: its edit on test, at the strength where select has it at ``LEVEL``. on_select: the same on select.
    """

    own: int
    name: str
    alphas: Values
    select: Values
    test: Values
    edit: MatchedEdit
    on_select: MatchedEdit


def suppressed(run: SAERun, classes: Sequence[str]) -> Iterator[Suppressed]:
    """Each class that has a latent in an SAE, while that latent is suppressed."""
    for own, name in enumerate(classes):
        if pd.notna(run.selected["latent"][name]):
            (alphas, select), (_, test) = (run.curves(split, "suppress", name) for split in SPLITS)
            alpha = strength_to(alphas, select[:, own])
            on_test, on_select = (edit_at(alphas, accuracy, own, alpha) for accuracy in (test, select))
            yield Suppressed(own, name, alphas, select, test, on_test, on_select)


def edits_by_class(run: SAERun, classes: Sequence[str]) -> pd.DataFrame:
    """One row per ``class``: its edit on test at the strength that select has chosen (the fields of ``MatchedEdit``),
    and its selectivity on select itself (``select_selectivity``). No strength reaches a class that has no latent."""
    none = MatchedEdit(False, math.inf, math.nan, math.nan, 0.0, math.nan, math.nan, 0.0)
    found = {one.name: (one.edit, one.on_select) for one in suppressed(run, classes)}
    pairs = [(name, *found.get(name, (none, none))) for name in classes]
    rows = [{"class": name, **edit._asdict(), "select_selectivity": chose.selectivity} for name, edit, chose in pairs]
    return pd.DataFrame(rows)


def measures_of_edits(run: SAERun, classes: Sequence[str]) -> dict[str, float]:
    """An SAE's edits, over the classes, of which one without a latent has a share, a drop and a selectivity of 0.

    Returns:
        ``share``, mean share of its latent that a class holds; ``reached``, share of classes that some strength takes
        to ``LEVEL`` on select; ``separating`` and ``separating_published``, that separate, strictly and in the
        published sense; mean ``selectivity`` on test at that strength, and on select (``select_selectivity``), by which
        something may be chosen; of those reached mean ``drift`` and ``after``, the accuracy left, and median ``alpha``.
    """
    edits = edits_by_class(run, classes)
    # A class that is at the level without an edit says nothing about one.
    judged = edits[edits["selectivity"].notna()]
    reached = judged[judged["reached"]]
    separating = run.verdicts.loc[judged["class"], list(SENSES)].mean()

    def mean(values: pd.Series) -> float:
        return sum(values) / len(values) if len(values) else np.nan

    return {
        "share": float(run.selected["share"].fillna(0).mean()),
        "reached": judged["reached"].mean(),
        **dict(zip(("separating", "separating_published"), separating, strict=True)),
        "selectivity": mean(judged["selectivity"]),
        "select_selectivity": mean(edits["select_selectivity"].dropna()),
        **{name: reached[name].mean() for name in ("drift", "after")},
        "alpha": reached["alpha"].median(),
    }


@dataclass(frozen=True)
class Study:
    """An experiment's finished runs on a testbed, which share a classifier and, at each site, its activations.

    Attributes:
        context: images, the network, and what else stages use. runs: in the order of their SAEs' seeds.
        train, select, test: activations ``[N, M]`` and labels of the splits at the site of the first run; select
            chooses, test reports.
    """

    testbed: Testbed
    context: StageContext
    runs: tuple[SAERun, ...]
    train: Captured
    select: Captured
    test: Captured

    @property
    def classes(self) -> list[str]:
        return list(self.context.classes)

    @cached_property
    def tail(self) -> LinearTail:
        """The tail of the last site."""
        return self.context.tail(self.runs[0].artifact("classifier"))

    @property
    def reader(self) -> Reader:
        """The tail, and the images of each split."""
        splits = ((split.activations, split.labels) for split in (self.train, self.select, self.test))
        return Reader(self.tail, *splits)


@contextmanager
def opened(config: str, testbed: Testbed, setup: Setup) -> Iterator[Study]:
    """The finished runs of an experiment on a testbed.

    Raises:
        UserError: there are none, some are not finished or damaged, or they do not share a classifier.
    """
    store = Store(setup.output_dir / "artifacts", lambda _: None)
    sweep = open_sweep(setup.output_dir / "sweeps" / sweep_name(config, testbed, setup), store.root)
    if sweep.unfinished:
        raise UserError(
            f"{len(sweep.unfinished)} of {len(sweep)} runs in {sweep.folder} are not finished; make them again."
        )
    runs = sorted((SAERun(run.folder, store.root) for run in sweep), key=lambda run: run.seed)
    for run in runs:
        for kind in run.artifacts:
            run.artifact(kind)  # checked before hours of work, not when it is first read
    if len({run.artifact("activations").key for run in runs}) > len({run.layer for run in runs}):
        raise UserError(f"The runs in {sweep.folder} do not share a classifier; choose an empty --output-dir.")
    settings = RunFolder(sweep[0].folder).settings([f"output_dir={quoted(setup.output_dir)}"])
    with gathered(settings.trainer) as ranks:
        context = build_context(settings, store, lambda _: DummyLogger(), Console(markup=False, emoji=False), ranks)
        yield Study(testbed, context, tuple(runs), *map(runs[0].activations, get_args(Split)))


class Separation(NamedTuple):
    """How many classes separate, over SAEs.

    Attributes:
        share: of all classes, mean over SAEs. text: how many, with ``span``. published: how many do in the published
            sense. span: over which range, and how sure.
    """

    share: float
    text: str
    published: str
    span: str


def separation(runs: Sequence[SAERun], classes: int) -> Separation:
    """Count over all ``classes``; a class without a latent does not separate.

    The interval over images is the mean of the SAEs' intervals, which are all from the same images.
    """
    strict, published = (pd.Series([int(run.verdicts[sense].sum()) for run in runs]) for sense in SENSES)
    low, high = (pd.Series([run.verdict[f"separates_{end}"] for run in runs]).mean() for end in ("low", "high"))
    over = f"{strict.min()} to {strict.max()} over {plural(len(runs), 'SAE')}"
    span = f"{over}; {100 * CONFIDENCE:.0f} % over test images: {low:.1f} to {high:.1f}"
    text, as_published = (f"{count.mean():.1f} of {classes} classes" for count in (strict, published))
    return Separation(float(strict.mean()) / classes, f"{text} ({span})", as_published, span)
