# SPDX-License-Identifier: MIT
"""Submit runs to a Hydra launcher, and resubmit those whose job died."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from salve.artifacts import digest_of
from salve.ending import stop_if_told
from salve.stages import can_share
from salve.sweep.plan import Run
from salve.system import first_line
from salve.types import UserError

#: Seconds between two looks at the runs' folders.
LOOK = 1.0

#: Starts jobs, each given as the keys of its runs. Returns when all have ended; raises if the launcher stops early.
Launch = Callable[[Sequence[Sequence[str]]], Any]

Job = list[Run]


def jobs_of(runs: Sequence[Run]) -> list[Job]:
    """Group runs into jobs: one run each, or up to ``sae.ensemble`` runs whose SAEs can be trained together."""
    groups: dict[str, list[Job]] = {}
    for run in runs:
        sae = run.config.sae
        others = {name: value for name, value in asdict(run.config).items() if name != "sae"}
        jobs = groups.setdefault(digest_of(others), [])
        fitting = (job for job in jobs if len(job) < sae.ensemble and can_share(job[0].config.sae, sae))
        if (job := next(fitting, None)) is not None:
            job.append(run)
        else:
            jobs.append([run])
    return [job for jobs in groups.values() for job in jobs]


def submit(runs: Sequence[Run], sweep: Path, launch: Launch, console: Console) -> None:
    """Submit runs and wait for them; afterwards each run's folder says how it ended.

    A job that is killed may take other jobs with it, or make the launcher give up. Jobs that had not begun are then
    launched again. Jobs that had begun are launched once more, each alone, since one of them may be the cause.

    Args:
        runs: runs that are not finished.
        sweep: the sweep's folder.
        launch: starts jobs.
        console: where progress is shown.

    Raises:
        UserError: the launcher failed twice in a row before any job began.
    """
    with _reported(runs, sweep, console):
        for job in _launch_together(jobs_of(runs), sweep, launch, console):
            _launch_alone(job, sweep, launch)


def _launch_together(jobs: list[Job], sweep: Path, launch: Launch, console: Console) -> list[Job]:
    """Launch jobs, and those that have not begun again each time that the launcher stops early.

    Returns:
        The jobs that were being made when the launcher stopped.
    """
    died: list[Job] = []
    failed_in_vain = False
    while jobs:
        try:
            launch([_keys(job) for job in jobs])
            break
        except Exception as error:
            stop_if_told()
            left = [job for job in jobs if _states(job, sweep) & {"new", "running", "interrupted"}]
            begun = [job for job in left if "interrupted" in _states(job, sweep)]
            in_vain = not begun and len(left) == len(jobs)
            if in_vain and failed_in_vain:
                raise UserError(f"The launcher gave up: {first_line(error)}") from error
            failed_in_vain = in_vain
            died += begun
            jobs = [job for job in left if job not in begun]
            console.print(
                f"The launcher stopped early ({first_line(error)}); jobs launched again: {len(jobs) + len(died)}.",
                markup=False,
            )
    return died


def _launch_alone(job: Job, sweep: Path, launch: Launch) -> None:
    """Launch a job whose process died; if it dies again, mark its runs as failed."""
    try:
        launch([_keys(job)])
    except Exception as error:
        stop_if_told()
        for run in job:
            if run.folder(sweep).state() == "interrupted":
                run.folder(sweep).fail(f"its process was killed, twice ({first_line(error)})")


def _keys(job: Job) -> list[str]:
    return [run.key for run in job]


def _states(job: Job, sweep: Path) -> set[str]:
    return {run.folder(sweep).state() for run in job}


@contextmanager
def _reported(runs: Sequence[Run], sweep: Path, console: Console) -> Iterator[None]:
    """Print a line for each run that ends, and show the progress of the sweep. Reads nothing but the runs' folders."""
    ended: set[str] = set()
    over = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bars.add_task("runs", total=len(runs))

    def look() -> None:
        for run in runs:
            folder = run.folder(sweep)
            if run.key not in ended and (state := folder.state()) in ("finished", "failed"):
                ended.add(run.key)
                bars.advance(task)
                what = _headline(folder.metrics()) if state == "finished" else f"failed: {folder.reason()}"
                console.print(
                    f"{len(ended)}/{len(runs)}  {run.label}  {what}", soft_wrap=True, highlight=False, markup=False
                )

    def watch() -> None:
        while not over.wait(LOOK):
            look()

    for run in runs:
        run.folder(sweep).forget_failure()
    thread = threading.Thread(target=watch, daemon=True)
    with bars:
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            look()


def _headline(metrics: dict[str, Any]) -> str:
    """The measures of a finished run that the terminal shows, all on the select split."""
    shown = (("select_fve", "FVE"), ("select_l0", "L0"), ("select_separating", "separating"))
    found = "  ".join(f"{name} {metrics[key]:.3g}" for key, name in shown if metrics.get(key) is not None)
    return f"on select: {found}" if found else ""
