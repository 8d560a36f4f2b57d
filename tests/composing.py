"""Settings from overrides as Hydra composes them, but faster: it reads the files once for equal choices of files."""

import copy
from functools import cache

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from salve.run.explain import conf_dir
from salve.run.schema import Config, register, resolve


@cache
def base(*choices: str) -> DictConfig:
    """Settings with a file chosen for some groups; read only."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(choices))


def changed(*overrides: str) -> DictConfig:
    """What ``compose`` gives: Hydra changes single values in a copy, as it does at the end of a composition."""
    choices = [override for override in overrides if (conf_dir() / override.partition("=")[0]).is_dir()]
    config = copy.deepcopy(base(*choices))
    rest = [override for override in overrides if override not in choices]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(rest), config)
    return config


def settings(*overrides: str) -> Config:
    """The checked settings of a run."""
    return resolve(changed(*overrides))
