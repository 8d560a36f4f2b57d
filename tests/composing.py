"""Settings from overrides as Hydra composes them, but faster: it reads the files once for equal choices of files."""

import copy
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from salve.run.explain import conf_dir
from salve.run.schema import register


@cache
def base(*choices: str) -> DictConfig:
    """Settings with a file chosen for some groups; read only."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(choices))


def changed(*overrides: str) -> DictConfig:
    """What ``compose`` gives: single values are changed in a copy."""
    choices = [override for override in overrides if (conf_dir() / override.partition("=")[0]).is_dir()]
    config = copy.deepcopy(base(*choices))
    for override in overrides:
        if override not in choices:
            key, _, value = override.partition("=")
            parsed = OverridesParser.create().parse_override(f"x={value}").value()
            OmegaConf.update(config, key.lstrip("+"), parsed, force_add=key.startswith("+"))
    return config
