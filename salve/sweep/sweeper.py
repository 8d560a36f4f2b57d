# SPDX-License-Identifier: MIT
"""``salve -m``: plan a sweep, skip the runs that are finished, and make the others.

Nothing heavy is imported before the settings of all runs are checked.
"""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from salve.artifacts import write_whole
from salve.ending import owning
from salve.results.run import PLAN
from salve.run.explain import SweepIncomplete
from salve.run.folder import RunFolder, planned_in, runs_in
from salve.run.schema import Config, SearchSettings
from salve.run.stored import named_again
from salve.sweep.handover import launcher_of_runs
from salve.sweep.plan import Combination, Run, combinations, plan, refuse_idle_axis
from salve.sweep.search import Search


class Sweep:
    """A grid or a search, in one folder of runs.

    Args:
        hydra_context: what Hydra gives to a sweeper: its config loader and callbacks.
        config: the configuration of the command, in which swept settings have not been varied yet.
    """

    def __init__(self, hydra_context: HydraContext, config: DictConfig) -> None:
        self._hydra_context = hydra_context
        self._config = config
        self._launched = 0

    def make_all(self, arguments: Sequence[str]) -> None:
        """Make every run that is not finished.

        Args:
            arguments: overrides, among them the sweeps. Of two overrides for one key the later counts.

        Raises:
            UserError: the sweep is impossible as a whole; nothing was started.
            SweepIncomplete: some runs failed.
        """
        console = Console(markup=False, emoji=False)
        folder = Path(self._config.hydra.sweep.dir)
        parser = OverridesParser.create(config_loader=self._hydra_context.config_loader)
        overrides = list({one.get_key_element(): one for one in parser.parse_overrides(list(arguments))}.values())
        for override in overrides:
            if override.is_sweep_override():
                refuse_idle_axis(override.get_key_element())
        search = self._config.sweep.search
        if search is None:
            runs = self._plan(combinations(overrides))
            self._make(runs, folder, console)
        else:
            settings = OmegaConf.to_object(search)
            assert isinstance(settings, SearchSettings)
            runs = self._search(settings, overrides, folder, console)
        self._end(runs, folder, console)

    def _search(
        self, settings: SearchSettings, overrides: Sequence[Override], folder: Path, console: Console
    ) -> list[Run]:
        search = Search(settings, overrides, folder, self._config.seed)
        console.print(f"{search.done} of {settings.trials} trials are done: {folder}", soft_wrap=True, markup=False)
        return search.run_trials(
            lambda combination: self._plan([combination])[0], lambda r: self._make(r, folder, console)
        )

    def _plan(self, combined: Sequence[Combination]) -> list[Run]:
        def compose(overrides: list[str]) -> DictConfig:
            return self._hydra_context.config_loader.load_sweep_config(self._config, overrides)

        shown = track(combined, "checking", transient=True, disable=len(combined) < 20)
        return plan(shown, compose, self._check)

    def _check(self, config: Config) -> None:
        from salve.processes.ranks import check_ranks
        from salve.run.build import check_job  # imported here because it takes seconds
        from salve.run.tryout import try_once

        check_job(config)
        check_ranks(config.trainer, self._on_slurm and self._config.hydra.launcher.tasks_per_node > 1)
        try_once(config)

    @property
    def _on_slurm(self) -> bool:
        return "Slurm" in self._config.hydra.launcher._target_

    def _make(self, runs: Sequence[Run], folder: Path, console: Console) -> None:
        from salve.run.tracking import check_login
        from salve.sweep.launch import submit

        for run in runs:
            if damage := run.folder(folder).reopen_if_damaged():
                console.print(f"{run.key} is made again: {damage}.", soft_wrap=True, highlight=False, markup=False)
        states = {run.key: run.folder(folder).state() for run in runs}
        missing = [run for run in runs if states[run.key] != "finished"]
        if missing:
            check_login(missing[0].config.logger)
            classes = {name for run in missing for name in named_again(run.config).values()}
            launcher = launcher_of_runs(self._hydra_context, self._config, classes)
        before = {state: sum(found == state for found in states.values()) for state in ("failed", "interrupted")}
        again = ", ".join(f"{count} {state} before" for state, count in before.items() if count)
        found = len(runs) - len(missing)
        console.print(
            f"{len(runs)} runs, {found} of them finished: {len(missing)} to make{f' ({again})' if again else ''}.",
            soft_wrap=True,
            markup=False,
        )
        self._keep_plan(runs, folder, console)
        if not missing:
            return
        for run in missing:
            run.folder(folder).prepare(run.config)
        submit(missing, folder, lambda jobs: self._launch(launcher, jobs), console)

    def _launch(self, launcher: Launcher, jobs: Sequence[Sequence[str]]) -> None:
        watching: AbstractContextManager[None] = nullcontext()
        if self._on_slurm:
            from salve.sweep.slurm import watched_queue  # imported here because submitit is an extra

            watching = watched_queue()
        try:
            # Jobs on this machine end when the sweep ends; those of SLURM go on.
            with watching, owning(not self._on_slurm):
                launcher.launch(jobs, initial_job_idx=self._launched)
        except SystemExit as told:
            if "BasicLauncher" in self._config.hydra.launcher._target_:
                raise
            # It was the job's process that was told to end, not this one; joblib passes the exception on.
            raise RuntimeError("A job's process was told to end.") from told
        self._launched += len(jobs)

    @staticmethod
    def _keep_plan(runs: Sequence[Run], folder: Path, console: Console) -> None:
        """Add runs to the plan in this folder; a damaged plan is written anew."""
        path = folder / PLAN
        with RunFolder(path).lock:
            planned = planned_in(path)
            if not planned and os.path.lexists(path):
                # Which settings other commands varied is lost; the values are in the runs' settings.
                planned = {key: {"swept": {}} for key in runs_in(folder)}
                console.print(f"{path} cannot be read, and is written anew.", soft_wrap=True, markup=False)
            planned |= {run.key: {"swept": run.swept} for run in runs}
            record = {"name": folder.name, "runs": planned}
            write_whole(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def _end(self, runs: Sequence[Run], folder: Path, console: Console) -> None:
        from salve.run.tracking import log_sweep_summary
        from salve.sweep import print_summary, summarise_sweep

        summary = summarise_sweep(folder)
        print_summary(summary, console)
        if runs:
            log_sweep_summary(runs[0].config.logger, folder.name, folder, summary.table, summary.figures)
        open_runs = sum(run.folder(folder).state() != "finished" for run in runs)
        if open_runs:
            raise SweepIncomplete(f"{open_runs} of {len(runs)} runs did not finish; the same command tries them again.")
