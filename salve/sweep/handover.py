# SPDX-License-Identifier: MIT
"""What a sweep hands to Hydra's launcher: for each job the keys of its runs, and none of their settings.

A job reads the settings of its runs from their folders, where the plan has put them. Imports nothing heavy: jobs
import this first.
"""

from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from salve.ending import end_with_owner


def launcher_of_runs(context: HydraContext, config: DictConfig, classes: Collection[str]) -> Launcher:
    """The launcher that ``config`` names, set up so that the keys of runs are all that it takes for a job.

    Args:
        context: as Hydra gives it to a sweeper.
        config: the configuration of the sweep's command.
        classes: of data and callbacks, and networks from elsewhere, that the command names; the folders of the runs may
            name these besides salve's and Lightning's own.
    """
    return Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(cast(ConfigLoader, JobConfigs()), context.callbacks),
        task_function=partial(make_job, classes=sorted(classes)),
        config=config,
    )


class JobConfigs:
    """Takes the place of Hydra's config loader, which would compose the configuration of each job anew.

    ``load_sweep_config`` is the only method of the loader that launchers call.
    """

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """The configuration of a job.

        Args:
            master_config: the configuration of the sweep's command.
            sweep_overrides: the keys of the job's runs.

        Returns:
            A copy of the command's configuration. The job's folder is that of its first run, which also gets the log.
        """
        config = deepcopy(master_config)
        OmegaConf.set_readonly(config.hydra, False)
        with open_dict(config):
            config.hydra.overrides.task = list(sweep_overrides)
            config.hydra.sweep.subdir = sweep_overrides[0]
            # No handler for the terminal, where the lines of jobs that run side by side would mix.
            config.hydra.job_logging.root.handlers = ["file"]
        return config


def make_job(_: DictConfig, classes: Collection[str]) -> None:
    """Make the runs of a job; called by a launcher, in the job's process.

    Args:
        classes: see :func:`launcher_of_runs`.
    """
    end_with_owner()  # before imports that take seconds
    from salve.sweep.jobs import make_runs

    hydra = HydraConfig.get()
    make_runs(Path(hydra.runtime.output_dir).parent, hydra.overrides.task, classes)
