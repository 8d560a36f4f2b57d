"""``salve``: the command line, over Hydra."""

import logging
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

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
    try:
        folder = Path(HydraConfig.get().runtime.output_dir)
        execute(resolve(config), folder, "salve " + shlex.join(HydraConfig.get().overrides.task))
    except UserError as error:
        print(f"salve: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def main() -> None:
    """Entry point."""
    from salve.run.schema import register

    register()
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
