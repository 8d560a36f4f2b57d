"""What a job of a sweep does, wherever a launcher has put it: make some of the sweep's runs."""

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
    """Make runs of a sweep from the settings in their folders; one that fails does not stop the others.

    Args:
        sweep: the sweep's folder. keys: names of the runs' folders in it. Several share their activations, and their
            SAEs are trained together. classes: that the command names besides salve's own and Lightning's.
    """
    folders = [RunFolder(sweep / key) for key in sorted(keys)]
    with joined() as leads, ExitStack() as held:
        if not leads:
            return
        for folder in folders:  # in order, so that two jobs that want the same never wait for each other
            held.enter_context(folder.lock)
        missing = [folder for folder in folders if folder.state() != "finished"]
        for folder in missing:
            folder.begin()
        made = _share(missing, classes) if len(missing) > 1 else set()
        for folder in missing:
            _make(folder, classes, made)


def _share(folders: Sequence[RunFolder], classes: Collection[str]) -> set[str]:
    """What the runs have in common, and their SAEs at once, which each run finds later; the keys of the SAEs."""
    try:
        configs = [folder.settings(classes=classes) for folder in folders]
        with leased_gpus(configs[0].trainer) as gpus:
            return train_together(configs, _quiet(), gpus)
    except Exception:
        stop_if_told()
        # Each run meets the reason again by itself, and only those fail that it concerns.
        log.exception("The SAEs could not be trained together; each run trains its own.")
        return set()


def _make(folder: RunFolder, classes: Collection[str], made: set[str]) -> None:
    sweep = folder.path.parent.name
    try:
        config = folder.settings(classes=classes)
        # As who repeats it has to write it: a rerun takes neither of the last two from the folder.
        again = shlex.join(["salve", f"rerun={folder.path}"]) + f" {quoted(f'output_dir={config.output_dir}')}"
        again += "".join(f" {key}={target}" for key, target in named_again(config).items())
        with leased_gpus(config.trainer) as gpus:
            execute(config, folder.path, again, _quiet(), group=sweep, gpus=gpus, made=made)
    except Exception as error:
        stop_if_told()
        log.exception("%s failed", folder.path.name)
        folder.fail(error)
    else:
        folder.finish()


def _quiet() -> Console:
    """What a run would show on the terminal: jobs run beside each other, and the sweep shows their progress."""
    return Console(file=io.StringIO(), markup=False, emoji=False)
