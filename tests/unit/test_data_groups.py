"""Groups of images that a CSV file gives to class folders."""

from pathlib import Path

import pytest

from salve.data.folders import FolderData
from tests.unit.test_data_folders import fill, folder, refused


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("pets"))


def grouped(root: Path, path: Path, *lines: str) -> FolderData:
    path.write_text("\n".join(lines) + "\n")
    return folder(root, groups=path)


def test_images_are_found_by_path_from_the_root_from_their_split_and_by_name(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    lines = ["file,class,place", "train/cat/0.png,cat,wood", "cat/2.png,cat,sea", "2.png,dog,sea", "gone.png,dog,sea"]
    data = grouped(root, path, *lines, "val\\dog\\1.png,dog,wood", "train/dog/0.png,dog,")
    data.check()
    groups = {split: data.groups(split) for split in ("train", "select", "test")}
    train = groups["train"]
    assert train is not None
    assert (train.name, train.values) == ("place", ("sea", "wood"))
    assert train.of_image.tolist() == [1, -1, 0, -1, -1, 0]
    held_out = [group for split in ("select", "test") for group in groups[split].of_image.tolist()]  # type: ignore[union-attr]
    assert sorted(held_out) == [-1, -1, -1, 1]
    assert data.fingerprint() == folder(root).fingerprint()
    remarks = data.remarks()
    assert "groups.csv names 1 file that are no image in use, such as 'gone.png'." in remarks
    assert "groups.csv gives no group to 3 of the 6 images of train, such as 'cat/1.png'." in remarks


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ["file,place", "a,b"],
            "must have the columns file, class and one more, the attribute, but has 'file', 'place'",
        ),
        (["file,class,a,b", "1,cat,2,3"], "must have the columns file, class and one more"),
        (["file,class,place"], "has no rows below the names of its columns"),
        (["file,class,place", "train/cat/0.png,cta,sea"], "names the class 'cta', which is none of 'cat', 'dog'"),
        (
            ["file,class,place", "train/cat/0.png,dog,sea"],
            "gives 'train/cat/0.png' the class 'dog', but it is of 'cat'",
        ),
        (["file,class,place", "0.png,cat,sea"], "names '0.png', of which there are 2; name such images by their path"),
        (["file,class,place", *["train/cat/0.png,cat,sea"] * 2], "has more than one row for 'train/cat/0.png'"),
        (["file,class,place", "x.png,cat,sea", "y.png,cat,sea"], "none of its 2 files, such as 'x.png', is there"),
        (["file,class,place", "train/cat/0.png,cat,"], "has no value in its column 'place'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(root: Path, tmp_path: Path, lines: list[str], says: str) -> None:
    assert says in refused(grouped(root, tmp_path / "groups.csv", *lines))
