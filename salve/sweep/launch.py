"""Having runs made by a launcher of Hydra's, whatever happens to its jobs."""

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
from salve.types import UserError

#: Seconds between two looks at the runs' folders.
LOOK = 1.0

Launch = Callable[[Sequence[Sequence[str]]], Any]


def jobs_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Which runs go into one job: alone, or up to ``sae.ensemble`` that differ only in what an ensemble can vary."""
    groups: dict[str, list[list[Run]]] = {}
    for run in runs:
        rest = {name: value for name, value in asdict(run.config).items() if name != "sae"}
        jobs = groups.setdefault(digest_of(rest), [])
        sae = run.config.sae
        fitting = (job for job in jobs if len(job) < sae.ensemble and can_share(job[0].config.sae, sae))
        if (job := next(fitting, None)) is not None:
            job.append(run)
        else:
            jobs.append([run])
    return [job for jobs in groups.values() for job in jobs]


def make(runs: Sequence[Run], sweep: Path, launch: Launch, console: Console) -> None:
    """Have all runs made; afterwards each one's folder says what became of it.

    A job that is killed may take others with it, or the launcher's patience. What had not begun is then launched
    again, and what was being made when it happened is tried once more, alone.

    Args:
        runs: none of them finished. sweep: the sweep's folder. launch: given each job's overrides, returns when all
            jobs have ended, or raises. console: where progress is shown.

    Raises:
        UserError: the launcher failed twice in a row with nothing to show for it.
    """
    queue, suspects, idle = jobs_of(runs), list[list[Run]](), False
    with _watched(runs, sweep, console):
        while queue:
            try:
                launch([_overrides(job) for job in queue])
                break
            except Exception as error:
                stop_if_told()
                left = [job for job in queue if _states(job, sweep) & {"new", "running", "interrupted"}]
                dead = [job for job in left if "interrupted" in _states(job, sweep)]
                if idle and not dead and len(left) == len(queue):
                    raise UserError(f"The launcher gave up: {_first_line(error)}") from error
                idle = not dead and len(left) == len(queue)
                queue = [job for job in left if job not in dead]
                suspects += dead
                again = len(queue) + len(suspects)
                console.print(
                    f"The launcher stopped early ({_first_line(error)}); jobs launched again: {again}.", markup=False
                )
        for job in suspects:
            try:
                launch([_overrides(job)])
            except Exception as error:
                stop_if_told()
                reason = f"its process was killed, twice ({_first_line(error)})"
                for run in job:
                    if run.folder(sweep).state() == "interrupted":
                        run.folder(sweep).fail(reason)


def _overrides(job: Sequence[Run]) -> list[str]:
    """What composes a job: its first run's settings, whose folder keeps the log, and the runs that it makes."""
    # Quoted: 445090e72263 is a key, but Hydra would read a number.
    keys = [f"'{run.key}'" for run in job]
    return [
        *job[0].overrides,
        f"sweep.runs=[{','.join(keys)}]",
        f"hydra.sweep.subdir={keys[0]}",
        # Into the run's own log only: jobs beside each other would mix their lines on the terminal.
        "hydra.job_logging.root.handlers=[file]",
    ]


def _states(job: Sequence[Run], sweep: Path) -> set[str]:
    return {run.folder(sweep).state() for run in job}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": ")


@contextmanager
def _watched(runs: Sequence[Run], sweep: Path, console: Console) -> Iterator[None]:
    """Say of every run when it has ended, and show how far the sweep is; the folders are all that is looked at."""
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
    """The select split's measures, by which runs are compared."""
    shown = (("select_fve", "FVE"), ("select_l0", "L0"), ("select_separating", "separating"))
    found = "  ".join(f"{name} {metrics[key]:.3g}" for key, name in shown if metrics.get(key) is not None)
    return f"on select: {found}" if found else ""
