"""Law 1 in networks of many families, with random weights: scaling what reads a site is gating its tensor."""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve.backbones.graph import GraphTail
from salve.backbones.site import Reader
from tests.integration.small_networks import NETWORKS


def _families() -> ModuleType:
    """The benchmark that makes the table of docs/sites.md."""
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
#: Families in which the weights of some of the sites tried go to a function, so that no hook on a module sees them.
UNCALLED = ("beit", "eva", "swin", "swin_v2", "vit")


def small(family: str) -> tuple[nn.Module, int]:
    build, size = NETWORKS[family]
    torch.manual_seed(0)
    return build(num_classes=5), size


def law(model: nn.Module, size: int, most: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return families.law(model, size, most)


def test_the_law_is_tried_in_at_least_forty_families() -> None:
    assert len({build for build, _ in NETWORKS.values()}) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORKS)
def test_scaling_what_reads_a_site_is_gating_it(family: str) -> None:
    model, size = small(family)
    found = law(model, size, most=4)
    assert found.why == ""
    assert 0 < found.tried <= found.sites
    assert (found.called < found.tried) == (family in UNCALLED)
    assert found.precision == "float64"
    assert found.difference < 1e-12
    assert found.effect > 1e-7  # else the law says nothing


@pytest.mark.nightly
@pytest.mark.parametrize("spec", families.NETWORKS)
def test_so_it_is_in_networks_of_full_size(spec: str) -> None:
    model, size = families.network(spec)
    found = law(model, size, most=4)
    assert found.why == ""
    assert 0 < found.called <= found.tried <= found.sites
    assert found.difference < ROUNDING[found.precision]
    assert found.effect > 100 * ROUNDING[found.precision]


def _root(gate: Tensor) -> Tensor:
    """Another gate than the one that was meant."""
    return gate.sqrt()


def test_a_wrong_scaling_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Reader.scaled
    monkeypatch.setattr(Reader, "scaled", lambda self, weight, gate: right(self, weight, _root(gate)))
    assert law(*small("mixer"), most=1).difference > 0.01


def test_a_mistake_that_the_scaling_and_the_graph_share_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks know neither of the graph nor of the scaled weights."""
    right, gated = Reader.scaled, GraphTail.gated
    monkeypatch.setattr(Reader, "scaled", lambda self, weight, gate: right(self, weight, _root(gate)))
    monkeypatch.setattr(GraphTail, "gated", lambda self, gate: gated(self, _root(gate)))
    found = law(*small("mixer"), most=1)
    assert found.called == 1
    assert found.difference > 0.01


def test_the_table_goes_between_its_marks() -> None:
    page = "before\n<!-- families -->\nold\n<!-- /families -->\nafter\n"
    assert families.written(page, "new") == "before\n<!-- families -->\nnew\n<!-- /families -->\nafter\n"
    with pytest.raises(families.UserError, match="no lines <!-- families -->"):
        families.written("before\n", "new")


def test_the_table_of_the_docs_has_every_network_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "sites.md").read_text(encoding="utf-8")
    table = page.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    named = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert named == [spec.partition("@")[0] for spec in families.NETWORKS]
