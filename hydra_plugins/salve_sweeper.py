"""Where Hydra looks for sweepers. Other programs that use Hydra import this file too, so it imports nothing heavy."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SalveSweeper(Sweeper):
    """``salve -m``: see :class:`salve.sweep.sweeper.Sweep`.

    Args:
        params: further sweeps, by setting, as on the command line.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self._params = params or {}
        self._setup: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over before it asks for the sweep."""
        self._setup = {"hydra_context": hydra_context, "task_function": task_function, "config": config}

    def sweep(self, arguments: list[str]) -> None:
        """Make every run that is not finished."""
        from salve.sweep.sweeper import Sweep

        params = [f"{key}={value}" for key, value in self._params.items()]
        Sweep(**self._setup).make_all([*params, *arguments])
