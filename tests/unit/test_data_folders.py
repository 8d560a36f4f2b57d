"""Class folders, with links, odd names and damaged files."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageFile

from salve.data import decode
from salve.data.decode import to_rgb
from salve.data.files import FileData, UnreadableImage
from salve.data.folders import FolderData
from salve.data.imagenette import ImagenetteData
from salve.data.marked import MarkedData
from salve.data.transforms import Preprocess
from salve.data_settings import MarkSettings
from salve.types import UserError


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
    image, label = data.dataset("train")[place]
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
    with pytest.raises(UserError, match=r"data\.limit_per_class=0 must be at least 1"):
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
    whites = [folder(fill(tmp_path / "d"), white=white).fingerprint() for white in (255, 4095)]
    assert len({base, renamed, resized, folder(moved).fingerprint(), *whites}) == 6


def test_fingerprint_follows_pixels_that_change_neither_size_nor_times(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "train/cat/0.bmp"
    write(path, "red")
    before, stat = folder(tmp_path).fingerprint(), path.stat()
    write(path, "blue")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert folder(tmp_path).fingerprint() != before
    write(path, "red")
    assert folder(tmp_path).fingerprint() == before


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
def test_folders_of_their_own_are_found(tmp_path: Path, there: dict[str, Any], select: str, test: str) -> None:
    data = folder(fill(tmp_path, **there))
    assert paths(data, "train") == [f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    assert paths(data, "select") == [f"{select}/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)]
    assert paths(data, "test") == [f"{test}/{name}/0.png" for name in ("cat", "dog")]


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_single_held_out_folder_is_divided(tmp_path: Path, name: str) -> None:
    counts: dict[str, Any] = {"val": 0, name: 10}
    fill(tmp_path, **counts)
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
    assert "val cannot be divided into select and test. There are too few held-out images of 'dog'" in refused(
        folder(tmp_path)
    )


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
    assert "data.splits names 'training', which is no folder" in sentence
    assert "its folders are 'train', 'val'" in sentence
    for splits in ({"train": "train"}, {"test": "val"}, {"train": "train", "test": "val", "val": "val"}, "val"):
        with pytest.raises(UserError, match=r"such as \{train: training, test: validation\}"):
            folder(tmp_path, splits=splits)
    (tmp_path / "again").symlink_to(tmp_path / "train")
    for same in ("train", "again"):
        assert "are one folder" in refused(folder(tmp_path, splits={"train": "train", "test": same}))
    fill(tmp_path, select=1, test=1)
    assert "'select', 'val', 'test' beside train" in refused(folder(tmp_path))
    with pytest.raises(UserError, match=r"data.select_share=1 must lie between 0 and 1"):
        folder(tmp_path, select_share=1)


# -- files that are not where, or what, one thinks


@pytest.mark.parametrize("name", ["x.jfif", "x.JPE", "x.jp2", "x.tga", "x", "x.pbm", "x.apng"])
def test_what_pillow_reads_is_read(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    kind = {"x.jfif": "JPEG", "x.JPE": "JPEG", "x.jp2": "JPEG2000", "x.tga": "TGA", "x.pbm": "PPM"}.get(name, "PNG")
    Image.new("RGB", (20, 16), "lime").save(tmp_path / "train/cat" / name, format=kind)
    data = folder(tmp_path)
    place = [file.path for file in data.raw("train").files].index(f"cat/{name}")
    image, _ = data.dataset("train")[place]
    assert (image[1] > 0.95).all()
    assert (image[0] < 0.05).all()


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    fill(tmp_path)
    assert [remark for remark in folder(tmp_path).remarks() if "readable" in remark] == []
    for name in ("a.HEIC", "b.heic", "README", "c.pdf", ".hidden.heic", "Thumbs.db"):
        (tmp_path / "train/cat" / name).write_bytes(b"no picture")
    (tmp_path / "val/dog/list.txt").write_text("x")
    write(tmp_path / "train/loose.png")
    write(tmp_path / "train/.old/0.png")
    remarks = folder(tmp_path).remarks()
    assert "4 files in train are not readable images: .heic 2, no suffix 1, .pdf 1." in remarks
    assert "1 file in val is not a readable image: .txt 1." in remarks
    assert "1 image lies in train outside of class folders." in remarks
    assert "Hidden folders in train are not used as classes: '.old'." in remarks


def test_few_images_are_remarked(tmp_path: Path) -> None:
    many: dict[str, Any] = {"train": 60, "select": 49, "test": 50, "val": 0}
    assert folder(fill(tmp_path, **many)).remarks()[0].startswith("The smallest class has few images (select 49):")
    (tmp_path / "train/cat/0.png").rename(tmp_path / "select/cat/x.png")
    (tmp_path / "train/dog/0.png").rename(tmp_path / "select/dog/x.png")
    assert not any("few images" in remark for remark in folder(tmp_path).remarks())


def test_images_in_two_splits_are_remarked(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "select", "test")):
        for name in ("cat", "dog"):
            for k in range(2):
                write(tmp_path / split / name / f"{k}.png", f"#{i}{k}0{'0' if name == 'cat' else '8'}00")
    assert not any("byte for byte" in remark for remark in folder(tmp_path).remarks())
    write(tmp_path / "test/cat/copy.png", "#000000")
    assert "1 of the 5 images of test are also in train, byte for byte." in folder(tmp_path).remarks()


def test_enlarged_images_are_remarked_once_bound(tmp_path: Path) -> None:
    fill(tmp_path)  # 20 × 16 pixels
    Image.new("RGB", (300, 300)).save(tmp_path / "train/cat/large.png")
    data = FolderData(tmp_path, batch_size=4)
    assert not any("enlarged" in remark for remark in data.remarks())
    for size, resize, enlarged in ((16, None, False), (18, None, True), (16, 16, False), (16, 18, True)):
        data.bind(Preprocess(size, resize))
        to = (
            f"to {size} × {size}" if resize in (None, size) else "to 18 pixels at the shorter side, of which the middle"
        )
        expected = [True] if enlarged else []
        said = f"The images (median 20 × 16) are enlarged {to}"
        assert [remark.startswith(said) for remark in data.remarks() if "enlarged" in remark] == expected


@pytest.mark.parametrize("target", ["..", "../..", "../dog", "../dog/deep", "."])
def test_links_back_into_the_data_add_no_image(tmp_path: Path, target: str) -> None:
    fill(tmp_path)
    write(tmp_path / "train/dog/deep/0.png")
    before = folder(tmp_path).raw("train").files
    (tmp_path / "train/cat/up").symlink_to(target)
    data = folder(tmp_path)
    assert data.raw("train").files == before
    assert "Links in train to folders that are read anyway are skipped: 'cat/up'." in data.remarks()


def test_links_to_other_places_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "data")
    write(tmp_path / "store/bird/0.png")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "bird").mkdir()
        write(tmp_path / "data" / split / "bird/1.png")
        write(tmp_path / "data" / split / "bird/2.png")
    for name in ("a", "b"):
        (tmp_path / "data/train/bird" / name).symlink_to(tmp_path / "store/bird")
    data = folder(tmp_path / "data")
    assert [f.path for f in data.raw("train").files if f.label == 0] == ["bird/1.png", "bird/2.png", "bird/a/0.png"]


@pytest.mark.parametrize(
    ("target", "words"), [("cat", "are one folder"), ("..", "is a link to a folder that holds it")]
)
def test_class_folders_that_are_links_to_other_classes_are_refused(tmp_path: Path, target: str, words: str) -> None:
    fill(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "emu").symlink_to(target)
    assert words in refused(folder(tmp_path))


@pytest.mark.parametrize("locked", ["train", "train/cat", "train/cat/deep"])
def test_folders_that_cannot_be_read_are_named(tmp_path: Path, locked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    (tmp_path / "train/cat/deep").mkdir()
    scandir = os.scandir

    def guarded(folder: Path) -> Any:  # tests may run as root, who can read everything
        if Path(folder) == tmp_path / locked:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    assert refused(folder(tmp_path)).endswith(f"{locked} cannot be read (Permission denied).")


@pytest.mark.parametrize("place", ["train", "train/cat"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, place: str) -> None:
    fill(tmp_path)
    try:
        os.mkdir(os.path.join(os.fsencode(tmp_path / place), b"caf\xe9"))
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    sentence = refused(folder(tmp_path))
    assert f"The name 'caf\\xe9' in {tmp_path / place} is not UTF-8" in sentence
    sentence.encode()


# -- what is refused


def refused(data: FileData) -> str:
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
    assert "its folders are 'train'" in refused(folder(tmp_path))
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
        UserError, match=r"^The image val/dog/0\.(png|jpg) cannot be read \(.+\); replace or remove it\.$"
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


@pytest.mark.parametrize("most", [310, 150])  # Pillow warns above the limit, and raises above twice the limit
def test_images_that_are_too_large_are_sentences(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)  # of 20 × 16 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    says = rf"^The image train/cat/0\.png is too large\. It has 320 pixels, but at most {most} are read; .* SALVE_MOST"
    with pytest.raises(UnreadableImage, match=says):
        folder(tmp_path).raw("train")[0]
    monkeypatch.setenv("SALVE_MOST_PIXELS", "320")
    folder(tmp_path).raw("train")[0]
    assert most == Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("SALVE_MOST_PIXELS", "many")
    with pytest.raises(UnreadableImage, match="environment variable SALVE_MOST_PIXELS=many must be a number"):
        folder(tmp_path).raw("train")[0]


def test_a_header_that_claims_many_pixels_is_enough_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few bytes that claims 13,000 × 13,000 pixels is refused before it is decoded."""
    fill(tmp_path)
    header = b"IHDR" + struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "train/cat/0.png").write_bytes(content + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="It has 169,000,000 pixels, but at most 89,478,485 are read"):
        folder(tmp_path).raw("train")[0]


def test_a_picture_that_is_larger_than_the_icon_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (100, 100)).save(picture, "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture.getvalue()), 22)
    (tmp_path / "train/cat/0.png").write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + picture.getvalue())
    monkeypatch.setenv("SALVE_MOST_PIXELS", "1000")
    with pytest.raises(UnreadableImage, match="It has 10,000 pixels, but at most 1,000 are read"):
        folder(tmp_path).raw("train")[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "I;16", "I", "F", "L", "CMYK", "1"])
def test_large_images_are_converted_in_strips_to_the_same_bits(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(draw.integers(0, 60_000, (37, 23)).astype({"I": "i4", "F": "f4"}.get(mode, "u2")))
    else:
        image = Image.fromarray(draw.integers(0, 256, (37, 23, 4)).astype("u1"), "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = np.asarray(to_rgb(image))
    monkeypatch.setattr(decode, "_AT_ONCE", 100)  # pixels: 4 rows
    assert np.array_equal(np.asarray(to_rgb(image)), whole)
    if mode == "F":
        image.putpixel((5, 30), float("nan"))
        with pytest.raises(decode.UnknownWhite, match="not finite"):
            to_rgb(image)


@pytest.mark.timeout(60)
def test_pipes_and_devices_among_the_images(tmp_path: Path) -> None:
    """A file without a suffix is opened, but opening a pipe would wait for ever."""
    fill(tmp_path)
    os.mkfifo(tmp_path / "train/cat/pipe")
    os.symlink("/dev/zero", tmp_path / "train/cat/zeros")
    assert folder(tmp_path).classes == ("cat", "dog")
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    with pytest.raises(UserError, match=r"holds empty image files .*pipe\.png"):
        folder(tmp_path).check()


def test_grey_values_of_unknown_white_are_named_with_the_setting(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "train/cat/0.tif"
    Image.fromarray(np.full((16, 20), 4000, dtype=np.uint16)).save(path)
    with pytest.raises(UnreadableImage) as caught:
        list(folder(tmp_path).loader("train"))
    sentence = str(caught.value)
    assert sentence.startswith("The image train/cat/0.tif would look wrong or black. Its values go from 4000 to 4000")
    assert "data.white=4095" in sentence
    image, _ = next(iter(folder(tmp_path, white=4000).loader("train")))
    place = [file.path for file in folder(tmp_path).raw("train").files].index("cat/0.tif")
    assert image[place].eq(1).all()
    with pytest.raises(UserError, match=r"data\.white=0 must be above 0"):
        folder(tmp_path, white=0)


# -- the size that a backbone without a preset reads


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([(20, 16)] * 3, 16), ([(20, 16), (20, 16), (64, 64)], 224), ([(300, 260)] * 3, 224)]
)
def test_the_own_size_is_that_of_all_images_or_the_usual(
    tmp_path: Path, sizes: list[tuple[int, int]], wanted: int
) -> None:
    fill(tmp_path)
    for name in ("cat", "dog"):
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / "train" / name / f"{i}.png")
    assert folder(tmp_path).native_size == wanted
    assert MarkedData(folder(tmp_path), MarkSettings("tint")).native_size == wanted
