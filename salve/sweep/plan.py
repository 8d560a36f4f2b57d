# SPDX-License-Identifier: MIT
"""Plan a sweep: compose and check each of its runs, and name each after what it computes."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from salve.artifacts import REVISION, digest_of
from salve.run.explain import explain
from salve.run.folder import RunFolder
from salve.run.inputs import check_inputs
from salve.run.schema import Config, resolve
from salve.settings import is_computed
from salve.types import UserError

ALL_SITES = "all"


class Argument(NamedTuple):
    """One setting of a combination.

    Attributes:
        key: the setting, or group, as on the command line.
        value: its value, as on the command line.
        swept: whether the sweep varies it.
    """

    key: str
    value: str
    swept: bool


Combination = Sequence[Argument]


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        key: hash of everything that its results depend on; the name of its folder.
        swept: the values of the settings that the sweep varies.
        config: all settings, checked.
    """

    key: str
    swept: dict[str, Any]
    config: Config

    def folder(self, sweep: Path) -> RunFolder:
        """The run's folder in that of the sweep."""
        return RunFolder(sweep / self.key)

    @property
    def label(self) -> str:
        """The swept values, as text for the terminal."""
        return label_of(self.swept)


def label_of(swept: dict[str, Any]) -> str:
    """Swept values as text: ``sae.sparsity=2 seed=0``."""
    return " ".join(f"{key}={value}" for key, value in swept.items()) or "as configured"


def run_key(config: Config) -> str:
    """The key of a run: 12 hex digits, the same for two runs exactly if they compute the same."""
    # One SAE is trained whatever its pool, but read differently; and its seed has a key of its own.
    chosen = {"seed": config.sae.seed, "pool": config.sae.pool}
    settings = {**asdict(config), "sae": {**config.sae.scientific(), **chosen}}
    if not config.measures:  # so that runs from before there was the setting keep their keys
        del settings["measures"]
    return digest_of({"revision": REVISION, "settings": _computed(settings)})[:12]


def _computed(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The settings that results depend on."""
    return {
        name: _computed(value, f"{above}{name}.") if isinstance(value, dict) else value
        for name, value in settings.items()
        if is_computed(f"{above}{name}")
    }


def combinations(overrides: Sequence[Override]) -> list[Combination]:
    """Every combination of swept values, in the order of the command line.

    Raises:
        UserError: a setting is swept that does not change what is computed, or over an interval.
    """
    axes: dict[str, list[Argument]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [Argument(key, override.get_value_element_as_str(), False)]
            continue
        refuse_idle_axis(key)
        if not override.is_discrete_sweep():
            raise UserError(f"{key} is given as an interval, which only a search (sweep=optuna) can draw values from.")
        axes[key] = [Argument(key, value, True) for value in override.sweep_string_iterator()]
    return [list(combination) for combination in itertools.product(*axes.values())]


def refuse_idle_axis(key: str) -> None:
    """Raise UserError for a setting that cannot be swept, because it does not change what is computed."""
    if not is_computed(key) or key == "trainer":
        raise UserError(f"{key} cannot be swept: it says how or where runs are made, not what they compute.")


def plan(
    combined: Iterable[Combination],
    compose: Callable[[list[str]], DictConfig],
    *checks: Callable[[Config], None],
) -> list[Run]:
    """Compose each combination, once, and check it.

    Args:
        combined: see :func:`combinations`.
        compose: composes a configuration from overrides.
        checks: each raises UserError for settings that do not fit each other, the data or the weights. A check begins
            when all combinations have passed the one before it; slow checks come last.

    Returns:
        The runs, each key once.

    Raises:
        UserError: some combinations are impossible; the message lists all of them with their reasons.
    """
    refusals = _Refusals()
    composed: list[tuple[Config, dict[str, Any]]] = []
    total = 0
    for total, combination in enumerate(combined, start=1):  # noqa: B007
        with refusals.of(label_of({given.key: given.value for given in combination if given.swept})):
            composed.append(_compose_one(combination, compose))
    refusals.end(total)
    runs: dict[str, Run] = {}
    for config, swept in composed:
        with refusals.of(label_of(swept)):
            for run in _runs_of(config, swept):
                runs.setdefault(run.key, run)
    refusals.end(total)
    for check in checks:
        for run in runs.values():
            with refusals.of(run.label):
                check(run.config)
        refusals.end(len(runs))
    return list(runs.values())


class _Refusals:
    """Collects the reasons why combinations are impossible, and raises them together."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextmanager
    def of(self, label: str) -> Iterator[None]:
        """Catch what is raised about the combination with this label."""
        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            self._lines.append(f"{label}: {explain(error)}")
        except UserError as error:
            self._lines.append(f"{label}: {error}")

    def end(self, total: int) -> None:
        """Raise UserError with all reasons, if there are any."""
        if self._lines:
            lines = "\n".join(f"  {line}" for line in self._lines)
            raise UserError(f"{len(self._lines)} of {total} combinations cannot be run, so none was started:\n{lines}")


def _compose_one(combination: Combination, compose: Callable[[list[str]], DictConfig]) -> tuple[Config, dict[str, Any]]:
    """The checked settings of a combination, and its swept values with their types."""
    composed = compose([f"{given.key}={given.value}" for given in combination])
    with open_dict(composed):
        composed.pop("hydra", None)
    config = resolve(composed)
    check_inputs(config)
    return config, {given.key: _value(composed, given) for given in combination if given.swept}


def _value(config: DictConfig, given: Argument) -> Any:
    """The value of a swept setting; for a group, the name of the chosen file."""
    value = OmegaConf.select(config, given.key.lstrip("+"))
    if value is None or OmegaConf.is_dict(value):
        return given.value
    return OmegaConf.to_object(value) if OmegaConf.is_list(value) else value


def _runs_of(config: Config, swept: dict[str, Any]) -> list[Run]:
    """One run, or with ``layer=all`` one run per site of the backbone, at most ``sweep.sites``."""
    if config.layer != ALL_SITES:
        return [Run(run_key(config), swept, config)]
    backbone = config.backbone
    layers = evenly(
        _site_names(backbone.library, backbone.name, json.dumps(backbone.args, sort_keys=True)), config.sweep.sites
    )
    configs = [replace(config, layer=layer) for layer in layers]
    return [Run(run_key(one), {**swept, "layer": one.layer}, one) for one in configs]


def evenly(names: Sequence[str], count: int | None) -> list[str]:
    """At most ``count`` of the names, evenly from the first to the last; of one, the last. None for all of them."""
    if count is None or count >= len(names):
        return list(names)
    last, steps = len(names) - 1, max(1, count - 1)
    return [names[last - round(last * step / steps)] for step in reversed(range(count))]


@lru_cache(maxsize=64)
def _site_names(library: str, name: str, args: str) -> list[str]:
    """The sites of a backbone; ``args`` are its further arguments, as JSON."""
    from salve.backbones import load_backbone, sites  # imported here because it takes seconds

    return list(sites(load_backbone(library, name, "random", 2, json.loads(args)).model.eval()))
