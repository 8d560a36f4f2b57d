"""``salve -m``: Hydra's sweeper of this project, which plans, skips what is finished, and survives its jobs.

Nothing heavy is imported before the settings of all runs are known to be right.
"""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from salve.artifacts import write_whole
from salve.ending import owning
from salve.results.run import PLAN
from salve.run.explain import SweepIncomplete
from salve.run.folder import RunFolder, planned_in, runs_in
from salve.run.schema import Config, SearchSettings
from salve.sweep.plan import Run, combinations, plan, refuse_idle_axis
from salve.sweep.search import Search


class Sweep:
    """Grids and searches over one folder of runs, in which each run is named after what it computes.

    Args:
        hydra_context, task_function, config: what Hydra gives a sweeper.
    """

    def __init__(self, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader = hydra_context.config_loader
        self._config = config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._launched = 0

    def make_all(self, arguments: Sequence[str]) -> None:
        """Make every run that is not finished.

        Args:
            arguments: overrides, among them the sweeps; of two for one key the later counts.

        Raises:
            UserError: something about the whole sweep is impossible; nothing was started.
            SweepIncomplete: some runs failed.
        """
        console = Console(markup=False, emoji=False)
        folder = Path(self._config.hydra.sweep.dir)
        overrides = OverridesParser.create(config_loader=self._loader).parse_overrides(list(arguments))
        overrides = list({override.get_key_element(): override for override in overrides}.values())
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

    def _search(self, settings: SearchSettings, overrides: Sequence[Any], folder: Path, console: Console) -> list[Run]:
        search = Search(settings, overrides, folder, self._config.seed)
        console.print(f"{search.done} of {settings.trials} trials are done: {folder}", soft_wrap=True, markup=False)
        return search.go_on(lambda combination: self._plan([combination])[0], lambda r: self._make(r, folder, console))

    def _plan(self, combined: Sequence[Sequence[tuple[str, str, bool]]]) -> list[Run]:
        def compose(overrides: list[str]) -> DictConfig:
            return self._loader.load_sweep_config(self._config, overrides)

        shown = track(combined, "checking", transient=True, disable=len(combined) < 20)
        return plan(shown, compose, self._check)

    def _check(self, config: Config) -> None:
        from salve.processes.ranks import check_ranks
        from salve.run.build import check_job  # only now, since it takes seconds
        from salve.run.tryout import try_once

        check_job(config)
        check_ranks(config.trainer, self._on_slurm and self._config.hydra.launcher.tasks_per_node > 1)
        try_once(config)

    @property
    def _on_slurm(self) -> bool:
        return "Slurm" in self._config.hydra.launcher._target_

    def _make(self, runs: Sequence[Run], folder: Path, console: Console) -> None:
        from salve.run.tracking import check_login
        from salve.sweep.launch import make

        for run in runs:
            if damage := run.folder(folder).reopen_if_damaged():
                console.print(f"{run.key} is made again: {damage}.", soft_wrap=True, highlight=False, markup=False)
        states = {run.key: run.folder(folder).state() for run in runs}
        missing = [run for run in runs if states[run.key] != "finished"]
        if missing:
            check_login(missing[0].config.logger)
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
        make(missing, folder, self._launch, console)

    def _launch(self, jobs: Sequence[Sequence[str]]) -> None:
        watching: AbstractContextManager[None] = nullcontext()
        if self._on_slurm:
            from salve.sweep.slurm import watched_queue  # submitit is an extra

            watching = watched_queue()
        try:
            # Jobs on this machine end with the sweep; SLURM's go on.
            with watching, owning(not self._on_slurm):
                self._launcher.launch(jobs, initial_job_idx=self._launched)
        except SystemExit as told:
            if "BasicLauncher" in self._config.hydra.launcher._target_:
                raise
            raise RuntimeError("A job's process was told to end.") from told  # not this one; joblib passes it on
        self._launched += len(jobs)

    @staticmethod
    def _keep_plan(runs: Sequence[Run], folder: Path, console: Console) -> None:
        """Add runs to what was planned in this folder before; a plan that is damaged is written anew."""
        path = folder / PLAN
        with RunFolder(path).lock:
            planned = planned_in(path)
            if not planned and os.path.lexists(path):
                # What the runs of other commands varied is in their settings.
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
        ends = sum(run.folder(folder).state() != "finished" for run in runs)
        if ends:
            raise SweepIncomplete(f"{ends} of {len(runs)} runs did not finish; the same command tries them again.")
