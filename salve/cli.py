"""``salve``: the command line, over Hydra."""

import logging
import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from salve.types import UserError


def task(config: DictConfig) -> None:
    """One job of Hydra's: a run, or some runs of a sweep."""
    from salve.run.execute import execute
    from salve.run.folder import claimed, in_one_sentence
    from salve.run.jobs import make_runs
    from salve.run.schema import resolve

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.sweep.runs:
        make_runs(folder.parent, config.sweep.runs)
        return
    try:
        with claimed(folder) as own:
            execute(resolve(config), own, "salve " + shlex.join(HydraConfig.get().overrides.task))
    # Told here already: before an exception of any other kind Hydra prints a line of its own.
    except UserError as error:
        print(f"salve: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"salve: {in_one_sentence(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point."""
    from salve.run.explain import conf_dir, explain, group_mistake
    from salve.run.folder import in_one_sentence
    from salve.run.ranks import joined
    from salve.run.rerun import RERUN, rerun
    from salve.run.schema import register
    from salve.run.sweep import SweepIncomplete

    # Hydra's parser takes settings in one piece only: `salve sae=topk -m sae.k=2,4` would be an error.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    register()
    # Hydra then raises what it would print itself: its own words name an unknown key, but not the known ones.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with joined() as leads:  # of several ranks that were started from outside, one leads and the others help it
            if not leads:
                return
            if not any(argument.startswith(RERUN) for argument in sys.argv[1:]):
                hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
            elif not rerun(sys.argv[1:], Console()):
                raise SystemExit(1)
    except KeyboardInterrupt:
        print("salve: stopped; the same command finds what is finished, and goes on with the rest.", file=sys.stderr)
        raise SystemExit(130) from None
    except SweepIncomplete as error:
        print(f"salve: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (HydraException, OmegaConfBaseException) as error:
        print(f"salve: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except UserError as error:
        print(f"salve: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"salve: {in_one_sentence(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except ValueError:
        if (said := group_mistake(sys.argv[1:])) is None:
            raise
        print(f"salve: {said}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
