"""Imagenette, wherever it lies."""

import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image

from salve.data.imagenette import ImagenetteData
from salve.data.layout import IMAGENETTE_CLASSES
from salve.data.transforms import Preprocess
from salve.types import UserError
from tests.unit.test_data_folders import fill, refused

REPOSITORY = Path(__file__).parents[2]
IMAGENETTE = Path(os.environ.get("SALVE_IMAGENETTE", REPOSITORY / "../shared/datasets/imagenette2-224"))


def imagenette(root: Path, **options: Any) -> ImagenetteData:
    return ImagenetteData(root, batch_size=4, **options)


def test_class_names_are_torchvisions() -> None:
    theirs = torchvision.datasets.Imagenette._WNID_TO_CLASS
    assert {wnid: names[0] for wnid, names in theirs.items()} == IMAGENETTE_CLASSES


@pytest.mark.parametrize("place", ["", "imagenette2-160", "imagenette2-224"])
def test_the_folder_is_found_where_it_may_lie(tmp_path: Path, place: str) -> None:
    fill(tmp_path / place, tuple(IMAGENETTE_CLASSES), train=1, val=2)
    data = imagenette(tmp_path, size="160px")
    data.check()
    assert data.classes == tuple(IMAGENETTE_CLASSES.values())
    assert data.classes[4] == "church"
    assert len(data.raw("select")) == len(data.raw("test")) == 10


def test_another_size_or_several_copies_are_not_taken_silently(tmp_path: Path) -> None:
    fill(tmp_path / "imagenette2-320", tuple(IMAGENETTE_CLASSES), train=1, val=2)
    sentence = refused(imagenette(tmp_path, size="160px"))
    assert "holds no Imagenette (160px)" in sentence
    assert "data.download=true" in sentence
    imagenette(tmp_path, size="320px").check()
    for copy in ("imagenette2-mine", "imagenette2-yours"):
        fill(tmp_path / copy, tuple(IMAGENETTE_CLASSES), train=1, val=2)
    assert "holds no Imagenette (160px)" in refused(imagenette(tmp_path, size="160px"))


def test_nothing_there_and_wrong_values(tmp_path: Path) -> None:
    assert "imagenette2/" in refused(imagenette(tmp_path / "nowhere", size="full"))
    with pytest.raises(UserError, match="choose from full, 320px, 160px"):
        imagenette(tmp_path, size="224px")
    assert "use data=folder" in refused(imagenette(fill(tmp_path)))


def test_download_goes_through_torchvision_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(root: Path, size: str, download: bool) -> None:
        calls.append((size, download))
        fill(root / "imagenette2-160", tuple(IMAGENETTE_CLASSES), train=1, val=2)

    monkeypatch.setattr(torchvision.datasets, "Imagenette", download)
    data = imagenette(tmp_path / "new", download=True)
    assert calls == []
    data.prepare_data()
    data.check()
    assert len(data.labels("train")) == 10
    imagenette(tmp_path / "new", download=True).check()
    assert calls == [("160px", True)]


def test_a_failed_download_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", download)
    sentence = refused(imagenette(tmp_path, download=True))
    assert "The download of imagenette into" in sentence
    assert "no route to host" in sentence


def file_mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason=f"no Imagenette at {IMAGENETTE}: set SALVE_IMAGENETTE")
def test_the_real_imagenette() -> None:
    data = imagenette(IMAGENETTE)
    data.check()
    data.bind(Preprocess(64, 64))
    assert data.classes == tuple(IMAGENETTE_CLASSES.values())
    # The published counts of the v2 split.
    held_out = torch.cat([data.labels("select"), data.labels("test")])
    assert (len(data.labels("train")), len(held_out)) == (9469, 3925)
    halves = data.labels("select").bincount() - data.labels("test").bincount()
    assert halves.shape == (10,)
    assert halves.abs().max() <= 1
    raw = data.raw("train")
    one_channel = next(i for i in range(len(raw)) if file_mode(raw.root / raw.folder / raw.files[i].path) == "L")
    image, _ = data.dataset("train")[one_channel]
    shown = data.preprocess.denormalise(image[None])[0]  # type: ignore[union-attr]
    torch.testing.assert_close(shown[0], shown[2])
    assert next(iter(data.loader("test", indices=range(0, 1900, 316))))[0].shape == (4, 3, 64, 64)


def test_it_maps_itself_to_imagenets_units(tmp_path: Path) -> None:
    data = imagenette(fill(tmp_path, tuple(IMAGENETTE_CLASSES), train=1, val=2), outputs="imagenet")
    theirs = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    assert data.outputs is not None
    assert [theirs[unit] for unit in data.outputs] == list(data.classes) == list(IMAGENETTE_CLASSES.values())
    assert imagenette(tmp_path).outputs is None
    some = imagenette(tmp_path, classes=["n03028079", "n01440764"], outputs="imagenet")
    assert (some.classes, some.outputs) == (("church", "tench"), (497, 0))
