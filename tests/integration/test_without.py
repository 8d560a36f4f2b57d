"""A classifier trained without some classes: none of their images is seen, and their outputs stay."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from salve.artifacts import Artifact
from salve.backbones import Classifier
from salve.types import UserError
from tests.integration.conftest import Start


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """By split, the labels that a training sees."""
    found: dict[str, list[int]] = {"train": [], "select": []}
    plain = Classifier._follow

    def follow(self: Classifier, split: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        found[split] += labels.tolist()
        plain(self, split, loss, logits, labels)

    monkeypatch.setattr(Classifier, "_follow", follow)
    return found


def names(artifact: Artifact) -> list[str]:
    return list(artifact.record("classifier.json")["classes"])


def counts(labels: Sequence[int]) -> dict[int, int]:
    return {label: labels.count(label) for label in set(labels)}


@pytest.mark.parametrize("mode", ["full", "probe"])
def test_no_image_of_the_class_is_seen_and_its_output_stays(
    mode: str, start: Start, tmp_path: Path, seen: dict[str, list[int]]
) -> None:
    more: list[Any] = [f"finetune={mode}", "finetune.epochs=2", "stages=[finetune]", "data.batch_size=8"]
    [whole] = start(tmp_path, *more).values()
    storm, castle = names(whole).index("storm"), 0
    assert storm != castle
    assert set(seen["train"]) == set(range(10))
    for labels in seen.values():
        labels.clear()
    left_out = [names(whole)[castle], "storm"]
    [without] = start(tmp_path, *more, f"finetune.without=[{','.join(left_out)}]").values()
    others = set(range(10)) - {storm, castle}
    assert counts(seen["train"]) == dict.fromkeys(others, 2 * 8)  # each image once in each epoch
    assert counts(seen["select"]) == dict.fromkeys(others, 2 * 4)
    assert without.key != whole.key
    assert without.record("classifier.json")["without"] == left_out
    assert "without" not in whole.record("classifier.json")
    before, after = load_file(whole.file("model.safetensors")), load_file(without.file("model.safetensors"))
    assert {name: one.shape for name, one in before.items()} == {name: one.shape for name, one in after.items()}
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    # The order of the names makes no other classifier.
    assert start(tmp_path, *more, f"finetune.without=[storm,{left_out[0]}]")["classifier"].reused


def test_classes_that_cannot_be_left_out_are_refused(
    start: Start, tmp_path: Path, whole_run: tuple[Path, dict[str, Artifact]]
) -> None:
    with pytest.raises(UserError, match=r"finetune\.without names sturm, which is no class; choose from .*storm"):
        start(tmp_path, "finetune.without=[storm,sturm]", "stages=[finetune]")
    classes = names(whole_run[1]["classifier"])
    with pytest.raises(UserError, match=r"leaves 1 of 10 classes to train on; at least two must stay"):
        start(tmp_path, f"finetune.without=[{','.join(classes[1:])}]", "stages=[finetune]")
    weights = whole_run[1]["classifier"].file("model.safetensors")
    with pytest.raises(UserError, match=r"these weights fit the data and are not trained"):
        start(tmp_path, "finetune.without=[storm]", f"backbone.weights={weights}", "stages=[finetune]")
    more = ["finetune=probe", "trainer.memory=1e-6", "stages=[finetune]"]
    with pytest.raises(UserError, match=r"need activations that fit into memory; raise trainer\.memory"):
        start(tmp_path, "finetune.without=[storm]", *more)
    assert not (tmp_path / "store" / "artifacts" / "classifier").exists()
