"""Some of a network's classes: which folders, in which order, and which outputs they are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from salve.data import FolderData
from salve.data.classes import map_outputs
from salve.run.schema import Config
from salve.types import UserError
from tests.unit.test_data_folders import fill, folder, refused

CONF = Path(__file__).parents[2] / "conf"
FOLDERS = ["bee", "ant"]


def csv(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_without_a_setting_output_k_is_class_k(tmp_path: Path) -> None:
    assert map_outputs(None, FOLDERS) == (None, {})
    assert folder(fill(tmp_path)).outputs is None


def test_a_mapping_and_a_file_say_the_same(tmp_path: Path) -> None:
    assert map_outputs({"ant": 7, "cow": 7, "bee": 2}, FOLDERS) == ((2, 7), {})
    plain = csv(tmp_path / "plain.csv", "output,folder", "7,ant", "7,cow", "2,bee")
    assert map_outputs(plain, FOLDERS) == ((2, 7), {})
    named = csv(tmp_path / "named.csv", "\ufefffolder,output,name", 'ant,7,"Ant, small"', "bee,2,")
    assert map_outputs(named, FOLDERS) == ((2, 7), {"ant": "Ant, small"})


def test_imagenet_knows_ids_and_names() -> None:
    # As in torchvision's documentation: tench 0, golden retriever 207, the bird 134 and the machine 517.
    names = ["n01440764", "golden_retriever", "Golf Ball", "n02012849", "n03126707"]
    units, readable = map_outputs("imagenet", names)
    assert units == (0, 207, 574, 134, 517)
    assert readable["n01440764"] == "tench"
    assert "golden_retriever" not in readable
    assert len(set(readable.values())) == 3  # both cranes have a name of their own
    # Two classes whose names differ only in case are told apart by the exact name.
    assert map_outputs("imagenet", ["Cardigan", "cardigan"])[0] == (264, 474)
    with pytest.raises(UserError, match=r"no unit for the class 'CARDIGAN', 'tenches'; .*by WordNet id \(n01440764\)"):
        map_outputs("imagenet", ["CARDIGAN", "tenches", "tench"])


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        (5, "data.outputs=5 does not map class folders to output units; choose imagenet"),
        ({"ant": 1}, "no unit for the class 'bee'; every class folder needs a unit, or choose imagenet, a CSV"),
        ({"ant": 1, "bee": 1}, "unit 1 to both 'bee' and 'ant'"),
        ({"ant": -1, "bee": 1}, "gives -1 to 'ant'; a unit is a whole number, counted from 0"),
        ({"ant": 1.5, "bee": 1}, "gives 1.5 to 'ant'"),
        ({"ant": True, "bee": 2}, "gives True to 'ant'"),
        ({"ant": None, "bee": 2}, "gives None to 'ant'"),
        (
            "nowhere.csv",
            r"data.outputs=nowhere.csv cannot be read as a CSV file \(No such file.*\); choose imagenet",
        ),
    ],
)
def test_mappings_that_do_not_fit_are_refused(outputs: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        map_outputs(outputs, FOLDERS)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (
            ["folder,unit", "ant,1", "bee,2"],
            "must have the columns folder and output in its first row, but has folder, unit",
        ),
        ([], "but has nothing"),
        (["folder,output", "ant,1", "bee,2", "ant,3"], "more than one row for 'ant'"),
        (["folder,output", "ant,one", "bee,2"], "gives 'one' to 'ant'"),
        (["folder,output", "ant", "bee,2"], "gives None to 'ant'"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, lines: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        map_outputs(csv(tmp_path / "outputs.csv", *lines), FOLDERS)


def test_a_file_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "outputs.csv").write_bytes(b"folder,output\n\xff\xfe,1\n")
    with pytest.raises(UserError, match="cannot be read as a CSV file"):
        map_outputs(str(tmp_path / "outputs.csv"), FOLDERS)


# -- in the data


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "kind", ["empty", "binary", "NUL", "huge field", "too large", "folder", "pipe", "circle", "no path"]
)
def test_a_hostile_file_of_outputs_is_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "outputs.csv"
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 9,
        "NUL": b"folder,output\ncat,\0\ndog,1\n",
        "huge field": b'folder,output\n"' + b"x" * 300_000 + b'",1\n',
        "too large": b"folder,output\n" + b" " * (16 * 2**20),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path = Path("a\0b")
    with pytest.raises(UserError, match=r"^data\.outputs") as refused:
        map_outputs(str(path), ["cat", "dog"])
    assert len(str(refused.value)) < 600
    assert str(refused.value).isprintable()


def test_chosen_classes_in_their_order_with_their_names(tmp_path: Path) -> None:
    fill(tmp_path, ("ant", "bee", "cow", "1"))
    (tmp_path / "train/only here").mkdir()  # what is not chosen does not matter
    data = folder(tmp_path, classes=["cow", 1])
    assert data.classes == ("cow", "1")
    assert [(file.path, file.label) for file in data.raw("train").files] == [
        *((f"cow/{i}.png", 0) for i in range(3)),
        *((f"1/{i}.png", 1) for i in range(3)),
    ]
    named = folder(tmp_path, classes={"cow": "Rind", "ant": None}, outputs={"cow": 4, "ant": 0})
    assert (named.classes, named.outputs) == (("Rind", "ant"), (4, 0))


def test_names_come_from_the_setting_then_the_file_then_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, ("ant", "bee", "cow"))
    outputs = csv(tmp_path / "o.csv", "folder,output,name", "ant,1,Ameise", "bee,2,Biene", "cow,3,")
    data = folder(tmp_path, classes={"ant": "Formica", "bee": None, "cow": None}, outputs=outputs)
    assert data.classes == ("Formica", "Biene", "cow")


def test_it_can_be_said_on_the_command_line(tmp_path: Path, composed: Callable[..., Config]) -> None:
    for name in ("train", "val"):
        fill(tmp_path, ("ant", "bee", "cow")).joinpath(name).rename(tmp_path / f"my_{name}")
    settings = [f"data.root={tmp_path}", "data.splits={train: my_train, test: my_val}", "data.white=4095"]
    settings += ["data.classes={cow: Rind, ant: null}", "data.outputs={cow: 4, ant: 0}"]
    data = instantiate(composed("data=folder", *settings).data)
    assert isinstance(data, FolderData)
    assert (data.classes, data.outputs, data.white) == (("Rind", "ant"), (4, 0), 4095)
    assert data.raw("test").folder == "my_val"


def test_all_of_it_is_in_the_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path, ("ant", "bee", "cow"))
    variants: list[dict[str, Any]] = [
        {},
        {"classes": ["ant", "bee"]},
        {"classes": ["bee", "ant"]},
        {"classes": {"ant": "bee", "bee": "ant"}},
        {"outputs": {"ant": 0, "bee": 1, "cow": 2}},
        {"outputs": {"ant": 0, "bee": 2, "cow": 1}},
    ]
    assert len({folder(tmp_path, **options).fingerprint() for options in variants}) == len(variants)
    assert folder(tmp_path, classes=["ant", "bee", "cow"]).fingerprint() == folder(tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (
            ["ant", "emu"],
            "data.classes names 'emu', but .*train has no such folder; its class folders are 'ant', 'bee'",
        ),
        (["ant"], "data.classes has 1 class folder;"),
        ({"ant": "x", "bee": "x"}, "The class folders 'ant' and 'bee' are both named 'x'"),
        ({"ant": "a\nb", "bee": None}, "cannot be printed"),
    ],
)
def test_choices_that_do_not_fit_are_refused(tmp_path: Path, classes: Any, sentence: str) -> None:
    data = folder(fill(tmp_path, ("ant", "bee")), classes=classes)
    with pytest.raises(UserError, match=sentence):
        data.check()


def test_a_chosen_class_must_be_held_out_too(tmp_path: Path) -> None:
    fill(tmp_path, ("ant", "bee"))
    (tmp_path / "train/emu").mkdir()
    assert "data.classes must name the class folders to use" in refused(folder(tmp_path))
    assert f"names 'emu', but {tmp_path / 'val'} has no such folder" in refused(
        folder(tmp_path, classes=["ant", "emu"])
    )


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [("ant", "must be a list"), (5, "must be a list"), (["ant", "ant"], "'ant' more than once")],
)
def test_wrong_lists_are_refused_at_once(tmp_path: Path, classes: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        folder(tmp_path, classes=classes)
