"""Marks on images: where they lie, how often, and that nothing else changes."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from salve.data.concepts import ConceptsData
from salve.data.folders import FolderData
from salve.data.marked import MarkedData
from salve.data.marks import painted
from salve.data.transforms import Preprocess, to_uint8_tensor
from salve.data_settings import LOOKS, MarkKind, MarkSettings
from salve.run.explain import conf_dir
from salve.types import Split, UserError

KINDS = get_args(MarkKind)


def mark(kind: str, **changes: Any) -> MarkSettings:
    """The settings of a file of ``conf/mark``."""
    chosen = yaml.safe_load((conf_dir() / "mark" / f"{kind}.yaml").read_text(encoding="utf-8"))
    return MarkSettings(**{**chosen, **changes})


@pytest.fixture(scope="module")
def scenes() -> ConceptsData:
    return ConceptsData(batch_size=4, image_size=32, train_per_class=20, select_per_class=2, test_per_class=2)


def pixels(raw: Any) -> torch.Tensor:
    return torch.stack([to_uint8_tensor(raw[i][0]) for i in range(len(raw))])


@pytest.mark.parametrize("place", ["upper_left", "lower_right", "centre", "random"])
@pytest.mark.parametrize("kind", ["text", "logo", "border"])
def test_a_mark_lies_in_what_the_usual_crop_keeps(kind: str, place: str) -> None:
    image = np.full((3, 100, 160), 128, np.uint8)
    changed = (painted(image, mark(kind, place=place), np.random.default_rng(0)) != image).any(0)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    # a resize to 256 and a crop of 224 pixels keep the middle 87.5 of 100 rows, and of 160 columns those about 80
    assert 6 <= rows[0] <= rows[-1] < 94
    assert 36 <= columns[0] <= columns[-1] < 124
    if place in ("upper_left", "lower_right") and kind != "border":
        upper_left = place == "upper_left"
        assert (rows[-1] < 70) == (columns[0] < 60) == upper_left
    width, height = len(columns), len(rows)
    expected = {"text": 0.5 * 87 * 0.94, "logo": 0.2 * 87 * 0.94, "border": 87}[kind]
    assert width == pytest.approx(expected, abs=2)
    assert height == pytest.approx(width, abs=2) if kind != "text" else height < width / 2


def test_tint_and_noise_cover_all_of_an_image() -> None:
    image = np.full((3, 40, 60), 128, np.uint8)
    tinted = painted(image, mark("tint", colour="#ff0000", strength=0.25), np.random.default_rng(0))
    assert (tinted == np.array([160, 96, 96])[:, None, None]).all()  # 128 + 0.25 · (255 − 128), 0.75 · 128
    noise = painted(image, mark("noise", strength=0.1), np.random.default_rng(0)).astype(float) - 128
    assert noise.std() == pytest.approx(25.5, rel=0.05)
    assert abs(noise.mean()) < 1


def test_rates_are_those_of_the_classes_and_of_the_split(scenes: ConceptsData) -> None:
    rates = {"clinic": 1.0, "reef": 0.0}
    data = MarkedData(scenes, mark("text", rates=rates, rate=0.5, held_out_rates={"reef": 1.0}, held_out_rate=0.0))
    of_class = torch.as_tensor(data.labels("train"))
    shown = data.groups("train").of_image.double()
    clinic, reef = data.classes.index("clinic"), data.classes.index("reef")
    assert shown[of_class == clinic].mean() == 1
    assert shown[of_class == reef].mean() == 0
    others = (of_class != clinic) & (of_class != reef)
    assert shown[others].mean() == pytest.approx(0.5, abs=4 * 0.5 / 160**0.5)
    assert torch.equal(data.groups("test").of_image == 1, torch.as_tensor(data.labels("test")) == reef)
    more = MarkedData(scenes, mark("logo", rates=rates, rate=0.8)).marked("train")
    assert (more >= data.marked("train")).all(), "at a higher rate, no image loses the mark"
    assert not torch.equal(more, MarkedData(scenes, mark("logo", rates=rates, rate=0.8, seed=1)).marked("train"))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_images_differ_in_the_mark_alone(scenes: ConceptsData, kind: str) -> None:
    data = MarkedData(scenes, mark(kind, place="random", rates={"clinic": 1.0}))
    pairs, plain, shown = data.pairs("test"), pixels(scenes.raw("test")), data.marked("test")
    without, with_it, own = pixels(pairs.without), pixels(pairs.with_mark), pixels(data.raw("test"))
    assert torch.equal(without, plain)
    assert (with_it != plain).flatten(1).any(1).all()
    assert torch.equal(own, torch.where(shown[:, None, None, None], with_it, plain))
    assert 0 < shown.sum() < len(shown)
    first = data.first("test", 3)
    assert torch.equal(pixels(first), own[:3])


def test_images_of_any_kind_are_marked_and_files_stay_as_they_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i, mode in enumerate(("L", "RGBA")):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), "grey").convert(mode).save(tmp_path / split / name / f"{i}.png")
    plain = FolderData(tmp_path, batch_size=2)
    data = MarkedData(plain, mark("logo", rates={"cat": 1.0}, rate=0.0))
    data.bind(Preprocess(24, 27))
    images, labels = next(iter(data.loader("train", batch_size=4)))
    assert images.shape == (4, 3, 24, 24)
    assert [len(image.unique()) > 3 for image in images] == [label == 0 for label in labels]
    assert "The mark goes with no class" not in " ".join(data.remarks())


def test_the_fingerprint_holds_what_changes_images_and_nothing_else(scenes: ConceptsData) -> None:
    given: dict[str, Any] = {
        "kind": "logo",
        "rates": {"clinic": 0.9},
        "rate": 0.1,
        "held_out_rates": {"reef": 0.3},
        "held_out_rate": 0.2,
    }
    others: dict[str, Any] = {
        "kind": "border", "rates": {"clinic": 0.8}, "rate": 0.2, "held_out_rates": {"reef": 0.4}, "held_out_rate": 0.3,
        "seed": 1, "size": 0.3, "place": "centre", "colour": "blue", "strength": 0.5, "text": "other",
    }  # fmt: skip
    assert others.keys() == {field.name for field in fields(MarkSettings)}
    before = MarkedData(scenes, MarkSettings(**given)).fingerprint()
    assert before != scenes.fingerprint()
    for name, value in others.items():
        after = MarkedData(scenes, MarkSettings(**{**given, name: value})).fingerprint()
        assert (after == before) == (name == "text"), f"{name}: a logo has no text, but all else changes it"
    assert LOOKS.keys() == set(KINDS)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rates": {"clinic": 1.5}}, "mark.rates gives 1.5 to 'clinic', which must be at most 1"),
        ({"held_out_rates": {"clinic": -1}}, "mark.held_out_rates gives -1 to 'clinic', which must not be negative"),
        ({"rates": {"clinc": 0.5}}, "mark.rates names the class 'clinc', which is none of the 10; near it: 'clinic'"),
        ({"colour": "gren"}, "mark.colour=gren is neither a colour's name nor like '#ff8800'"),
        ({"text": " "}, "has nothing to print"),
        ({"text": "日本"}, "has letters that the font lacks"),
    ],
)
def test_what_cannot_be_is_refused(scenes: ConceptsData, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        MarkedData(scenes, mark("text", **changes)).check()


def test_a_preprocessing_that_would_cut_the_mark_off_is_refused(scenes: ConceptsData) -> None:
    data = MarkedData(scenes, mark("text"))
    data.bind(Preprocess(224, 256))
    with pytest.raises(UserError, match=r"crops more than a mark .*resize=256 or less"):
        data.bind(Preprocess(224, 300))
    splits: tuple[Split, ...] = ("train", "select", "test")
    assert all(len(data.raw(split)) == len(data.labels(split)) for split in splits)
