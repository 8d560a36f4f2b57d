"""Names that results could not be written with are refused before any work."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from salve.data import FolderData
from salve.run.folder import RunFolder
from salve.run.schema import Config
from salve.types import UserError

Compose = Callable[..., Config]
#: What Python makes of a name with the byte 0xff, which is no UTF-8.
BAD = os.fsdecode(b"a\xff")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are texts")


def images(root: Path, *classes: str) -> Path:
    for split in ("train", "select", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([f'name="{BAD}"'], "name"),
        ([f'output_dir="{BAD}"'], "output_dir"),
        ([f'sweep.name="{BAD}"'], "sweep.name"),
        (["data=folder", f'data.root="{BAD}"'], "data.root"),
        (["data=folder", "data.root=x", f'data.splits={{train:"{BAD}",test:test}}'], "data.splits.train"),
        (["data=folder", "data.root=x", f'data.classes=[a,"{BAD}"]'], "data.classes"),
        ([f'backbone.weights="{BAD}"'], "backbone.weights"),
        ([f'logger.tags=["{BAD}"]'], "logger.tags"),
    ],
)
def test_a_setting_that_is_no_text_is_refused(composed: Compose, overrides: list[str], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}='.*a\\udcff.*' is not UTF-8") as refusal:
        composed(*overrides)
    str(refusal.value).encode()  # it can be shown


def test_so_is_a_relative_folder_within_one(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = images(tmp_path / BAD, "x", "y")
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"^output_dir='.*udcff/outputs' is not UTF-8"):
        composed()
    with pytest.raises(UserError, match=r"^data\.root='.*udcff' is not UTF-8"):
        composed(f"output_dir={tmp_path}", "data=folder", "data.root=.")


def test_so_is_a_link_to_one_since_settings_are_kept_without_links(composed: Compose, tmp_path: Path) -> None:
    images(tmp_path / BAD, "x", "y")
    (tmp_path / "link").symlink_to(tmp_path / BAD)
    with pytest.raises(UserError, match=r"^data\.root='.*udcff' is not UTF-8"):
        composed("data=folder", f"data.root={tmp_path}/link")
    (tmp_path / "plain").mkdir()
    config = composed("data=folder", f"data.root={tmp_path}/plain", 'name="église"')
    RunFolder(tmp_path / "run").prepare(config)
    assert RunFolder(tmp_path / "run").settings().name == "église"


@pytest.mark.parametrize("place", ["a class folder", "a folder below", "a file", "the folder of a split"])
def test_so_is_a_name_among_the_images(tmp_path: Path, place: str) -> None:
    root = images(tmp_path, "x", "y")
    folder = {"a class folder": root / "train", "the folder of a split": root}.get(place, root / "train" / "x")
    if place == "a file":
        (folder / f"{BAD}.png").write_bytes(b"x")
    else:
        (folder / BAD).mkdir()
    with pytest.raises(UserError, match=r"^The name 'a\\xff(\.png)?' in .* is not UTF-8; rename it\.$"):
        FolderData(root, 4).check()


def test_hidden_class_folders_are_said_of_every_split(tmp_path: Path) -> None:
    root = images(tmp_path, "x", "y", ".church")
    said = FolderData(root, 4).remarks()
    for split in ("train", "select", "test"):
        assert f"Hidden folders in {split} are not used as classes: '.church'." in said
