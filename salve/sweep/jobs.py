# SPDX-License-Identifier: MIT
"""A job of a sweep: make its runs, from the settings in their folders."""

import io
import logging
import shlex
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from salve.ending import stop_if_told
from salve.processes.gpus import leased_gpus
from salve.processes.ranks import joined
from salve.run.execute import execute, train_together
from salve.run.explain import quoted
from salve.run.folder import RunFolder
from salve.run.stored import named_again

log = logging.getLogger(__name__)


def make_runs(sweep: Path, keys: Sequence[str], classes: Collection[str] = ()) -> None:
    """Make runs of a sweep. A run that fails does not stop the others.

    Args:
        sweep: the sweep's folder.
        keys: of the runs. If there are several, they share their activations, and their SAEs are trained together.
        classes: that the sweep's command names; a run's settings may name these besides salve's and Lightning's own.
    """
    folders = [RunFolder(sweep / key) for key in sorted(keys)]
    with joined() as leads, ExitStack() as held:
        if not leads:
            return
        for folder in folders:  # in the same order in every job, so that no two jobs wait for each other
            held.enter_context(folder.lock)
        missing = [folder for folder in folders if folder.state() != "finished"]
        for folder in missing:
            folder.begin()
        made = _train_saes(missing, classes) if len(missing) > 1 else set()
        for folder in missing:
            _make_run(folder, classes, made)


def _train_saes(folders: Sequence[RunFolder], classes: Collection[str]) -> set[str]:
    """Train the SAEs of several runs together, each of which later finds its own; return the keys of the SAEs."""
    try:
        configs = [folder.settings(classes=classes) for folder in folders]
        with leased_gpus(configs[0].trainer) as gpus:
            return train_together(configs, _hidden(), gpus)
    except Exception:
        stop_if_told()
        # Each run meets the error again by itself, so that only those fail that it concerns.
        log.exception("The SAEs could not be trained together; each run trains its own.")
        return set()


def _make_run(folder: RunFolder, classes: Collection[str], made: set[str]) -> None:
    sweep = folder.path.parent.name
    try:
        config = folder.settings(classes=classes)
        # The command that repeats the run. It names output_dir and classes of one's own, which a rerun does not take
        # from the folder.
        command = shlex.join(["salve", f"rerun={folder.path}"]) + f" {quoted(f'output_dir={config.output_dir}')}"
        command += "".join(f" {quoted(f'{key}={name}')}" for key, name in named_again(config).items())
        with leased_gpus(config.trainer) as gpus:
            execute(config, folder.path, command, _hidden(), group=sweep, gpus=gpus, made=made)
    except Exception as error:
        stop_if_told()
        log.exception("%s failed", folder.path.name)
        folder.fail(error)
    else:
        folder.finish()


def _hidden() -> Console:
    """A console that shows nothing: jobs run side by side, and the sweep's command shows the progress of all."""
    return Console(file=io.StringIO(), markup=False, emoji=False)
