"""The CIFAR-100 experiment as a user starts it, on a stand-in in the data's own format."""

import os
from pathlib import Path

import pytest

from experiments.salve2025.cifar100.survey import KINDS
from salve.artifacts import read_record, read_table
from tests.integration.commands import ROOT, Command
from tests.integration.standin import CLASSES, GROUPS, write_standin, write_weights

SMALL = [
    "trainer=cpu",
    "backbone.preprocess.size=32",
    "data.num_workers=0",
    "sae.dictionary_size=128",
    "sae.epochs=10",
    "sae.seed=0",
    "edit.alpha=[0,1,2,4,8,20]",
]


def run(folder: Path, *arguments: str, module: str = "salve2025.cifar100") -> tuple[int, str, str]:
    """The command, whose own commands take the stand-in's checksums for CIFAR-100's: status, output, errors."""
    paths = os.pathsep.join(map(str, (folder, ROOT)))
    given = ["--cifar100", str(folder), "--weights", f"cifar100={folder / 'weights.safetensors'}"]
    given += ["--output-dir", str(folder / "out"), *arguments]
    environment = {"PYTHONPATH": paths, "SALVE_IMAGENETTE": ""}
    process = Command(f"experiments.{module}", given, folder, environment)
    out, errors = process.communicate()
    return process.wait(), out, errors


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and the weights, in a folder whose name Hydra would stumble over."""
    folder = tmp_path_factory.mktemp("a stand-in, (small)")
    write_standin(folder, train=6, val=4)
    write_weights(folder / "weights.safetensors", train=6)
    return folder


def test_a_hundred_classes_from_images_to_findings(standin: Path) -> None:
    status, out, errors = run(standin, *SMALL)
    assert status == 0, out + errors
    folder = standin / "out" / "paper" / "cifar100"
    record = read_record(folder / "findings.json")
    (testbed,) = record["testbeds"]  # no Imagenette to compare with is no reason to fail
    assert (testbed["name"], testbed["classes"], testbed["seeds"]) == ("cifar100", CLASSES, 1)
    assert testbed["images"] == {"train": 6 * CLASSES, "select": 2 * CLASSES, "test": 2 * CLASSES}
    assert {one["claim"] for one in record["measured"]} == {"cifar100.separates", "cifar100.sharing"}
    classes = read_table(folder / "classes.csv")
    assert len(classes) == CLASSES
    assert classes["superclass"].nunique() == GROUPS
    assert (classes.groupby("superclass").size() == CLASSES // GROUPS).all()
    assert classes["before"].mean() > 0.5  # the network tells them apart, so that there is something to edit
    assert classes["reached"].any()
    pairs = read_table(folder / "pairs.csv")
    assert len(pairs) == CLASSES * (CLASSES - 1)
    summary = read_table(folder / "summary.csv")
    assert (summary["dictionary_size"] == 128).all()
    assert summary[list(KINDS)].sum(axis=1).tolist() == pytest.approx([1])
    # Of 99 other classes, four are of the same superclass.
    assert summary["sibling_chance"].tolist() == pytest.approx([4 / 99])
    for name in ("sharing", "classes-cifar100", "drift-cifar100"):
        assert all((folder / f"{name}.{kind}").stat().st_size > 5000 for kind in ("pdf", "svg", "png"))


def test_files_that_are_not_cifar100_end_with_a_sentence(standin: Path, tmp_path: Path) -> None:
    """Without the stand-in's checksums they are damaged ones."""
    (standin / "sitecustomize.py").rename(tmp_path / "sitecustomize.py")
    status, out, errors = run(standin, *SMALL, "sae.epochs=11")
    (tmp_path / "sitecustomize.py").rename(standin / "sitecustomize.py")
    assert status == 2
    assert "or a damaged one; set data.download=true to fetch it" in out + errors
    assert errors.splitlines()[-1].startswith("cifar100: the runs on ResNet-18, CIFAR-100 ended with status ")
    assert "Traceback" not in out + errors


@pytest.mark.nightly
def test_fifty_classes_edited_one_after_the_other(standin: Path) -> None:
    """Composition with a hundred classes; the unit tests cover all but the processes."""
    status, out, errors = run(standin, "--on", "cifar100", *SMALL, module="beyond.composition")
    assert status == 0, out + errors
    folder = standin / "out" / "paper" / "composition"
    steps, capacities = (read_table(folder / f"{name}.csv") for name in ("steps", "capacities"))
    assert steps["edits"].max() == capacities["edits"].max() == 50
    assert set(steps[steps["how"] == "joint"]["edits"]) >= {1, 2, 5, 10, 20, 50}
    assert capacities["same_bits"].all()
    record = read_record(folder / "findings.json")
    assert len(record["measured"]) == 4
