"""``salve``: the command line, over Hydra."""

import logging
import os
import shlex
import shutil
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from salve.types import UserError


def conf_dir() -> Path:
    """The folder of configurations: inside an installed package, or at the top of the repository."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def task(config: DictConfig) -> None:
    """One job of Hydra's."""
    from salve.run.execute import execute
    from salve.run.schema import resolve

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        execute(resolve(config), folder, "salve " + shlex.join(HydraConfig.get().overrides.task))
    except UserError as error:
        print(f"salve: {error}", file=sys.stderr)
        if {path.name for path in folder.iterdir()} <= {"salve.log"}:
            shutil.rmtree(folder)  # refused before any work: no empty run stays behind
        raise SystemExit(2) from None


def main() -> None:
    """Entry point."""
    from salve.run.explain import explain
    from salve.run.schema import register

    register()
    # Hydra then raises what it would print itself: its own words name an unknown key, but not the known ones.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"salve: {explain(error, conf_dir())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
