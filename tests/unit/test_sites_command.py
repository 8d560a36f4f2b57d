"""``salve-sites``: a table that is made once, and what it says of a backbone that it does not know."""

import sys
from pathlib import Path

import pytest

from salve.backbones import graph
from salve.run.sites import main

VIT = ["backbone=timm", "backbone.name=test_vit", "+backbone.args.img_size=32", "backbone.preprocess.size=32"]


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.split("  ") for line in text.splitlines()[4:]]
    parts = [[part.strip() for part in line if part.strip()] for line in lines]
    return {row[0]: row[1:] for row in parts if row}


def test_the_table_is_made_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    settings = [*VIT, f"output_dir={tmp_path}"]
    assert main(settings) == 0
    first = capsys.readouterr().out
    assert first.startswith("25 sites of timm test_vit, for images of 32 pixels")
    assert rows(first)["blocks.0.attn.qkv"] == ["blocks.0.norm1", "64", "1 + 4", "+ -", "yes"]
    assert rows(first)["head"] == ["last", "64", "1", "+ -", "no"]

    def export(*_: object) -> None:
        raise AssertionError("the sites are known")

    monkeypatch.setattr(graph, "NetworkGraph", export)
    assert main(settings) == 0
    assert capsys.readouterr().out == first


def test_a_network_of_ones_own_is_looked_at_anew_when_its_code_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from torch import nn


def net(num_classes, width=4):
    layers = nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    return nn.Sequential(*layers)
"""
    (tmp_path / "looked_at.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    settings = ["backbone=own", "backbone._target_=looked_at.net", f"output_dir={tmp_path}"]
    assert main(settings) == 0
    first = capsys.readouterr().out
    assert first.startswith("1 sites of own looked_at.net, for images of 224 pixels")
    assert rows(first)["4"][:4] == ["last, 2", "4", "1", "+"]
    assert main([*settings, "+backbone.args.width=6"]) == 0
    assert rows(capsys.readouterr().out)["4"][1] == "6"
    # Of another length: within a second Python does not compile a file of the same size again.
    (tmp_path / "looked_at.py").write_text(code.replace("width=4", "width=12"))
    monkeypatch.delitem(sys.modules, "looked_at")
    assert main(settings) == 0
    assert rows(capsys.readouterr().out)["4"][1] == "12"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("backbone=resnet19", "backbone=resnet19 is no choice; backbone can be own, resnet18, "),
        ("backbone.name=resnet19", "backbone.name=resnet19 is no model of timm"),
        ("backbone=3", "backbone=3 is no choice; backbone can be "),
        ("backbone.preprocess.size=0", "backbone.preprocess.size=0 must be above 0."),
        ("backbone.size=3", "backbone.size is no setting; backbone has "),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    assert main([setting, f"output_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"salve-sites: {says}"), told
    assert told.count("\n") == 1
    assert not list(tmp_path.rglob("sites.json"))
