"""The command that tries a network of every family, and makes the page that says what works."""

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from salve.timm_alone import timm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backbones(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark, which finds its neighbour by their folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield import_module("backbones")
    for name in ("backbones", "families"):
        sys.modules.pop(name, None)


def test_a_network_of_each_family_is_tried(backbones: ModuleType) -> None:
    assert set(backbones.TORCHVISION) <= set(models.list_models(module=models))
    assert len(set(backbones.TORCHVISION)) == 26
    assert set(backbones.TIMM) <= set(timm.list_models())
    families = [re.match("[a-z]+", name) for name in backbones.TIMM]
    assert len({family[0] for family in families if family}) == len(backbones.TIMM) >= 146


@pytest.mark.slow
def test_a_network_that_works(backbones: ModuleType) -> None:
    found = backbones.tried("timm/resnet10t")
    assert (found.where, found.site, found.width, found.map, found.precision) == (
        *("last", "fc", 512, "layer4"),
        "float64",
    )
    assert found.works
    # Nothing works whose numbers do not hold.
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    for change in ({"law": 1e-3}, {"law": float("nan")}, {"logits": 0.1}, {"undone": False}, {"undone": None}):
        assert not backbones.Found(**{**fields, **change}).works
    assert not backbones.Found(**{**fields, "effect": 0.0}).works


@pytest.mark.slow
def test_a_network_that_has_only_inner_sites(backbones: ModuleType) -> None:
    found = backbones.tried("squeezenet1_1")
    assert (found.where, found.site, found.width, found.map) == ("inner", "classifier.1", 512, "3 × 3")
    assert "its last, classifier.1, reads a map" in found.why
    assert found.holds
    assert not found.works


def test_an_edit_that_leaves_other_bits_is_seen(backbones: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(_: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor * (1 + 1e-6) for name, tensor in state.items()}

    monkeypatch.setattr(backbones, "undo_edit_file", rounds)
    found = backbones.tried("timm/test_resnet")
    assert (found.where, found.undone, found.works) == ("last", False, False)


def test_what_is_known_is_not_tried_again(
    backbones: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, page = tmp_path / "found.jsonl", tmp_path / "page.md"
    tried: list[str] = []

    def watched(name: str) -> Any:
        tried.append(name)
        return backbones.Found(name, 64, 1.0, why="It fails.")

    monkeypatch.setattr(backbones, "tried", watched)
    names = ["a", "timm/b", "c"]
    for part in ("1/2", "2/2", "1/1"):
        monkeypatch.setattr(sys, "argv", ["backbones.py", "--kept", str(kept), "--part", part, *names])
        assert backbones.main() == 0
    assert tried == ["a", "c", "timm/b"]
    assert [json.loads(line)["name"] for line in kept.read_text().splitlines()] == tried
    monkeypatch.setattr(sys, "argv", ["backbones.py", "--kept", str(kept), "--markdown", str(page), *names])
    assert backbones.main() == 0
    assert tried == ["a", "c", "timm/b"]
    assert "**3 do not work.**" in page.read_text()
    assert "| `timm/b` | 64 |" in page.read_text()


def test_a_network_without_a_map_is_tried_too(backbones: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8), nn.ReLU(), nn.Linear(8, 10))
    monkeypatch.setattr(backbones, "network", lambda name: (model, 64))
    found = backbones.tried("mine")
    assert (found.site, found.map, found.works) == ("3", "", True)
