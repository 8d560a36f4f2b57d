"""Law 1 in networks of many families, with random weights: scaling what reads a site is gating its tensor."""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest


def _families() -> ModuleType:
    """The benchmark that makes the table of docs/sites.md, which knows the networks."""
    path = Path(__file__).parents[2] / "benchmarks" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families = _families()
#: The largest difference, as a share of the largest logit, that rounding alone makes.
ROUNDING = {"float64": 1e-10, "float32": 1e-4}


def holds(spec: str, most: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = families.law(spec, most)
    assert found.why == ""
    assert 0 < found.tried <= found.sites
    assert found.difference < ROUNDING[found.precision]
    assert found.effect > 100 * ROUNDING[found.precision]  # else the law says nothing


@pytest.mark.slow
@pytest.mark.parametrize("spec", families.FEW)
def test_scaling_what_reads_a_site_is_gating_it(spec: str) -> None:
    holds(spec, most=2)


@pytest.mark.nightly
@pytest.mark.parametrize("spec", families.FURTHER)
def test_so_it_is_in_further_families(spec: str) -> None:
    holds(spec, most=4)
