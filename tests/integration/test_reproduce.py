"""The paper's experiments as a user starts them: one of them, tiny, in processes of their own."""

from pathlib import Path

import pytest

from salve.artifacts import read_record, read_table
from tests.integration.commands import ROOT, Command

TINY = [
    *("trainer=cpu", "data.train_per_class=8", "data.select_per_class=4", "data.test_per_class=4"),
    *("data.image_size=32", "data.batch_size=20"),
    *("backbone.args.channels=[8,16,24,32]", "finetune.epochs=2", "edit.alpha=[0,1,5,20]"),
    *("sae.seed=0,1", "sae.epochs=3", "sae.dictionary_size=24", "sae.batch_size=32"),
]


def reproduce(folder: Path) -> str:
    arguments = ["--quick", "--on", "scenes", "--only", "suppression", "--output-dir", str(folder), *TINY]
    process = Command("experiments.reproduce", arguments, folder, {"PYTHONPATH": str(ROOT)})
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    return out


def test_one_experiment_and_its_page(tmp_path: Path) -> None:
    assert "(was there)" not in reproduce(tmp_path)
    paper = tmp_path / "paper-quick"
    record = read_record(paper / "suppression" / "findings.json")
    assert record["quick"]
    # The user's settings have the last word over the quick ones.
    assert record["testbeds"][0] | {"quick": 0} == {
        **{
            "name": "scenes",
            "title": "small ResNet, drawn scenes",
            "config": "",
            "data": "",
            "weights": "",
            "quick": 0,
        },
        **{"images": {"train": 80, "select": 40, "test": 40}, "classes": 10, "seeds": 2},
    }
    for picture in record["pictures"]:
        for kind in ("pdf", "svg", "png"):
            assert (paper / "suppression" / f"{picture['name']}.{kind}").stat().st_size > 5000
    edits = read_table(paper / "suppression" / "edits.csv")
    assert len(edits) == 2 * 10
    measured = {one["claim"]: one["value"] for one in record["measured"]}
    assert measured["suppression.separates"] == edits.groupby("seed")["separates"].mean().mean()
    page = (paper / "index.html").read_text(encoding="utf-8")
    assert "This is a quick pass" in page
    assert all(f'src="suppression/{picture["name"]}.png"' in page for picture in record["pictures"])
    claims = read_table(paper / "claims.csv")
    assert claims["id"].tolist() == [one["claim"] for one in record["measured"]]
    assert claims["value"].tolist() == list(measured.values())
    # Once more: nothing is made again.
    written = (paper / "suppression" / "findings.json").stat().st_mtime_ns
    assert "(was there)" in reproduce(tmp_path)
    assert (paper / "suppression" / "findings.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_layers_of_a_network(tmp_path: Path) -> None:
    """Two sites, each with latents by margin and by effect; the inner one is a map."""
    few = ["sae.seed=0", "sweep.sites=2", "compare.images=4", "edit.images=4", "edit.resolution=2"]
    few += ["capture.positions=4"]
    arguments = ["--quick", "--on", "scenes", "--output-dir", str(tmp_path), *TINY, *few]
    process = Command("experiments.beyond.layers", arguments, tmp_path, {"PYTHONPATH": str(ROOT)})
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    folder = tmp_path / "paper-quick" / "layers"
    table = read_table(folder / "sites.csv")
    assert table["depth"].tolist() == [0] * 4 + [1] * 4
    edits = [(select, method) for select in ("effect", "margin") for method in ("gate", "rank_one")]
    for rows in (table[:4], table[4:]):
        assert sorted(zip(rows["select"], rows["method"], strict=True)) == edits
    assert (table["positions"] > 1).tolist() == [True] * 4 + [False] * 4
    # The network's predictions do not depend on site or latents.
    assert len(list((tmp_path / "artifacts" / "predictions").iterdir())) == 1
    # The SAE of a site does not depend on how latents are chosen.
    assert table["fve"].nunique() == 2
    record = read_record(folder / "findings.json")
    assert {one["claim"] for one in record["measured"]} == {
        f"layers.{name}" for name in ("deeper", "class_bound", "inner", "effect")
    }
    assert [picture["name"] for picture in record["pictures"]] == ["depth"]
    assert "2 of the network's 11 sites" in record["paragraph"]
