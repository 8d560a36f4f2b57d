"""The plan of a sweep: combinations, keys, refusals, and the grouping of runs into jobs."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from typing import Any, get_type_hints

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from salve.run.schema import Config, resolve
from salve.settings import NOT_COMPUTED, is_computed
from salve.sweep.launch import jobs_of
from salve.sweep.plan import Combination, combinations, evenly, plan, run_key
from salve.types import UserError
from salve.values import OneOf
from tests.composing import changed


@pytest.fixture
def composed() -> Callable[[list[str]], DictConfig]:
    return lambda overrides: changed(*overrides)


def combined(*arguments: str) -> list[Combination]:
    return combinations(OverridesParser.create().parse_overrides(list(arguments)))


def nothing(_: Config) -> None:
    """A check that every combination passes."""


def test_every_combination_once_in_the_order_of_the_command_line() -> None:
    found = combined("sae.sparsity=1,2", "layer=last", "seed=range(0,3)")
    values = [tuple(value for _, value, _ in one) for one in found]
    assert values == [(s, "last", n) for s in ("1", "2") for n in ("0", "1", "2")]
    assert [key for key, _, swept in found[0] if swept] == ["sae.sparsity", "seed"]


@pytest.mark.parametrize(
    "axis", ["cluster=local,joblib", "trainer=cpu,ddp", "trainer.devices=1,2", "name=a,b", "sae.ensemble=1,8"]
)
def test_settings_that_do_not_change_results_cannot_be_swept(axis: str) -> None:
    with pytest.raises(UserError, match=rf"^{axis.partition('=')[0]} cannot be swept: "):
        combined(axis)


def test_an_interval_needs_a_search() -> None:
    with pytest.raises(UserError, match=r"^sae.sparsity is given as an interval.*sweep=optuna"):
        combined("sae.sparsity=interval(1, 2)")


def test_a_key_is_what_is_computed(composed: Callable[[list[str]], DictConfig]) -> None:
    def key(*overrides: str) -> str:
        return run_key(resolve(composed(list(overrides))))

    first = key()
    elsewhere = ["output_dir=x", "name=y", "trainer.accelerator=cpu", "logger=wandb", "cluster=local"]
    assert key(*elsewhere, "data.num_workers=1", "sae.ensemble=8", "sae.sparsity=5") == first  # 5 is the default
    for other in (
        "sae.sparsity=4",
        "seed=1",
        "sae.seed=1",
        "edit.alpha=[0,1]",
        "stages=[discover]",
        "backbone=resnet18",
    ):
        assert key(other) != first


def leaves(settings: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every setting; a list or an empty group counts as one setting."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


#: Other values of settings whose default does not show their type.
OTHER: dict[str, Any] = {"sweep.search": None, "data.splits": {"train": "a", "test": "b"}}


def choices(path: str) -> tuple[Any, ...]:
    """The values that a setting may have, if its field lists them."""
    hint: Any = Config
    for name in path.split("."):
        hint = get_type_hints(hint, include_extras=True).get(name) if isinstance(hint, type) else None
    return next((rule.values for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, OneOf)), ())


def another(path: str, value: Any) -> Any:
    """Another value of a setting."""
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return next((choice for choice in choices(path) if choice != value), f"{value}x")
    if isinstance(value, list):
        return [*value, *value, 1] if value != [] else [1]
    return {"x": 1} if value == {} else 3


@pytest.mark.parametrize(
    "chosen",
    [
        *([], ["sae=matryoshka"], ["sae=topk"], ["trainer=ddp"], ["logger=wandb"], ["backbone=vit_b_16"]),
        *(["data=folder", "data.root=x"], ["data=imagenette"], ["data=cifar100"]),
    ],
)
def test_every_setting_changes_the_key_or_is_listed_as_not_computed(
    composed: Callable[[list[str]], DictConfig], chosen: list[str]
) -> None:
    config = resolve(composed(chosen))
    before = run_key(config)
    seen = dict(leaves(asdict(config)))
    assert {"trainer.precision", "trainer.memory", "seed", "edit.alpha", "sae.k"} <= seen.keys()
    for path, value in seen.items():
        other = another(path, value)
        if other == value:
            continue
        changed = deepcopy(config)
        *groups, name = path.split(".")
        group: Any = changed
        for part in groups:
            group = group[part] if isinstance(group, dict) else getattr(group, part)
        if isinstance(group, dict):
            group[name] = other
        else:
            setattr(group, name, other)
        assert (run_key(changed) != before) == is_computed(path), f"{path}={other}"


def test_what_is_listed_as_not_computed_is_a_setting_and_has_a_reason(
    composed: Callable[[list[str]], DictConfig],
) -> None:
    known = {"cluster", "hydra"}
    for chosen in ([], ["data=imagenette"]):
        for path, _ in leaves(asdict(resolve(composed(chosen)))):
            known |= {path, path.partition(".")[0]}
    assert NOT_COMPUTED.keys() <= known
    assert all(len(reason.split()) > 1 for reason in NOT_COMPUTED.values())


@pytest.mark.slow
def test_all_impossible_combinations_are_listed_together(composed: Callable[[list[str]], DictConfig]) -> None:
    """First come the refusals that need the settings alone; then those of checks that read data."""

    def check(config: Config) -> None:
        if config.seed == 3:
            raise UserError("No data for 3.")

    def refused(*arguments: str) -> list[str]:
        with pytest.raises(UserError) as error:
            plan(combined("sae=topk", "sae.dictionary_size=32,64", "seed=0,3", *arguments), composed, check)
        return str(error.value).splitlines()

    first, *lines = refused("sae.k=2,40")
    assert first == "2 of 8 combinations cannot be run, so none was started:"
    assert [line.partition(": ")[0].strip() for line in lines] == [
        "sae.dictionary_size=32 seed=0 sae.k=40",
        "sae.dictionary_size=32 seed=3 sae.k=40",
    ]
    assert all("between 1 and sae.dictionary_size=32" in line for line in lines)
    first, *lines = refused("sae.k=2")
    assert first == "2 of 4 combinations cannot be run, so none was started:"
    assert lines == [f"  sae.dictionary_size={size} seed=3: No data for 3." for size in (32, 64)]


def test_swept_values_have_their_types_and_groups_their_names(composed: Callable[[list[str]], DictConfig]) -> None:
    runs = plan(combined("sae.sparsity=1,2.5", "backbone=resnet_small,resnet18", "edit.alpha=[0,1]"), composed, nothing)
    assert [run.swept for run in runs] == [
        {"sae.sparsity": s, "backbone": b} for s in (1.0, 2.5) for b in ("resnet_small", "resnet18")
    ]
    assert runs[1].label == "sae.sparsity=1.0 backbone=resnet18"


def test_two_combinations_that_compute_the_same_are_one_run(composed: Callable[[list[str]], DictConfig]) -> None:
    assert len(plan(combined("sae.sparsity=5,5.0", "seed=0"), composed, nothing)) == 1


@pytest.mark.slow
def test_all_layers_are_the_sites_of_the_backbone(composed: Callable[[list[str]], DictConfig]) -> None:
    runs = plan(combined("layer=all", "backbone=resnet18"), composed, nothing)
    every = [run.swept["layer"] for run in runs]
    assert len(every) == len(set(every)) == 12
    assert every[-1] == "avgpool"
    assert "layer2.0.conv2" in every
    assert all(run.config.layer == run.swept["layer"] for run in runs)
    few = combined("discover.select=margin,effect", "layer=all", "backbone=resnet18", "sweep.sites=3")
    some = plan(few, composed, nothing)
    layers = [run.swept["layer"] for run in some]
    assert layers[:3] == layers[3:] == evenly(every, 3)


@pytest.mark.parametrize(
    ("count", "total", "places"),
    [(None, 3, [0, 1, 2]), (5, 3, [0, 1, 2]), (3, 3, [0, 1, 2]), (1, 12, [11]), (2, 12, [0, 11]), (3, 11, [0, 5, 10])],
)
def test_sites_are_taken_evenly_and_always_with_the_last(count: int | None, total: int, places: list[int]) -> None:
    assert evenly([str(place) for place in range(total)], count) == [str(place) for place in places]


@pytest.mark.parametrize(("count", "total"), [(8, 12), (8, 49), (7, 9), (10, 11)])
def test_neighbouring_sites_are_about_equally_far_apart(count: int, total: int) -> None:
    found = [int(name) for name in evenly([str(place) for place in range(total)], count)]
    steps = np.diff(found)
    assert (len(found), found[0], found[-1]) == (count, 0, total - 1)
    assert 0 < steps.max() <= steps.min() + 1


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (["sae.sparsity=1,2,3", "sae.seed=0,1"], [1] * 6),
        (["sae.sparsity=1,2,3", "sae.seed=0,1", "sae.ensemble=32"], [6]),
        (["sae.sparsity=1,2,3", "sae.seed=0,1", "sae.ensemble=4"], [4, 2]),
        (["sae.sparsity=1,2", "seed=0,1", "sae.ensemble=32"], [2, 2]),  # another classifier, other activations
        (["sae.epochs=3,4", "sae.sparsity=1,2", "sae.ensemble=32"], [2, 2]),
    ],
)
@pytest.mark.slow
def test_runs_that_share_activations_share_a_job(
    composed: Callable[[list[str]], DictConfig], arguments: list[str], sizes: list[int]
) -> None:
    runs = plan(combined(*arguments), composed, nothing)
    jobs = jobs_of(runs)
    assert [len(job) for job in jobs] == sizes
    assert sorted(run.key for job in jobs for run in job) == sorted(run.key for run in runs)
