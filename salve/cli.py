# SPDX-License-Identifier: MIT
"""``salve``: the command line, over Hydra. Torch is imported only after the settings have been checked."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from salve.ending import as_told, stopped_if_told
from salve.system import in_one_sentence, refused_by_system
from salve.types import UserError

if TYPE_CHECKING:  # Hydra is imported later, once signals are handled
    from omegaconf import DictConfig

#: What the command says after it was told to end.
STOPPED = "salve: stopped; the same command finds what is finished, and goes on with the rest."
#: Hydra's variable: if it is 1, errors are shown with their traceback.
FULL_ERROR = "HYDRA_FULL_ERROR"
#: Variables that torchrun or SLURM sets for the ranks that it starts.
OF_RANKS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS")


def task(config: "DictConfig") -> None:
    """Make one run; what Hydra calls with the composed configuration."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from salve.run.inputs import check_inputs
    from salve.run.schema import resolve

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        settings = resolve(config)
        check_inputs(settings)
        from salve.run.execute import execute  # only now, since it takes seconds
        from salve.run.folder import claimed

        with claimed(folder) as own:
            execute(settings, own, "salve " + shlex.join(HydraConfig.get().overrides.task))
    except Exception as error:
        expected = isinstance(error, UserError | HydraException | OmegaConfBaseException)
        told = error if expected else refused_by_system(error, config.output_dir)
        if told is None:
            raise
        _remove_if_empty(folder)
        # Hydra would print a traceback for an Exception.
        raise SystemExit(2) from told


def main() -> None:
    """Entry point."""
    as_told(_command, STOPPED)


def _command() -> None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from salve.run.explain import SweepIncomplete, group_mistake
    from salve.run.schema import register

    repairs = sys.argv[1:2] == ["repair"]
    if repairs:
        from salve.run.repair import HELP, asks_for_help

        del sys.argv[1]
        if asks_for_help(sys.argv[1:]):
            print(HELP, end="")
            return
    register()
    os.environ.setdefault("OC_CAUSE", "0")  # else OmegaConf words its errors otherwise under a debugger
    logging.raiseExceptions = False  # else a full disk prints a traceback for each line of the log
    wants_all = os.environ.get(FULL_ERROR) == "1"
    try:
        with stopped_if_told(), _hydra_raises(), _joined() as leads:
            if leads:
                _run(repairs)
    except SweepIncomplete as error:
        print(f"salve: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as left:
        if left.__cause__ is None or isinstance(left.__cause__, SystemExit):
            raise
        _tell(left.__cause__, wants_all)
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        _tell(error, wants_all)
    except ValueError:
        if wants_all or (said := group_mistake(sys.argv[1:])) is None:
            raise
        print(f"salve: {said}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if wants_all or (told := refused_by_system(error)) is None:
            raise
        _tell(told, wants_all)


def _run(repairs: bool) -> None:
    import hydra

    from salve.run.explain import conf_dir

    if repairs:
        from rich.console import Console

        from salve.run.repair import overrides, repair_run, run_folder

        if (folder := run_folder(sys.argv[1:])) is not None:
            repair_run(folder, sys.argv[2:], Console(markup=False, emoji=False))
            return
        sys.argv[1:] = overrides(sys.argv[1:])
    elif any(argument.startswith("stages=") for argument in sys.argv[1:]):
        from salve.run.repair import name_of

        sys.argv[1:] = [*name_of(sys.argv[1:]), *sys.argv[1:]]
    # Hydra's parser wants all settings behind -m: `salve sae=topk -m sae.k=2,4` would be an error.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    if not any(argument.startswith("rerun=") for argument in sys.argv[1:]):
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
        return
    from rich.console import Console

    from salve.run.rerun import rerun

    if not rerun(sys.argv[1:], Console(markup=False, emoji=False)):
        raise SystemExit(1)


def _tell(error: BaseException, wants_all: bool) -> None:
    """End the command with one sentence about an error, or with its traceback if the user asked for that."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from salve.run.explain import explain

    if wants_all:
        raise error
    status = 2
    if isinstance(error, HydraException | OmegaConfBaseException):  # before OSError: one of Hydra's is an OSError
        said = explain(error)
    elif isinstance(error, OSError):
        said, status = in_one_sentence(error), 1
    elif isinstance(error, UserError):
        said = str(error)
    else:
        raise error
    print(f"salve: {said}", file=sys.stderr)
    raise SystemExit(status) from None


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Have Hydra raise its errors instead of printing them: its messages do not name the valid choices."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        del os.environ[FULL_ERROR]
        if before is not None:
            os.environ[FULL_ERROR] = before


@contextmanager
def _joined() -> Iterator[bool]:
    """Yield whether this process leads. Of ranks that torchrun or SLURM started, one leads and the others help it."""
    if not any(name in os.environ for name in OF_RANKS):
        yield True
        return
    from salve.processes.ranks import joined

    with joined() as leads:
        yield leads


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that was refused before any work, and folders above that are empty then."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"salve.log"}:
        shutil.rmtree(folder)
        with suppress(OSError):  # not empty: there are other runs
            for above in folder.parents[:2]:
                above.rmdir()


if __name__ == "__main__":
    main()
