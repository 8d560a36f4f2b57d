"""Measures of the user's own: numbers that join a run's metrics."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from salve.run.build import check_job
from salve.run.own_measures import own_measures, own_metrics
from salve.run.schema import Config
from salve.sweep.plan import run_key
from salve.types import UserError

CODE = """
import math
import numpy as np

def count(run, file="verdict.json", times=1):
    return times * len(run.record("control", file))

def fails(run):
    return 1 / 0

def gives(run, what):
    return {"nothing": None, "text": "x", "true": True, "infinite": math.inf, "array": np.float32(2), "one": 1}[what]

number = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "measures_of_own.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("measures_of_own", None)


def test_a_function_of_the_artifacts_gives_a_number(tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.mkdir()
    (control / "verdict.json").write_text(json.dumps({"a": 1, "b": 2}))
    target = "measures_of_own.count"
    settings = {"plain": {"_target_": target}, "twice": {"_target_": target, "times": 2}, "none": None}
    assert own_metrics(settings, {"control": control}) == {"own_plain": 2, "own_twice": 4}
    assert own_metrics(settings, {}) == {"own_plain": 0, "own_twice": 0}  # what is not there is empty


@pytest.mark.parametrize(("what", "value"), [("nothing", None), ("infinite", None), ("array", 2.0), ("one", 1)])
def test_what_a_function_may_give(what: str, value: float | None) -> None:
    settings = {"x": {"_target_": "measures_of_own.gives", "what": what}}
    assert own_metrics(settings, {}) == {"own_x": value}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"_target_": "measures_of_own.fails"}, r"failed \(ZeroDivisionError: .*\); the same command goes on"),
        ({"_target_": "measures_of_own.gives", "what": "text"}, "gave a str, not a number"),
        ({"_target_": "measures_of_own.gives", "what": "true"}, "gave a bool, not a number"),
    ],
)
def test_what_fails_in_the_end_says_so(given: dict[str, str], said: str) -> None:
    own_measures({"x": given})  # could not be known before
    with pytest.raises(UserError, match=rf"measures\.x\._target_={given['_target_']} {said}"):
        own_metrics({"x": given}, {})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("measures.x._target_=measures_of_own.number", "is a int, not a function"),
        ("measures.x._target_=measures_of_own.counts", "has no function counts; did you mean count"),
        ("measures.x={_target_: measures_of_own.count, tines: 2}", "cannot be called .*unexpected keyword .*tines"),
        ("measures.x._target_=measures_of_own.gives", "cannot be called .*missing a required argument: 'what'"),
    ],
)
def test_what_cannot_be_called_is_refused_before_any_work(
    composed: Callable[..., Config], override: str, said: str
) -> None:
    config = composed(override)
    with pytest.raises(UserError, match=said):
        check_job(config)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("measures.x=3", "measures.x names no function"),
        ("measures={a-b: {_target_: measures_of_own.count}}", "may hold letters, digits and _ alone"),
        ("measures.x={_target_: measures_of_own.count, times: {_target_: os.system}}", r"only data, callbacks"),
    ],
)
def test_settings_are_checked(composed: Callable[..., Config], override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        composed(override)


def test_runs_with_other_measures_are_others(composed: Callable[..., Config]) -> None:
    configs = [composed(), composed("measures.x._target_=measures_of_own.count"), composed("+measures.x=null")]
    assert len({run_key(config) for config in configs[:2]}) == 2
