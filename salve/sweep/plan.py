"""What a sweep is going to do: each of its runs, checked, and named after what it computes."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from salve.artifacts import REVISION, digest_of
from salve.run.explain import explain
from salve.run.folder import RunFolder
from salve.run.inputs import check_inputs
from salve.run.schema import Config, resolve
from salve.types import UserError

#: Settings and groups that a run's key does not depend on, each with the reason why the results do not either. Of a
#: trainer, its precision and its memory are left: another precision is other arithmetic, and what does not fit into
#: memory is shuffled in another order. Devices only round sums in another order, as other processors do.
NOT_COMPUTED = {
    "name": "names folders",
    "output_dir": "says where results lie",
    "trainer.accelerator": "a GPU computes what a CPU does, up to rounding",
    "trainer.devices": "all ranks together take the batches that one device takes",
    "trainer.strategy": "says who starts the ranks",
    "logger": "records a training",
    "sweep": "groups runs",
    "cluster": "says where runs are made",
    "hydra": "says how runs are started",
    "data.num_workers": "what is random about an image depends on its number, not on who loads it",
    "data.download": "brings the same images",
    "sae.ensemble": "an SAE of an ensemble is trained on the rows it would be trained on alone",
}

ALL_SITES = "all"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        key: hash of everything its results depend on, and the name of its folder.
        swept: values of the settings that the sweep varies. config: all settings, checked.
        overrides: what composes these settings.
    """

    key: str
    swept: dict[str, Any]
    config: Config
    overrides: tuple[str, ...]

    def folder(self, sweep: Path) -> RunFolder:
        """Where the run is kept."""
        return RunFolder(sweep / self.key)

    @property
    def label(self) -> str:
        """The swept values, for people."""
        return label_of(self.swept)


def label_of(swept: dict[str, Any]) -> str:
    """``sae.sparsity=2 seed=0``."""
    return " ".join(f"{key}={value}" for key, value in swept.items()) or "as configured"


def run_key(config: Config) -> str:
    """12 hex digits that two runs share exactly if they compute the same."""
    settings = {**asdict(config), "sae": {**config.sae.scientific(), "seed": config.sae.seed}}
    return digest_of({"revision": REVISION, "settings": _computed(settings)})[:12]


def is_computed(key: str) -> bool:
    """Whether results depend on a setting: ``sae.k`` or ``group/part``."""
    path = key.lstrip("+").replace("/", ".")
    return not any(path == idle or path.startswith(f"{idle}.") for idle in NOT_COMPUTED)


def _computed(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings without those that results do not depend on."""
    return {
        name: _computed(value, f"{above}{name}.") if isinstance(value, dict) else value
        for name, value in settings.items()
        if is_computed(f"{above}{name}")
    }


def combinations(overrides: Sequence[Override]) -> list[list[tuple[str, str, bool]]]:
    """Every combination of swept values, as ``(key, value, swept)`` in the order of the command line.

    Raises:
        UserError: a setting is swept that does not change what is computed, or over an interval.
    """
    axes: dict[str, list[tuple[str, str, bool]]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [(key, override.get_value_element_as_str(), False)]
            continue
        refuse_idle_axis(key)
        if not override.is_discrete_sweep():
            raise UserError(f"{key} is given as an interval, of which only a search (sweep=optuna) can take values.")
        axes[key] = [(key, value, True) for value in override.sweep_string_iterator()]
    return [list(combination) for combination in itertools.product(*axes.values())]


def refuse_idle_axis(key: str) -> None:
    """Raises UserError for a setting that cannot be swept."""
    if not is_computed(key) or key == "trainer":
        raise UserError(f"{key} cannot be swept: it says how or where runs are made, not what they compute.")


def plan(
    combined: Iterable[Sequence[tuple[str, str, bool]]],
    compose: Callable[[list[str]], DictConfig],
    *checks: Callable[[Config], None],
) -> list[Run]:
    """Compose and check every combination.

    Args:
        combined: see :func:`combinations`. compose: composes the settings from overrides.
        checks: each raises UserError for settings that do not fit each other, the data or the weights. All combinations
            pass one before any is given to the next, which may take longer.

    Returns:
        The runs, each key once.

    Raises:
        UserError: some combinations are impossible; the message lists them all, each with its reason.
    """
    refusals = _Refusals()
    settled: list[tuple[DictConfig, Config, tuple[str, ...], dict[str, str]]] = []
    total = 0
    for total, combination in enumerate(combined, start=1):  # noqa: B007
        overrides = tuple(f"{key}={value}" for key, value, _ in combination)
        swept = {key: value for key, value, is_swept in combination if is_swept}
        with refusals.of(label_of(swept)):
            config = compose(list(overrides))
            with open_dict(config):
                config.pop("hydra", None)
            settings = resolve(config)
            check_inputs(settings)
            settled.append((config, settings, overrides, swept))
    refusals.end(total)
    runs: dict[str, Run] = {}
    for config, settings, overrides, swept in settled:
        with refusals.of(label_of(swept)):
            for run in _expand(config, settings, overrides, swept):
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
    def of(self, what: str) -> Iterator[None]:
        """Keep what is raised about a combination."""
        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            self._lines.append(f"{what}: {explain(error)}")
        except UserError as error:
            self._lines.append(f"{what}: {error}")

    def end(self, total: int) -> None:
        """Raises UserError with all reasons, if there are any."""
        if self._lines:
            lines = "\n".join(f"  {line}" for line in self._lines)
            raise UserError(f"{len(self._lines)} of {total} combinations cannot be run, so none was started:\n{lines}")


@lru_cache(maxsize=64)
def _site_names(library: str, name: str, args: str) -> list[str]:
    """The sites of a backbone, whose further arguments are JSON."""
    from salve.backbones import load_backbone, sites  # only now, since it takes seconds

    return list(sites(load_backbone(library, name, "random", 2, json.loads(args)).model))


def _expand(config: DictConfig, first: Config, overrides: tuple[str, ...], swept: dict[str, Any]) -> list[Run]:
    """One run, or with ``layer=all`` one per site of the backbone."""
    layers = [first.layer]
    if first.layer == ALL_SITES:
        backbone = first.backbone
        layers = _site_names(backbone.library, backbone.name, json.dumps(backbone.args, sort_keys=True))
    runs = []
    for layer in layers:
        one = replace(first, layer=layer)
        values = {key: _value(config, key, text) for key, text in swept.items()}
        chosen = overrides
        if first.layer == ALL_SITES:
            values["layer"] = layer
            chosen = (*(text for text in overrides if not text.startswith("layer=")), f"layer={layer}")
        runs.append(Run(run_key(one), values, one, chosen))
    return runs


def _value(config: DictConfig, key: str, text: str) -> Any:
    """The value that a swept setting has; of a group, the name of the chosen file."""
    value = OmegaConf.select(config, key.lstrip("+"))
    if value is None or OmegaConf.is_dict(value):
        return text
    return OmegaConf.to_object(value) if OmegaConf.is_list(value) else value
