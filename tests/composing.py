"""Settings from overrides as Hydra composes them, but faster: it reads the files once for equal choices of files."""

import pickle
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from salve.run.explain import conf_dir
from salve.run.schema import Config, register, resolve


def remember() -> None:
    """Have Hydra read each file of its own and of ours once in this process, and merge equal lists of them once.

    Every composition, also one of a command, has its own copies. Where files of a test are among the sources, nothing
    is remembered.
    """
    merge, load = ConfigLoaderImpl._compose_config_from_defaults_list, ConfigRepository.load_config
    known: dict[tuple[Any, ...], bytes] = {}

    def once(made: Callable[[], Any], sources: Any, *what: object) -> Any:
        paths = tuple(source.path for source in sources)
        if not {path for path in paths if path.startswith("file:")} <= {f"file://{conf_dir()}"}:
            return made()
        key = (paths, *ConfigStore.instance().repo, *map(repr, what))
        if key not in known:
            known[key] = pickle.dumps(made())
        return pickle.loads(known[key])

    @wraps(merge)
    def merged(self: ConfigLoaderImpl, defaults: Any, repo: Any) -> Any:
        return once(lambda: merge(self, defaults, repo), repo.get_sources(), defaults)

    @wraps(load)
    def loaded(self: ConfigRepository, config_path: str) -> Any:
        return once(lambda: load(self, config_path), self.get_sources(), config_path)

    ConfigLoaderImpl._compose_config_from_defaults_list = merged  # type: ignore[method-assign]
    ConfigRepository.load_config = loaded  # type: ignore[method-assign]


@cache
def base(*choices: str) -> bytes:
    """Settings with a file chosen for some groups, pickled: a copy takes a quarter of the time of a deep copy."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return pickle.dumps(compose("config", list(choices)))


def changed(*overrides: str) -> DictConfig:
    """What ``compose`` gives: Hydra changes single values in a copy, as it does at the end of a composition."""
    choices = [override for override in overrides if (conf_dir() / override.partition("=")[0]).is_dir()]
    config: DictConfig = pickle.loads(base(*choices))
    rest = [override for override in overrides if override not in choices]
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(rest), config)
    return config


def settings(*overrides: str) -> Config:
    """The checked settings of a run."""
    return resolve(changed(*overrides))
