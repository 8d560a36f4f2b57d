"""``salve-sites``: a table that is made once, and what it says of a backbone that it does not know."""

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
    assert rows(first)["blocks.0.attn.qkv"] == ["blocks.0.norm1", "64", "1 + 4", "signed"]
    assert rows(first)["head"] == ["last", "64", "1", "signed"]

    def export(*_: object) -> None:
        raise AssertionError("the sites are known")

    monkeypatch.setattr(graph, "NetworkGraph", export)
    assert main(settings) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("backbone=resnet19", "backbone=resnet19 is no choice; backbone can be resnet18, "),
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
