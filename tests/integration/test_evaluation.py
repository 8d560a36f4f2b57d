"""Evaluation sets in a run: what the table says is what the edited networks do on those images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console

from salve.artifacts import Artifact, Store, save_tensors
from salve.data import ConceptsData, Preprocess
from salve.editing import apply_edit_file, load_edit_file
from salve.processes.ranks import Ranks
from salve.report.metrics import run_metrics
from salve.report.sections.evaluation import evaluation
from salve.results import Artifacts
from salve.run.build import build_context
from salve.stages import StageContext, evaluate_sets
from salve.stages.on_sets import Weights, predictions
from salve.types import UserError
from tests.integration.test_keys import composed
from tests.integration.test_pipeline import plain_model

CLOSED = "{data: concepts, seed: 3, image_size: 32, test_per_class: 2, clutter: 0, name: other}"


def context_of(store: Path, *overrides: str) -> StageContext:
    return build_context(composed(*overrides), Store(store), lambda _: DummyLogger(), Console(quiet=True), Ranks("cpu"))


def evaluated(store: Path, found: dict[str, Artifact], *overrides: str, edited: bool = True) -> Artifact:
    return evaluate_sets(context_of(store, *overrides), found["classifier"], found["control"] if edited else None)


def test_the_original_and_every_edited_network_are_measured_on_every_set(
    tmp_path: Path, whole_run: tuple[Path, dict[str, Artifact]]
) -> None:
    found = whole_run[1]
    artifact = evaluated(tmp_path, found, f"evaluate=[test,pairs,{CLOSED}]")
    table = artifact.table("evaluation.csv")
    model = plain_model(found)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = ConceptsData(batch_size=40, image_size=32, train_per_class=8, select_per_class=4, test_per_class=4)
    transform = Preprocess(32, None).eval_transform()
    other = ConceptsData(batch_size=20, image_size=32, seed=3, test_per_class=2, clutter=0)
    pairs = data.pairs("test")
    images: dict[str, list[tuple[Any, int]]] = {
        "test": [data.raw("test")[i] for i in range(40)],
        "pairs": [side[i] for side in (pairs.without, pairs.with_mark) for i in range(40)],
        "other": [other.raw("test")[i] for i in range(20)],
    }
    files = found["control"].table("summary.csv").set_index("target")["edit_file"]
    for target in ("", "clinic", "circus"):
        if target:
            edit_file = load_edit_file(found["control"].file(files[target]))
            model.load_state_dict(apply_edit_file(edit_file, state))
        for name, items in images.items():
            labels = torch.tensor([label for _, label in items])
            with torch.no_grad():
                said = model(torch.stack([transform(image) for image, _ in items])).argmax(1)
            mine = table[(table["set"] == name) & (table["target"] == target) & (table["attribute_value"] == "")]
            right = (said == labels).double()
            expected = [right.mean(), *(right[labels == k].mean() for k in range(10))]
            assert mine["accuracy"].tolist() == pytest.approx([float(value) for value in expected])
            if name == "pairs":
                assert mine["flips"].iloc[0] == pytest.approx(float((said[:40] != said[40:]).double().mean()))
    assert set(table["target"]) == {"", *files.index}

    metrics = run_metrics({"evaluation": artifact.path})
    groups = table[(table["set"] == "pairs") & (table["target"] == "") & (table["attribute_value"] != "")]
    assert metrics["pairs_worst_group"] == groups["accuracy"].min()
    assert {"pairs_flips", "pairs_flips_edited", "other_accuracy", "other_worst_group_edited"} <= metrics.keys()
    section = evaluation(Artifacts({"evaluation": artifact.path}))
    assert section is not None
    assert any("Set test has no image of" in getattr(block, "text", "") for block in section.blocks)
    assert evaluation(Artifacts({})) is None

    same = evaluated(tmp_path, found, f"evaluate=[test,pairs,{CLOSED}]", "data.batch_size=7")
    assert same.reused
    keys = {artifact.key, evaluated(tmp_path, found, "evaluate=[test]").key}
    keys |= {evaluated(tmp_path, found, "evaluate=[test]", "data.shortcut=flag", edited=False).key}
    assert len(keys) == 3


def test_networks_that_differ_before_the_head_run_whole_images(
    tmp_path: Path, whole_run: tuple[Path, dict[str, Artifact]]
) -> None:
    context = context_of(tmp_path, "evaluate=[select]")
    model = plain_model(whole_run[1])
    name = "layer4.0.bn2.bias"
    changed = {name: torch.linspace(-9, 9, len(model.get_parameter(name)))}
    networks: dict[str, Weights] = {"": {}, "changed": changed}
    said = predictions(context, context.cut(whole_run[1]["classifier"]), networks, context.evaluation[0])
    images = torch.cat([batch for batch, _ in context.data.loader("select")])
    with torch.no_grad():
        before = model(images).argmax(1)
        model.load_state_dict({**model.state_dict(), **changed})
        after = model(images).argmax(1)
    assert not torch.equal(before, after)
    assert torch.equal(said[""], before)
    assert torch.equal(said["changed"], after)

    save_tensors(tmp_path / "repaired.safetensors", {**model.state_dict()})
    repair = Artifact("repair", "key", tmp_path, "digest", reused=False)
    artifact = evaluate_sets(context, whole_run[1]["classifier"], repair=repair)
    right = float((after == context.evaluation[0].labels).double().mean())
    metrics = run_metrics({"evaluation": artifact.path})
    assert metrics["select_accuracy_repaired"] == pytest.approx(right)
    assert "select_accuracy_edited" not in metrics
    section = evaluation(Artifacts({"evaluation": artifact.path}))
    assert section is not None
    assert "repaired: flips" in [cell.text for cell in section.blocks[1].header]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{data: nonsense}", "evaluate has a set with data: nonsense; choose data: celeba, cifar100, composed"),
        ("{root: here}", "evaluate has a set that does not say its data; choose data: celeba"),
        ("{data: concepts, name: test}", "evaluate has a set called test, the name of images of the run's own data"),
        ("{data: folder, root: nowhere}", "The evaluation set folder: root=nowhere is no folder"),
        ("{data: folder, root: my/data.v2}", "The evaluation set folder: root=my/data.v2 is no folder"),
        ("{data: folder, root: data.v2}", "The evaluation set folder: root=data.v2 is no folder"),
        ("{data: concepts, take: val}", "The evaluation set concepts: There is no split 'val'"),
        ("{data: concepts, seeds: 3}", "evaluate has a set with data: concepts, which has no setting seeds; it has"),
        ("{data: composed}", "evaluate has a set with data: composed, which does not say root"),
        ("3", "evaluate has 3; an evaluation set is a text, such as test, pairs"),
    ],
)
def test_entries_that_are_no_sets_are_refused(
    tmp_path: Path, whole_run: tuple[Path, dict[str, Artifact]], entry: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        evaluated(tmp_path, whole_run[1], f"evaluate=[{entry}]")
