"""Boxes around objects: read from a file, and followed through the preprocessing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from salve.data.boxes import Boxes
from salve.data.folders import FolderData
from salve.data.marked import MarkedData
from salve.data.transforms import Preprocess
from salve.data_settings import MarkSettings
from salve.settings import ValidateSettings
from salve.stages.audit import objects_shown
from salve.stages.localise import localise
from salve.stages.targets import Target
from salve.types import UserError
from tests.unit.test_data_folders import fill, folder, refused

HEAD = "split,wnid,file,x0,y0,x1,y1"
TEST = ["val,cat,val/cat/0.png,1,2,5,6", "val,cat,val/cat/1.png,1,2,5,6"]  # one of the two tests, the other selects


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("pets"))  # 20 × 16 pixels each


def boxed(root: Path, path: Path, *lines: str, **options: Any) -> FolderData:
    path.write_text("\n".join(lines) + "\n")
    return folder(root, boxes=path, **options)


def test_boxes_of_an_image_by_hand() -> None:
    of_one = Boxes({7: torch.tensor([[200.0, 50, 300, 150], [0, 0, 100, 200]])}, {7: (400, 200)})
    # The shorter side becomes 100, so that all is halved; the crop of 80 begins 60 from the left and 10 from the top.
    cropped = Preprocess(80, 100)
    assert of_one.seen(7, cropped).tolist() == [[40, 15, 80, 65]]  # the second box is cropped away
    mask = of_one.masks([7], cropped)[0]
    assert (mask.sum(), bool(mask[15, 40]), bool(mask[64, 79]), bool(mask[65, 79])) == (40 * 50, True, True, False)
    squashed = of_one.seen(7, Preprocess(100, None))
    assert squashed.tolist() == [[50, 25, 75, 75], [0, 0, 25, 100]]


@pytest.mark.parametrize("preprocess", [Preprocess(31, 40), Preprocess(37, None), Preprocess(64, 64)])
def test_a_box_lies_where_the_preprocessing_brings_its_pixels(preprocess: Preprocess) -> None:
    image, box = Image.new("RGB", (53, 97)), (13, 30, 40, 71)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    mean, std = torch.tensor(preprocess.mean)[:, None, None], torch.tensor(preprocess.std)[:, None, None]
    seen = (preprocess.eval_transform()(image) * std + mean)[0]
    mask = Boxes({0: torch.tensor([box]).double()}, {0: (53, 97)}).masks([0], preprocess)[0]
    unlike = (seen > 0.5) != mask
    assert unlike.sum() <= 0.02 * mask.numel()  # pixels that the edge of the box cuts in half
    assert mask.any()


def test_boxes_are_found_in_all_splits(root: Path, tmp_path: Path) -> None:
    rows = [*TEST, "train,dog,2.png,0,0,20,16", "train,dog,2.png,3.5,3,4,9"]
    data = boxed(root, tmp_path / "boxes.csv", HEAD, *rows)
    data.check()
    train, select, test = (data.boxes(split) for split in ("train", "select", "test"))
    assert train is not None
    assert train.of_image[5].tolist() == [[0, 0, 20, 16], [3.5, 3, 4, 9]]
    assert select is not None
    assert test is not None
    assert len(select.of_image) == len(test.of_image) == 1
    assert (train.sizes, test.of_image.keys()) == ({5: (20, 16)}, {0})
    assert data.fingerprint() == folder(root).fingerprint()
    assert folder(root).boxes("test") is None
    assert MarkedData(data, MarkSettings("border")).boxes("train") is train


def test_images_that_are_not_in_use_are_counted(root: Path, tmp_path: Path) -> None:
    data = boxed(root, tmp_path / "boxes.csv", HEAD, *TEST, "train,dog,2.png,0,0,20,16", limit_per_class=1)
    data.check()
    assert "boxes.csv has boxes in 1 file not in use, such as '2.png'." in data.remarks()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ["file,class,x0,y0,x1", "a,cat,1,2,3"],
            "must have the columns file, class, x0, y0, x1 and y1, but has 'file'",
        ),
        ([HEAD, *TEST, "val,cat,gone.png,1,2,3,4"], "names 'gone.png', which is no image of 'cat' in"),
        ([HEAD, *TEST, "train,cow,2.png,1,2,3,4"], "data.boxes="),
        (
            [HEAD, *TEST, "train,cat,train/cat/2.png,1,2,3,17"],
            "has a box 1, 2, 3, 17 in 'train/cat/2.png', which is 20 × 16",
        ),
        ([HEAD, *TEST, "train,cat,train/cat/2.png,3,2,3,4"], "it must be 0 ≤ x0 < x1 ≤ width"),
        ([HEAD, *TEST, "train,cat,train/cat/2.png,nan,2,3,4"], "has a box nan, 2, 3, 4"),
        ([HEAD, *TEST, "train,cat,train/cat/2.png,a,2,3,4"], "has 'a', '2', '3', '4' in a row of"),
        ([HEAD, "train,cat,train/cat/2.png,1,2,3,4"], "has no box in an image of test, where maps are scored"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(root: Path, tmp_path: Path, lines: list[str], says: str) -> None:
    assert says in refused(boxed(root, tmp_path / "boxes.csv", *lines))


def test_a_file_that_is_not_there_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.boxes=.*gone\.csv is no file\."):
        folder(root, boxes="gone.csv").check()


def test_stage_validate_scores_maps_against_boxes_where_there_are_no_masks(root: Path, tmp_path: Path) -> None:
    """Preprocessing squashes 20 × 16 to 8 × 8: the box 5, 2, 15, 10 becomes 2, 1, 6, 5."""
    rows = [f"val,{name},val/{name}/{i}.png,5,2,15,10" for name in ("cat", "dog") for i in (0, 1)]
    data = boxed(root, tmp_path / "boxes.csv", HEAD, *rows)
    maps = torch.zeros(1, 3, 8, 8)
    maps[0, 0, 1:5, 2:6] = 1.0  # the class's latent, on the box
    maps[0, 1, 0, 0] = maps[0, 2, 1:5, 2:4] = 1.0  # random ones, off it and on half of it
    inputs: Any = SimpleNamespace(
        data=data, preprocess=data.preprocess, seed=0, labels=data.labels("test"), values=torch.zeros(2, 2),
        maps=lambda kind, indices, latents, signs: maps[:, : len(latents)],
    )  # fmt: skip
    settings = ValidateSettings(0, 1, 32, 0, random_latents=2, faithfulness_steps=0, maximisation_steps=0)
    table = pd.DataFrame({"latent": [0, 1, 2], "kind": "diffuse", "sign": 1})
    target = Target("dog", (1,), (0,), (1,), ("diffuse",))
    row = localise(settings, table, ["grad_fam"], inputs, (1, target))
    found = [row[name] for name in ("n", "pointing", "iou", "random_pointing", "random_iou", "chance_pointing")]
    assert found == [1, 1.0, 1.0, 0.5, 0.25, 0.25]
    assert "auroc" not in row


def test_the_audit_takes_the_boxed_images_of_a_class_where_there_are_no_masks() -> None:
    boxes = Boxes({i: torch.tensor([[0.0, 0, 16, 32]]).double() for i in (1, 2, 4)}, dict.fromkeys((1, 2, 4), (32, 32)))
    data: Any = SimpleNamespace(truth=lambda _: None, boxes=lambda _: boxes)
    numbers, on = objects_shown(data, torch.tensor([0, 1, 1, 1, 0]), Preprocess(32, None), 1)
    assert numbers == [1, 2]
    assert on.shape == (2, 32, 32)
    assert on[:, :, :16].all()
    assert not on[:, :, 16:].any()
