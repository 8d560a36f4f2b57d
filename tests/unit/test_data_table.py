"""Images that a table names: Waterbirds, CelebA and composed images, in small stand-ins of their layouts."""

import csv
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from PIL import Image

from salve.data.compose import main as compose
from salve.data.table import TableData
from salve.run.explain import conf_dir
from salve.types import Split, UserError
from tests.unit.test_data_folders import refused, write

SCENES = Path(__file__).parents[3] / "shared" / "datasets" / "imagenette-on-scenes"
SPLITS = get_args(Split)


def table(root: Path, source: str = "table", **changes: Any) -> TableData:
    """The data as a file of ``conf/data`` describes them."""
    settings = {"root": root}
    for name in ("table", source):
        settings |= yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    return TableData(**{**{k: v for k, v in settings.items() if k != "defaults"}, "root": root, **changes})


def rows(path: Path, names: list[str], *values: list[Any]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *values])


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images laid out like Waterbirds: two of each class and place in train, one in the other splits."""
    root = tmp_path_factory.mktemp("birds")
    found: list[list[Any]] = []
    for split in (0, 0, 1, 2):
        for y in (1, 0):
            for place in (0, 1):
                file = f"{y:03d}.Bird/{len(found)}.jpg"
                write(root / file, mode="L" if place else "RGB")
                found.append([len(found) + 1, file, y, split, place, f"/{'o' if place else 'f'}/scene.jpg"])
    rows(root / "metadata.csv", ["img_id", "img_filename", "y", "split", "place", "place_filename"], *found)
    return root


def test_images_of_one_object_have_its_number(birds: Path) -> None:
    assert table(birds, "waterbirds").objects("train") is None
    data = table(birds, "waterbirds", object="place_filename")  # two scenes, in turn
    assert data.objects("train").tolist() == [0, 1, 0, 1, 0, 1, 0, 1]  # type: ignore[union-attr]
    assert data.fingerprint() == table(birds, "waterbirds").fingerprint()


def test_waterbirds(birds: Path) -> None:
    data = table(birds, "waterbirds")
    data.check()
    assert data.classes == ("landbird", "waterbird")
    assert [data.labels(split).tolist() for split in SPLITS] == [[1, 1, 0, 0] * 2, [1, 1, 0, 0], [1, 1, 0, 0]]
    groups = data.groups("train")
    assert groups is not None
    assert (groups.name, groups.values, groups.of_image.tolist()) == ("place", ("land", "water"), [0, 1] * 4)
    image, label = data.raw("test")[1]
    assert isinstance(image, Image.Image)
    assert (image.mode, label) == ("RGB", 1)
    assert data.remarks()[0].startswith("The smallest class has few images")


@pytest.mark.parametrize("text", [False, True])
def test_celeba(tmp_path: Path, text: bool) -> None:
    faces = [(f"{i:06d}.jpg", str(2 * (i % 2) - 1), str(2 * (i // 2 % 2) - 1), str(i // 4)) for i in range(12)]
    for name, *_ in faces:
        write(tmp_path / "img_align_celeba" / name)
    if text:
        attributes = "\n".join(["12", "Blond_Hair Male", *(" ".join(face[:3]) for face in faces)])
        (tmp_path / "list_attr_celeba.txt").write_text(attributes + "\n")
        partition = "\n".join(f"{name} {part}" for name, *_, part in reversed(faces))
        (tmp_path / "list_eval_partition.txt").write_text(partition + "\n")
        data = table(tmp_path, "celeba", table=["list_attr_celeba.txt", "list_eval_partition.txt"])
    else:
        rows(tmp_path / "list_attr_celeba.csv", ["image_id", "Blond_Hair", "Male"], *(list(f[:3]) for f in faces))
        parts = [[name, part] for name, *_, part in reversed(faces)]
        rows(tmp_path / "list_eval_partition.csv", ["image_id", "partition"], *parts)
        data = table(tmp_path, "celeba")
    assert data.classes == ("not blond", "blond")
    for split in SPLITS:
        groups = data.groups(split)
        assert groups is not None
        assert data.labels(split).tolist() == [0, 1, 0, 1]
        assert [groups.values[value] for value in groups.of_image] == ["not male", "not male", "male", "male"]


def test_fingerprint_holds_labels_and_not_groups(birds: Path) -> None:
    before = table(birds, "waterbirds").fingerprint()
    assert table(birds, "waterbirds", batch_size=2).fingerprint() == before
    assert table(birds, "waterbirds", attribute=None, values=None).fingerprint() == before
    assert table(birds, "waterbirds", classes={1: "waterbird", 0: "landbird"}).fingerprint() != before
    swapped = table(birds, "waterbirds", label="place", attribute="y", classes={0: "landbird", 1: "waterbird"})
    assert swapped.fingerprint() != before


def test_one_held_out_value_is_divided_and_the_rest_is_remarked(birds: Path) -> None:
    data = table(birds, "waterbirds", splits={"train": 0, "test": 1})
    assert sorted(data.labels("select").tolist() + data.labels("test").tolist()) == [0, 0, 1, 1]
    assert "4 rows of metadata.csv are of other classes or splits." in data.remarks()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"table": "no.csv"}, "data.table=.*no.csv is no file"),
        ({"label": "why"}, "has no column 'why'; its columns are 'img_id', 'img_filename'"),
        ({"file": "{img_filename}x"}, "lacks 16 of the 16 images that metadata.csv names, such as '.*jpgx'"),
        ({"file": "plain.jpg"}, "data.file=plain.jpg names no column"),
        ({"file": "{place}.jpg"}, "names 2 files more than once, such as '0.jpg'"),
        ({"classes": {"0": "land", "3": "sea"}}, "data.classes names '3', which is none of '0', '1' in 'y'"),
        ({"values": {"0": "land"}}, "data.values has no name for the value '1' of the column 'place'"),
        ({"splits": {"train": 0, "test": 4}}, "data.splits names '4', but the column 'split' has '0', '1', '2'"),
        ({"splits": None}, "The column 'split' must say train and val"),
        ({"splits": {"train": 0, "select": 0, "test": 1}}, "trains on images that are held out"),
    ],
)
def test_what_does_not_fit_is_refused(birds: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        _ = table(birds, "waterbirds", **changes).groups("test")


def test_a_class_without_images_and_rows_of_another_length_are_refused(birds: Path, tmp_path: Path) -> None:
    (tmp_path / "001.Bird").symlink_to(birds / "001.Bird")
    (tmp_path / "000.Bird").symlink_to(birds / "000.Bird")
    text = (birds / "metadata.csv").read_text()
    (tmp_path / "metadata.csv").write_text(text.replace(",1,2,", ",0,2,"))
    assert "metadata.csv has no image of 'waterbird' in '2'" in refused(table(tmp_path, "waterbirds"))
    (tmp_path / "metadata.csv").write_text(text + "17,x.jpg\n")
    assert "has 2 values in row 18, but 6 columns" in refused(table(tmp_path, "waterbirds"))


# -- composed


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cut-outs of each class, opaque in a part; five scenes of each place, each in a colour of its own."""
    root = tmp_path_factory.mktemp("parts")
    for name, colour in (("cat", (255, 0, 0)), ("dog", (255, 255, 0))):
        (root / "objects" / name).mkdir(parents=True)
        for i in range(4):
            image = np.zeros((20, 30, 4), np.uint8)
            image[4:12, 5:21] = (*colour, 255)
            Image.fromarray(image).save(root / "objects" / name / f"{i}.png")
    for blue, place in ((255, "sea"), (100, "wood")):
        (root / "scenes" / place).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (50, 40), (0, 40 * i, blue)).save(root / "scenes" / place / f"{i}.png")
    return root


def command(parts: Path, out: Path, *more: str) -> None:
    arguments = ["--objects", str(parts / "objects"), "--scenes", str(parts / "scenes"), "--out", str(out)]
    compose([*arguments, "--per-class", "20", "4", "6", "--size", "32", "--places", "cat=sea", "dog=wood", *more])


def test_composed_images_hold_the_object_in_its_box_on_the_scene(parts: Path, tmp_path: Path) -> None:
    command(parts, tmp_path / "out", "--alignment", "0.9")
    with (tmp_path / "out" / "metadata.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * (20 + 4 + 6)
    for row in found:
        pixels = np.asarray(Image.open(tmp_path / "out" / row["split"] / row["class"] / row["file"]))
        x0, y0, x1, y1 = (int(row[name]) for name in ("x0", "y0", "x1", "y1"))
        inside = np.zeros((32, 32), bool)
        inside[y0:y1, x0:x1] = True
        assert ((pixels[..., 0] > 128) == inside).all()
        assert 16 <= max(x1 - x0, y1 - y0) <= 26
        scene = np.asarray(Image.open(parts / "scenes" / row["scene"]))[0, 0]
        assert (pixels[~inside] == scene).all()
        assert row["scene"].startswith(row["place"])
        assert row["object"].startswith(row["class"])
        assert int(row["aligned"]) == ((row["class"], row["place"]) in (("cat", "sea"), ("dog", "wood")))
    for column in ("object", "scene"):
        used = [{row[column] for row in found if row["split"] == split} for split in SPLITS]
        assert sum(map(len, used)) == len(set.union(*used))
    data = table(tmp_path / "out", "composed")
    for split, counts in zip(SPLITS, ([18, 2, 2, 18], [2] * 4, [3] * 4), strict=True):
        groups = data.groups(split)
        assert groups is not None
        assert groups.numbered(data.labels(split)).bincount().tolist() == counts
    command(parts, tmp_path / "again", "--alignment", "0.9")
    command(parts, tmp_path / "other", "--alignment", "0.9", "--seed", "1")
    again, other = (table(tmp_path / name, "composed").fingerprint() for name in ("again", "other"))
    assert data.fingerprint() == again != other


def test_masks_stand_for_an_alpha_channel(parts: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(4):
            image = Image.open(parts / "objects" / name / f"{i}.png")
            for folder, picture in (("objects", image.convert("RGB")), ("masks", image.getchannel("A"))):
                (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
                picture.save(tmp_path / folder / name / f"{i}.png")
    command(parts, tmp_path / "alpha")
    here = ["--objects", str(tmp_path / "objects"), "--masks", str(tmp_path / "masks")]
    command(parts, tmp_path / "masked", *here)
    assert len({table(tmp_path / name, "composed").fingerprint() for name in ("alpha", "masked")}) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--places", "cat=sea", "dgo=wood"], "--places names the class 'dgo', which is none of 'cat', 'dog'"),
        (["--places", "cat=sea"], "--places says no place for 'dog'"),
        (["--places", "cat=sky", "dog=wood"], "--places gives cat the place 'sky', which is none of 'sea', 'wood'"),
        (["--alignment", "1.5"], "--alignment=1.5 must lie between 0 and 1"),
        (["--scale", "0.5", "0.2"], "--scale=0.5 0.2 must be two rising numbers"),
        (["--per-class", "5", "0", "5"], "--per-class must give select at least one image"),
        (["--masks", "nowhere"], "has 0 masks in nowhere"),
    ],
)
def test_the_composer_refuses_what_cannot_be(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    with pytest.raises(SystemExit):
        command(parts, tmp_path / "out", *more)
    assert says in capsys.readouterr().err


@pytest.mark.skipif(not SCENES.is_dir(), reason=f"no images at {os.path.relpath(SCENES)}")
def test_imagenette_on_scenes() -> None:
    data = table(SCENES, file="{split}/{wnid}/{file}", label="wnid", attribute="place")
    with (SCENES / "metadata.csv").open() as file:
        found = list(csv.DictReader(file))
    for split in SPLITS:
        groups, mine = data.groups(split), [row for row in found if row["split"] == split]
        assert groups is not None
        assert [data.class_values[k] for k in data.labels(split)] == [row["wnid"] for row in mine]
        assert [groups.values[value] for value in groups.of_image] == [row["place"] for row in mine]
