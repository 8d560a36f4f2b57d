"""Evaluation sets: which images and labels they hold, and what is measured on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from salve.data import evaluation
from salve.data.base import ImageData, RawImages
from salve.data.concepts import ConceptsData
from salve.data.evaluation import EvaluationSet, evaluation_sets
from salve.data.folders import FolderData
from salve.data.groups import Groups
from salve.metrics.grouped import flip_rate, group_accuracy
from salve.stages.on_sets import measured_on
from salve.types import UserError
from tests.unit.test_data_folders import fill, write

FEW = {"batch_size": 4, "image_size": 32, "train_per_class": 1, "select_per_class": 1, "test_per_class": 2}


@pytest.fixture(scope="module")
def scenes() -> ConceptsData:
    return ConceptsData(**FEW)  # type: ignore[arg-type]


def source(settings: Mapping[str, Any]) -> ImageData:
    arguments = {name: value for name, value in settings.items() if name != "data"}
    return (
        ConceptsData(**{**FEW, **arguments})
        if settings["data"] == "concepts"
        else FolderData(**arguments, batch_size=2)
    )


def sets(data: ImageData, *entries: Any) -> tuple[EvaluationSet, ...]:
    return evaluation_sets(entries, data, source)


def test_the_data_s_own_images_and_pairs(scenes: ConceptsData) -> None:
    test, pairs = sets(scenes, "test", "pairs")
    assert (test.name, pairs.name, test.paired, pairs.paired) == ("test", "pairs", False, True)
    assert torch.equal(test.labels, scenes.labels("test"))
    assert torch.equal(pairs.labels, scenes.labels("test").repeat(2))
    of_scenes, groups = scenes.pairs("test"), pairs.groups
    assert groups is not None
    assert groups.of_image.tolist() == [0] * 20 + [1] * 20
    for i in (0, 7, 19):
        for at, side in ((i, of_scenes.without), (20 + i, of_scenes.with_mark)):
            image, other = pairs.raw[at][0], side[i][0]
            assert isinstance(image, torch.Tensor)
            assert isinstance(other, torch.Tensor)
            assert torch.equal(image, other)
    assert len({test.digest(), pairs.digest()}) == 2
    towers = ConceptsData(**{**FEW, "shortcut": "tower"})  # type: ignore[arg-type]
    assert [one.digest() for one in sets(towers, "test", "pairs")] != [test.digest(), pairs.digest()]
    faster = ConceptsData(**{**FEW, "batch_size": 9})  # type: ignore[arg-type]
    assert [one.digest() for one in sets(faster, "test", "pairs")] == [test.digest(), pairs.digest()]


def test_a_corruption_keeps_labels_and_groups(scenes: ConceptsData, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def corrupted(raw: RawImages, *what: Any) -> RawImages:
        asked.append(what)
        return raw

    monkeypatch.setattr(evaluation, "corrupted", corrupted)
    fog, harsher = sets(scenes, "fog-3", "jpeg_compression-5")
    assert asked == [("fog", 3, 0), ("jpeg_compression", 5, 0)]
    assert torch.equal(fog.labels, scenes.labels("test"))
    assert fog.groups is not None
    assert fog.digest() != harsher.digest()


def test_folders_and_other_sources_are_matched_by_the_names_of_classes(tmp_path: Path) -> None:
    data = FolderData(fill(tmp_path / "own"), batch_size=2, classes={"dog": "a dog", "cat": "a cat"})
    for name, count in (("cat", 1), ("dog", 2), ("emu", 3)):
        for i in range(count):
            write(tmp_path / "sketches" / name / f"{i}.png")
    (folder,) = sets(data, str(tmp_path / "sketches"))
    assert (folder.name, folder.labels.tolist()) == ("sketches", [0, 0, 1])
    before = folder.digest()
    write(tmp_path / "sketches" / "dog" / "1.png", colour="blue")
    assert sets(data, str(tmp_path / "sketches"))[0].digest() != before

    fill(tmp_path / "other", ("ant", "cat", "dog"), val=4)
    entry = {"data": "folder", "root": tmp_path / "other", "classes": {"ant": "ant", "cat": "a cat", "dog": "a dog"}}
    (other,) = sets(data, {**entry, "name": "others"})
    assert (other.name, other.labels.tolist()) == ("others", [1, 1, 0, 0])
    names = [file.path for file in source(entry).raw("test").files]  # type: ignore[attr-defined]
    assert [other.raw.indices[i] for i in range(4)] == [i for i, name in enumerate(names) if "ant" not in name]  # type: ignore[attr-defined]
    assert [other.raw[i][1] for i in range(4)] == other.labels.tolist()  # not those of the source
    assert sets(data, {**entry, "take": "train"})[0].labels.tolist() == [1] * 3 + [0] * 3


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("nowhere", "evaluate has 'nowhere', which is no folder; choose a folder with a folder for each class, test"),
        ("fgo-3", "it names 'fgo', which is none of the 15; near it: 'fog'"),
        ("fog-9", "the severities of fog are 1 .mild. to 5 .harsh., such as fog-3"),
        ("pairs", "the folder data cannot show an image with and without a shortcut"),
        ("LACKING", "which has a folder for none of the classes 'cat', 'dog'; its folders are 'emu'"),
        ("EMPTY", "which has no image of 'cat', 'dog'"),
        ({"data": "concepts"}, "concepts has none of the classes 'cat', 'dog'; its classes are 'harbour'"),
        ({"data": "concepts", "take": "val"}, "There is no split 'val'"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path: Path, entry: Any, says: str) -> None:
    write(tmp_path / "lacking" / "emu" / "0.png")
    for name in ("cat", "dog"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    data = FolderData(fill(tmp_path / "own"), batch_size=2)
    given = {"LACKING": str(tmp_path / "lacking"), "EMPTY": str(tmp_path / "empty")}.get(str(entry), entry)
    with pytest.raises(UserError, match=says):
        sets(data, given)


def test_a_set_without_some_classes_says_so(tmp_path: Path) -> None:
    data = FolderData(fill(tmp_path / "own", ("ant", "cat", "dog")), batch_size=2)
    for name in ("cats", "dog"):
        write(tmp_path / "sketches" / name / "0.png")
    (tmp_path / "sketches" / "ant").mkdir()
    (folder,) = sets(data, str(tmp_path / "sketches"))
    assert folder.labels.tolist() == [2]
    assert folder.remark == (
        "The evaluation set sketches has no image of 'ant', 'cat', of which it says nothing; its folders 'cats' are "
        "named like no class and were not read."
    )
    table = measured_on(folder, {"": torch.tensor([2])}, data.classes).set_index("class")
    assert table.loc["dog", "accuracy"] == 1
    assert np.isnan(table.loc["cat", "accuracy"])
    (other,) = sets(data, {"data": "folder", "root": fill(tmp_path / "other", ("cat", "emu"), val=4)})
    assert set(other.labels.tolist()) == {1}
    assert other.remark == "The evaluation set folder has no image of 'ant', 'dog', of which it says nothing."
    assert not sets(data, "test")[0].remark


def test_two_sets_of_one_name_are_refused(scenes: ConceptsData) -> None:
    with pytest.raises(UserError, match="evaluate has two sets called 'again'"):
        sets(scenes, *({"data": "concepts", "name": "again", "seed": seed} for seed in (1, 2)))


@pytest.mark.parametrize("name", ["train", "select", "test", "pairs"])
def test_the_runs_own_images_keep_their_names(scenes: ConceptsData, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"evaluate has a set called {name}, the name of images of the run's own data"):
        sets(scenes, {"data": "concepts", "name": name})
    write(tmp_path / "other" / name / scenes.classes[0] / "0.png")
    assert sets(scenes, str(tmp_path / "other" / name))[0].name == f"other-{name}"


def test_accuracies_and_flips_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (30,), generator=generator).repeat(2)  # the third class has no images
    said = {name: torch.randint(3, (60,), generator=generator) for name in ("", "edited")}
    shown = torch.arange(2).repeat_interleave(30)
    images = EvaluationSet("pairs", [], labels, Groups("tag", ("absent", "present"), shown), str, paired=True)
    table = measured_on(images, said, ("a", "b", "c")).fillna(-1)
    assert len(table) == 2 * (1 + 3 + 6)
    for row in table.to_dict("records"):
        wanted = [
            i
            for i in range(60)
            if row["class"] in ("", "abc"[labels[i]])
            and row["attribute_value"] in ("", ("absent", "present")[shown[i]])
        ]
        right = [bool(said[row["target"]][i] == labels[i]) for i in wanted]
        assert row["images"] == len(wanted)
        assert row["accuracy"] == pytest.approx(sum(right) / len(right) if right else -1)
        flips = [bool(said[row["target"]][i] != said[row["target"]][i + 30]) for i in wanted if i < 30]
        known = not row["attribute_value"] and flips
        assert row["flips"] == pytest.approx(sum(flips) / len(flips) if known else -1)


def test_unknown_groups_are_left_out() -> None:
    predictions, labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    accuracy, counts = group_accuracy(predictions, labels, torch.tensor([0, -1, 2, 2]), 4)
    assert counts.tolist() == [1, 0, 2, 0]
    assert pd.Series(accuracy.tolist()).fillna(-1).tolist() == [1, -1, 0.5, -1]
    assert float(flip_rate(predictions, labels)) == 0.5
