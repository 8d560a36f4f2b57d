"""Class folders, as people really have them."""

import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from salve.data.folders import IMAGENETTE_CLASSES, FolderData, ImagenetteData, UnreadableImage
from salve.data.transforms import Preprocess
from salve.types import UserError

REPOSITORY = Path(__file__).parents[2]
IMAGENETTE = Path(os.environ.get("SALVE_IMAGENETTE", REPOSITORY / "../shared/datasets/imagenette2-224"))


def write(path: Path, colour: str = "red", mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).convert(mode).save(path)


def fill(root: Path, classes: tuple[str, ...] = ("cat", "dog"), **counts: int) -> Path:
    for split, count in ({"train": 3, "val": 2} | counts).items():
        for name in classes:
            for i in range(count):
                write(root / split / name / f"{i}.png", colour=("red", "green", "blue")[i % 3])
    return root


def folder(root: Path, **options: Any) -> FolderData:
    data = FolderData(root, batch_size=4, **options)
    data.bind(Preprocess(8, None, mean=(0, 0, 0), std=(1, 1, 1)))
    return data


# -- what is found


def test_classes_labels_and_images_in_sorted_order(tmp_path: Path) -> None:
    data = folder(fill(tmp_path, ("dog", "cat", "Ant")))
    data.check()
    assert data.classes == ("Ant", "cat", "dog")
    assert data.labels("train").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.labels("select").dtype == torch.int64
    images, labels = next(iter(data.loader("train")))
    assert labels.tolist() == [0, 0, 0, 1]
    # fill paints the files red, green, blue, red, ... in the order of their names
    assert images.mean((2, 3)).argmax(1).tolist() == [0, 1, 2, 0]
    assert data.truth("test") is None


def test_agrees_with_torchvisions_image_folder(tmp_path: Path) -> None:
    fill(tmp_path)
    write(tmp_path / "train/cat/deeper/x.JPG")
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    ours = folder(tmp_path)
    assert list(ours.classes) == theirs.classes
    assert sorted(str(tmp_path / "train" / file.path) for file in ours.raw("train").files) == sorted(
        path for path, _ in theirs.samples
    )
    assert ours.labels("train").tolist() == theirs.targets


def test_other_files_are_ignored(tmp_path: Path) -> None:
    before = folder(fill(tmp_path)).fingerprint()
    for name in (".DS_Store", "._0.png", "notes.txt", "Thumbs.db"):
        (tmp_path / "train/cat" / name).write_bytes(b"x")
    (tmp_path / "train" / "readme.md").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    assert len(folder(tmp_path).labels("train")) == 6
    assert folder(tmp_path).fingerprint() == before


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("1", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg"),
     ("L", "jpeg"), ("CMYK", "tif"), ("RGB", "webp"), ("RGB", "bmp"), ("L", "pgm")],
)  # fmt: skip
def test_files_of_every_mode_load(tmp_path: Path, mode: str, suffix: str) -> None:
    fill(tmp_path)
    write(tmp_path / f"train/cat/0.{suffix}", "white", mode)  # sorts among the first two
    data = folder(tmp_path)
    files = data.raw("train").files
    place = [file.path for file in files].index(f"cat/0.{suffix}")
    image, label = data.dataset("train")[place]  # type: ignore[misc]
    assert (image.shape, label) == ((3, 8, 8), 0)
    assert image.min() > 0.98


def test_limit_takes_the_first_of_each_class(tmp_path: Path) -> None:
    fill(tmp_path, val=8)
    limited, whole = folder(tmp_path, limit_per_class=2), folder(tmp_path)
    assert [file.path for file in limited.raw("train").files] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    for split in ("select", "test"):  # the first ones of each part: a limit moves no image from one to the other
        assert limited.labels(split).tolist() == [0, 0, 1, 1]
        assert whole.labels(split).tolist() == [0] * 4 + [1] * 4
        kept, all_files = (data.raw(split).files for data in (limited, whole))
        assert kept == all_files[:2] + all_files[4:6]
    assert limited.fingerprint() != folder(tmp_path).fingerprint()
    assert folder(tmp_path, limit_per_class=99).fingerprint() == folder(tmp_path).fingerprint()
    with pytest.raises(UserError, match="limit_per_class must be at least 1"):
        folder(tmp_path, limit_per_class=0)


def test_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    base = folder(fill(tmp_path / "a")).fingerprint()
    assert folder(fill(tmp_path / "elsewhere" / "b")).fingerprint() == base
    assert FolderData(tmp_path / "a", batch_size=99, num_workers=1).fingerprint() == base

    (tmp_path / "a/train/cat/0.png").rename(tmp_path / "a/train/cat/9.png")
    renamed = folder(tmp_path / "a").fingerprint()
    changed = tmp_path / "elsewhere/b/val/dog/1.png"
    changed.write_bytes(changed.read_bytes() + b"\0")
    resized = folder(tmp_path / "elsewhere/b").fingerprint()
    moved = fill(tmp_path / "c")
    (moved / "train/cat/2.png").rename(moved / "val/cat/2.png")
    assert len({base, renamed, resized, folder(moved).fingerprint()}) == 4


# -- the splits


def paths(data: FolderData, split: Any) -> list[str]:
    raw = data.raw(split)
    return [f"{raw.folder}/{file.path}" for file in raw.files]


@pytest.mark.parametrize(
    ("there", "select", "test"),
    [
        ({"val": 2, "test": 1}, "val", "test"),
        ({"val": 0, "select": 2, "test": 1}, "select", "test"),
    ],
)
def test_folders_of_their_own_are_found(tmp_path: Path, there: dict[str, int], select: str, test: str) -> None:
    data = folder(fill(tmp_path, **there))
    assert paths(data, "train") == [f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert paths(data, "select") == [f"{select}/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)]
    assert paths(data, "test") == [f"{test}/{name}/0.png" for name in ("cat", "dog")]


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_single_held_out_folder_is_divided(tmp_path: Path, name: str) -> None:
    fill(tmp_path, **{"val": 0, name: 10})
    data = folder(tmp_path)
    select, test = paths(data, "select"), paths(data, "test")
    assert len(select) == len(test) == 10
    assert sorted(select + test) == [f"{name}/{c}/{i}.png" for c in ("cat", "dog") for i in range(10)]
    assert data.labels("select").tolist() == data.labels("test").tolist() == [0] * 5 + [1] * 5
    assert paths(folder(tmp_path), "select") == select

    others = [folder(tmp_path, split_seed=1), folder(tmp_path, select_share=0.3)]
    assert paths(others[0], "select") != select
    assert [len(paths(others[1], split)) for split in ("select", "test")] == [6, 14]
    assert len({each.fingerprint() for each in (data, *others)}) == 3


def test_a_divided_folder_needs_two_images_of_each_class(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "val/dog/1.png").unlink()
    assert "val: too few held-out images of 'dog'" in refused(folder(tmp_path))


def test_folders_with_other_names(tmp_path: Path) -> None:
    for name in ("train", "val"):
        fill(tmp_path).joinpath(name).rename(tmp_path / f"my {name}")
    fill(tmp_path, val=4)
    data = folder(tmp_path, splits={"train": "my train", "test": "my val"})  # one held-out folder is divided
    assert paths(data, "train")[0] == "my train/cat/0.png"
    assert sorted(paths(data, "select") + paths(data, "test")) == [
        f"my val/{c}/{i}.png" for c in ("cat", "dog") for i in (0, 1)
    ]
    own = folder(tmp_path, splits={"train": "train", "select": "my val", "test": "val"})
    assert [len(paths(own, split)) for split in ("train", "select", "test")] == [6, 4, 8]


def test_split_folders_that_are_not_there_or_not_apart_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    sentence = refused(folder(tmp_path, splits={"train": "training", "test": "val"}))
    assert "data.splits names 'training' for train, which is no folder" in sentence
    assert "the folders there are 'train', 'val'" in sentence
    for splits in ({"train": "train"}, {"test": "val"}, {"train": "train", "val": "val"}):
        with pytest.raises(UserError, match=r"such as \{train: training, test: validation\}"):
            folder(tmp_path, splits=splits)
    (tmp_path / "again").symlink_to(tmp_path / "train")
    for same in ("train", "again"):
        assert "are one folder" in refused(folder(tmp_path, splits={"train": "train", "test": same}))
    fill(tmp_path, select=1, test=1)
    assert "'select', 'val', 'test' beside train" in refused(folder(tmp_path))
    with pytest.raises(UserError, match=r"data.select_share must lie between 0 and 1"):
        folder(tmp_path, select_share=1)


# -- what is refused


def refused(data: FolderData) -> str:
    with pytest.raises(UserError) as caught:
        data.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    assert "nowhere is no folder" in refused(folder(tmp_path / "nowhere"))
    assert "has no folder 'train'" in refused(folder(tmp_path))
    assert "it holds no folders" in refused(folder(tmp_path))
    (tmp_path / "train").mkdir()
    assert "has no val beside train" in refused(folder(tmp_path))
    assert "the folders there are 'train'" in refused(folder(tmp_path))
    (tmp_path / "val").mkdir()
    assert "at least two" in refused(folder(tmp_path))


@pytest.mark.parametrize("root", ["", None])
def test_no_root_at_all(root: str | None) -> None:
    for kind in (FolderData, ImagenetteData):
        with pytest.raises(UserError, match=r"data\.root is not set"):
            kind(root, batch_size=1)  # type: ignore[arg-type]


def test_classes_that_do_not_match_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    write(tmp_path / "train/emu/0.png")
    assert "val lacks 'emu'" in refused(folder(tmp_path))
    write(tmp_path / "val/emu/0.png")
    write(tmp_path / "val/fox/0.png")
    assert "train lacks 'fox'" in refused(folder(tmp_path))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(tmp_path: Path, split: str) -> None:
    fill(tmp_path)
    for name in ("train", "val"):
        write(tmp_path / name / "emu/0.png")
    (tmp_path / split / "emu/0.png").rename(tmp_path / split / "emu/0.txt")
    sentence = refused(folder(tmp_path))
    assert "class 'emu' has no image" in sentence
    assert f"{split}/emu" in sentence


def test_empty_files_and_broken_links_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "train/dog/1.png").write_bytes(b"")
    sentence = refused(folder(tmp_path))
    assert "0 bytes" in sentence
    assert "'dog/1.png'" in sentence
    (tmp_path / "train/dog/1.png").unlink()
    (tmp_path / "train/dog/1.png").symlink_to(tmp_path / "gone.png")
    assert "dog/1.png" in refused(folder(tmp_path))


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)  # as PNG or JPEG
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "text":
        path.write_text("this is not an image")
    else:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("how", ["truncated", "text", "header only"])
def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path, how: str, suffix: str) -> None:
    fill(tmp_path)
    damage(tmp_path / f"val/dog/0.{suffix}", how)
    data = folder(tmp_path)
    data.check()
    with pytest.raises(
        UserError, match=r"^the image val/dog/0\.(png|jpg) cannot be read \(.+\): replace or remove it$"
    ):
        list(data.val_dataloader()) + list(data.test_dataloader())


# Forking while torch's threads live is how torch's own loader works.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_name_survives_loader_processes(tmp_path: Path) -> None:
    fill(tmp_path, test=1)
    damage(tmp_path / "val/dog/0.png", "text")
    sentences = []
    for workers in (0, 1):
        with pytest.raises(UnreadableImage) as caught:
            list(folder(tmp_path, num_workers=workers).val_dataloader())
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    assert "val/dog/0.png" in sentences[1]
    assert str(tmp_path) not in sentences[1]


# -- Imagenette


def imagenette(root: Path, **options: object) -> ImagenetteData:
    return ImagenetteData(root, batch_size=4, **options)  # type: ignore[arg-type]


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
    assert "no Imagenette (160px)" in sentence
    assert "data.download=true" in sentence
    imagenette(tmp_path, size="320px").check()
    for copy in ("imagenette2-mine", "imagenette2-yours"):
        fill(tmp_path / copy, tuple(IMAGENETTE_CLASSES), train=1, val=2)
    assert "no Imagenette (160px)" in refused(imagenette(tmp_path, size="160px"))


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
    assert "imagenette could not be downloaded" in sentence
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
    image, _ = data.dataset("train")[one_channel]  # type: ignore[misc]
    shown = data.preprocess.denormalise(image[None])[0]  # type: ignore[union-attr]
    torch.testing.assert_close(shown[0], shown[2])
    assert next(iter(data.loader("test", indices=range(0, 1900, 316))))[0].shape == (4, 3, 64, 64)
