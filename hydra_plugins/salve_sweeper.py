# SPDX-License-Identifier: MIT
"""The sweeper of ``salve -m``, in the package where Hydra looks for it.

Imports nothing heavy, since other programs that use Hydra import it too.
"""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SalveSweeper(Sweeper):
    """``salve -m``: see :class:`salve.sweep.sweeper.Sweep`.

    Args:
        params: further sweeps by setting, with values as on the command line; a YAML in ``conf/sweep`` sets them.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self._params = params or {}
        self._setup: dict[str, Any] = {}  # the arguments of Sweep

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives to a sweeper; the task function, which makes a single run, is not used."""
        self._setup = {"hydra_context": hydra_context, "config": config}

    def sweep(self, arguments: list[str]) -> None:
        """Make every run that is not finished."""
        from salve.sweep.sweeper import Sweep

        params = [f"{key}={value}" for key, value in self._params.items()]
        Sweep(**self._setup).make_all([*params, *arguments])
