"""Artifacts are made once, whole or not at all, whoever asks and whatever is killed."""

import csv
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from salve import artifacts
from salve.artifacts import (
    DONE,
    Artifact,
    NotMade,
    Store,
    digest_of,
    digest_of_file,
    digest_of_tensors,
    load_tensors,
    read_header,
    read_record,
    read_table,
    save_tensors,
    write_record,
    write_table,
)
from salve.types import UserError
from tests.integration.commands import Rank

KEY_SETTINGS = {"weights": "abc", "sae": {"k": 2, "sparsity": 0.5}}


def write_hello(folder: Path, _: Path) -> None:
    (folder / "hello.txt").write_text("hello")


def refuse(*_: Path) -> None:
    raise AssertionError("made although it was there")


def finished(root: Path) -> list[Path]:
    """Every folder below a store that is marked as whole."""
    return [path.parent for path in root.rglob(DONE)]


# -- made once, found later


def test_made_once_and_found_later(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, said.append)
    assert store.find("thing", KEY_SETTINGS) is None
    made = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    found = store.get_or_make("thing", KEY_SETTINGS, refuse)
    assert not made.reused
    assert found.reused
    assert (found.path, found.digest, found.key) == (made.path, made.digest, made.key)
    assert made.path == tmp_path / "thing" / made.key
    assert found.file("hello.txt").read_text() == "hello"
    assert [made.key in sentence for sentence in said] == [True, True]


def test_a_second_store_on_the_same_folder_finds_it(tmp_path: Path) -> None:
    made = Store(tmp_path).get_or_make("thing", KEY_SETTINGS, write_hello)
    assert Store(tmp_path).get_or_make("thing", KEY_SETTINGS, refuse).digest == made.digest


def test_the_order_of_settings_does_not_change_the_key(tmp_path: Path) -> None:
    made = Store(tmp_path).get_or_make("thing", KEY_SETTINGS, write_hello)
    turned = {"sae": {"sparsity": 0.5, "k": 2}, "weights": "abc"}
    assert Store(tmp_path).get_or_make("thing", turned, refuse).key == made.key


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "abc", "sae": {"k": 3, "sparsity": 0.5}},
        {"weights": "abc", "sae": {"k": 2, "sparsity": 0.5}, "seed": 0},
        {"weights": "abc", "sae": {"k": "2", "sparsity": 0.5}},
        {"weights": "abc"},
    ],
)
def test_other_settings_are_another_artifact(tmp_path: Path, other: dict) -> None:
    store = Store(tmp_path)
    made = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    assert store.get_or_make("thing", other, write_hello).key != made.key


def test_the_kind_is_part_of_the_address(tmp_path: Path) -> None:
    Store(tmp_path).get_or_make("thing", KEY_SETTINGS, write_hello)
    assert Store(tmp_path).find("other", KEY_SETTINGS) is None


def test_the_folder_says_what_it_was_made_from_and_lists_its_files(tmp_path: Path) -> None:
    made = Store(tmp_path).get_or_make("thing", KEY_SETTINGS, write_hello)
    assert made.record("key.json") == KEY_SETTINGS
    expected = hashlib.sha256(b"hello").hexdigest()
    of_key = digest_of_file(made.file("key.json"))
    assert made.record(DONE) == {"digest": made.digest, "files": {"hello.txt": expected}, "key_settings": of_key}


def test_only_found_raises_and_makes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(NotMade, match="thing"):
        store.only_found().get_or_make("thing", KEY_SETTINGS, refuse)
    assert not (tmp_path / "store").exists()
    made = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    assert store.only_found().get_or_make("thing", KEY_SETTINGS, refuse).digest == made.digest


# -- the digest is of the content


def content_digest(root: Path, files: dict[str, str]) -> str:
    def make(folder: Path, _: Path) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return Store(root).get_or_make("thing", {"root": root.name}, make).digest


def test_the_same_content_has_the_same_digest_under_any_key(tmp_path: Path) -> None:
    files = {"a.txt": "1", "deeper/b.txt": "2"}
    assert content_digest(tmp_path / "one", files) == content_digest(tmp_path / "two", dict(reversed(files.items())))


@pytest.mark.parametrize(
    "changed",
    [
        {"a.txt": "1", "deeper/b.txt": "3"},
        {"a.txt": "1", "deeper/c.txt": "2"},
        {"a.txt": "2", "deeper/b.txt": "1"},
        {"a.txt": "1", "deeper/b.txt": "2", "empty": ""},
        {"a.txt": "1"},
    ],
)
def test_a_changed_byte_name_or_file_changes_the_digest(tmp_path: Path, changed: dict[str, str]) -> None:
    files = {"a.txt": "1", "deeper/b.txt": "2"}
    assert content_digest(tmp_path / "one", files) != content_digest(tmp_path / "two", changed)


def test_digest_of_file_is_sha256(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert digest_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_digest_of_refuses_what_is_no_json() -> None:
    with pytest.raises(TypeError):
        digest_of({"path": Path("x")})


def test_digest_of_tensors_covers_names_shapes_dtypes_and_bits() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}
    same = {"b": torch.ones(2, dtype=torch.int64), "a": torch.arange(12.0)[::2] / 2}  # order and strides differ
    assert digest_of_tensors(base) == digest_of_tensors(same)
    others = [
        {**base, "a": base["a"].reshape(2, 3)},
        {**base, "a": base["a"].double()},
        {**base, "a": base["a"].nextafter(torch.tensor(torch.inf))},
        {**base, "b": base["b"].int()},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
        {},
    ]
    assert len({digest_of_tensors(tensors) for tensors in [base, *others]}) == 1 + len(others)


def test_digest_of_tensors_tells_minus_zero_and_takes_every_dtype() -> None:
    assert digest_of_tensors({"a": torch.tensor([0.0])}) != digest_of_tensors({"a": torch.tensor([-0.0])})
    kinds = (torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64)
    assert len({digest_of_tensors({"a": torch.ones(2, dtype=kind)}) for kind in kinds}) == len(kinds)
    assert digest_of_tensors({"a": torch.tensor(1.0)}) != digest_of_tensors({"a": torch.ones(1)})
    assert digest_of_tensors({"a": torch.zeros(0)}) != digest_of_tensors({"a": torch.zeros(0, 2)})


# -- failing and being killed


def test_a_failing_make_leaves_no_artifact_but_its_scratch(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(folder: Path, scratch: Path) -> None:
        (folder / "half.txt").write_text("half")
        (scratch / "checkpoint").write_text("epoch 3")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        store.get_or_make("thing", KEY_SETTINGS, fail)
    assert store.find("thing", KEY_SETTINGS) is None
    assert finished(tmp_path) == []

    def finish(folder: Path, scratch: Path) -> None:
        assert list(folder.iterdir()) == []  # nothing of the failed attempt
        (folder / "whole.txt").write_text((scratch / "checkpoint").read_text())

    made = store.get_or_make("thing", KEY_SETTINGS, finish)
    assert made.file("whole.txt").read_text() == "epoch 3"
    assert sorted(path.name for path in made.path.iterdir()) == [DONE, "key.json", "whole.txt"]


def test_scratch_is_gone_after_success(tmp_path: Path) -> None:
    seen: list[Path] = []

    def make(folder: Path, scratch: Path) -> None:
        (scratch / "checkpoint").write_text("x")
        seen.append(scratch)
        write_hello(folder, scratch)

    Store(tmp_path).get_or_make("thing", KEY_SETTINGS, make)
    assert not seen[0].exists()
    assert not list(tmp_path.rglob("checkpoint"))


def test_a_folder_without_its_mark_is_no_artifact_and_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    (made.path / DONE).unlink()
    (made.path / "stray.txt").write_text("left over")
    assert store.find("thing", KEY_SETTINGS) is None
    again = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    assert again.digest == made.digest
    assert not again.file("stray.txt").exists()


KILLED = """
import sys, time
from pathlib import Path
from salve import artifacts
from salve.artifacts import Store

def make(folder, scratch):
    (folder / "half.txt").write_text("half")
    (scratch / "checkpoint").write_text("epoch 3")
    print("in the middle", flush=True)
    time.sleep(120)

Store(Path(sys.argv[1])).get_or_make("thing", {"a": 1}, make)
"""


def test_a_killed_process_leaves_nothing_that_is_found_and_the_next_one_completes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline().strip() == "in the middle"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    store = Store(tmp_path)
    assert store.find("thing", {"a": 1}) is None
    assert finished(tmp_path) == []

    def finish(folder: Path, scratch: Path) -> None:
        assert not (folder / "half.txt").exists()
        (folder / "whole.txt").write_text((scratch / "checkpoint").read_text())

    # The killed process's lock is no obstacle.
    assert store.get_or_make("thing", {"a": 1}, finish).file("whole.txt").read_text() == "epoch 3"


def _answer(root: Path, answer: object) -> None:
    """Leave what a process found for the one that started it."""
    (root / f"answer-{os.getpid()}.json").write_text(json.dumps(answer))


def _answers(root: Path, processes: list[Rank]) -> list[Any]:
    """Run processes beside each other; what each left."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [json.loads((root / f"answer-{process.pid}.json").read_text()) for process in processes]


def _want(root: Path) -> None:
    def make(folder: Path, _: Path) -> None:
        with (root / "calls").open("a") as calls:
            calls.write(f"{os.getpid()}\n")
        time.sleep(0.5)  # long enough for the others to arrive
        (folder / "who.txt").write_text(str(os.getpid()))

    artifact = Store(root / "store").get_or_make("thing", {"a": 1}, make)
    _answer(root, (artifact.digest, artifact.reused))


@pytest.mark.slow
def test_processes_that_want_the_same_artifact_make_it_once(tmp_path: Path) -> None:
    got = _answers(tmp_path, [Rank(_want, (tmp_path,)) for _ in range(4)])
    assert len((tmp_path / "calls").read_text().split()) == 1
    assert len({digest for digest, _ in got}) == 1
    assert sorted(reused for _, reused in got) == [False, True, True, True]


# -- damaged


def hurt(folder: Path, how: str) -> None:
    match how:
        case "flipped":
            (folder / "hello.txt").write_text("hellp")
        case "missing":
            (folder / "hello.txt").unlink()
        case "extra":
            (folder / "more.txt").write_text("more")
        case "mark":
            (folder / DONE).write_text("")
        case "folder":
            shutil.rmtree(folder)
            folder.symlink_to("nowhere")


@pytest.mark.parametrize("finds", [False, True])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flipped", "hello.txt is not what was written"),
        ("missing", "hello.txt is missing"),
        ("extra", "more.txt does not belong to it"),
        ("mark", "DONE.json is empty"),
        ("folder", "it is a link to nowhere"),
    ],
)
def test_what_is_damaged_is_named_and_set_aside_and_made_again(
    tmp_path: Path, how: str, reason: str, finds: bool
) -> None:
    """Also by who only wants to find."""
    said: list[str] = []
    store = Store(tmp_path, said.append)
    made = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    hurt(made.path, how)
    assert store.find("thing", KEY_SETTINGS) is None
    said.clear()
    again = (store.only_found() if finds else store).get_or_make("thing", KEY_SETTINGS, write_hello)
    assert (again.key, again.digest, again.reused) == (made.key, made.digest, False)
    assert again.file("hello.txt").read_text() == "hello"
    aside = tmp_path / "damaged" / f"thing-{made.key}"
    assert said == [
        f"thing {made.key}: damaged ({reason}), set aside as {aside}",
        f"thing {made.key}: making",
    ]
    assert os.path.lexists(aside)
    assert store.get_or_make("thing", KEY_SETTINGS, refuse).reused


def test_of_several_only_the_damaged_are_made_again(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), list[list[int]]()
    made = made_of(store, MEMBERS, write_indices)
    made[2].file("index.txt").write_text("3")

    def make(folders: Mapping[int, Path], scratch: Path) -> None:
        calls.append(sorted(folders))
        write_indices(folders, scratch)

    again = made_of(store, MEMBERS, make)
    assert calls == [[2]]
    assert [one.digest for one in again] == [one.digest for one in made]


@pytest.mark.parametrize("call", ["rename", "mkdir"])
def test_what_cannot_be_set_aside_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = Store(tmp_path)
    made = store.get_or_make("thing", KEY_SETTINGS, write_hello)
    hurt(made.path, "flipped")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(made.path))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, read_only)
        with pytest.raises(
            UserError, match=rf"{made.path} is damaged: hello\.txt is .*cannot be set aside \(Read-only"
        ):
            store.get_or_make("thing", KEY_SETTINGS, refuse)
    assert made.file("hello.txt").read_text() == "hellp"


def test_a_result_that_was_damaged_before_it_was_in_its_place_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plain = Store(tmp_path), os.replace

    def dies(source: Path, target: Path) -> None:
        if Path(source).name == "result":
            raise KeyboardInterrupt
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make("thing", KEY_SETTINGS, write_hello)
    [result] = finished(tmp_path)
    (result / "hello.txt").write_text("")
    assert store.get_or_make("thing", KEY_SETTINGS, write_hello).file("hello.txt").read_text() == "hello"


@pytest.mark.parametrize("name", ["", "result", "scratch"])
@pytest.mark.parametrize("what", ["link", "file"])
def test_whatever_lies_where_scratch_should_be_is_no_obstacle(tmp_path: Path, name: str, what: str) -> None:
    store = Store(tmp_path)
    key = store._key(KEY_SETTINGS)
    path = tmp_path / "unfinished" / f"thing-{key}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if what == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text("in the way")

    def make(folder: Path, scratch: Path) -> None:
        (scratch / "checkpoint").touch()
        write_hello(folder, scratch)

    assert store.get_or_make("thing", KEY_SETTINGS, make).file("hello.txt").read_text() == "hello"
    assert not (tmp_path / "unfinished" / f"thing-{key}").exists()


def test_a_place_where_no_artifact_can_go_is_refused_before_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "thing").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        Store(tmp_path).get_or_make("thing", KEY_SETTINGS, refuse)


# -- several at once

MEMBERS = [{"seed": seed} for seed in range(4)]


def write_indices(folders: Mapping[int, Path], _: Path) -> None:
    for i, folder in folders.items():
        (folder / "index.txt").write_text(str(i))


def refuse_all(*_: object) -> None:
    raise AssertionError("made although all were there")


def test_several_made_in_one_go_are_what_each_is_alone(tmp_path: Path) -> None:
    calls: list[list[int]] = []

    def make(folders: Mapping[int, Path], scratch: Path) -> None:
        assert scratch.is_dir()
        assert all(folder.is_dir() and not list(folder.iterdir()) for folder in folders.values())
        calls.append(sorted(folders))
        write_indices(folders, scratch)

    together, alone = Store(tmp_path / "together"), Store(tmp_path / "alone")
    first = made_of(together, [MEMBERS[2], MEMBERS[0]], make)
    found = made_of(together, MEMBERS, make)
    assert calls == [[0, 1], [1, 3]]
    assert [artifact.reused for artifact in found] == [True, False, True, False]
    assert (found[0], found[2]) == (replace(first[1], reused=True), replace(first[0], reused=True))
    for i, (text, key_settings) in enumerate(zip(["1", "1", "0", "3"], MEMBERS, strict=True)):
        same = alone.get_or_make("thing", key_settings, partial(write_this, text))
        assert (same.key, same.digest) == (found[i].key, found[i].digest)
        names = [sorted(path.name for path in artifact.path.iterdir()) for artifact in (same, found[i])]
        assert names == [[DONE, "index.txt", "key.json"]] * 2
    assert together.get_or_make_many("thing", MEMBERS, refuse_all) == [replace(one, reused=True) for one in found]
    assert not [path for path in (tmp_path / "together" / "unfinished").iterdir() if path.is_dir()]
    with pytest.raises(NotMade, match="thing"):
        together.only_found().get_or_make_many("thing", [MEMBERS[0], {"seed": 9}], refuse_all)


def made_of(store: Store, keys_settings: Sequence[Mapping[str, Any]], make: Callable[..., None]) -> list[Artifact]:
    """Several artifacts, none of which is missing."""
    found = [one for one in store.get_or_make_many("thing", keys_settings, make) if one is not None]
    assert len(found) == len(keys_settings)
    return found


def write_this(text: str, folder: Path, _: Path) -> None:
    write_text(folder, text)


def write_text(folder: Path, text: str) -> None:
    (folder / "index.txt").write_text(text)


def test_a_key_given_twice_is_made_once(tmp_path: Path) -> None:
    a, b, c = made_of(Store(tmp_path), [MEMBERS[0], MEMBERS[1], dict(MEMBERS[0])], write_indices)
    assert a == c
    assert a.key != b.key
    assert Store(tmp_path).get_or_make_many("thing", [], refuse_all) == []


def test_what_make_gives_up_is_no_artifact_and_the_others_are(tmp_path: Path) -> None:
    def make(folders: Mapping[int, Path], _: Path) -> None:
        write_indices(folders, _)
        shutil.rmtree(folders[1])

    store = Store(tmp_path)
    found = store.get_or_make_many("thing", MEMBERS, make)
    assert [artifact is None for artifact in found] == [False, True, False, False]
    assert store.find("thing", MEMBERS[1]) is None
    assert not [path for path in (tmp_path / "unfinished").iterdir() if path.is_dir()]


def test_scratch_of_several_outlives_a_failure_and_belongs_to_those_that_are_missing(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), list[bool]()

    def fail(folders: Mapping[int, Path], scratch: Path) -> None:
        seen.append((scratch / "checkpoint").exists())
        (scratch / "checkpoint").write_text("epoch 3")
        write_indices(folders, scratch)
        raise RuntimeError("out of luck")

    for wanted in (MEMBERS, list(reversed(MEMBERS)), MEMBERS[:2]):
        with pytest.raises(RuntimeError, match="out of luck"):
            store.get_or_make_many("thing", wanted, fail)
    assert seen == [False, True, False]
    assert finished(tmp_path) == []
    found = store.get_or_make_many("thing", MEMBERS, write_indices)
    assert [artifact.file("index.txt").read_text() for artifact in found if artifact] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("renamed", [0, 1, 3])
def test_results_that_were_whole_when_a_kill_came_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    store, plain, left = Store(tmp_path), os.replace, [renamed]

    def dies(source: Path, target: Path) -> None:
        if Path(source).name == "result":
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make_many("thing", MEMBERS, write_indices)
    assert sum(store.find("thing", key_settings) is not None for key_settings in MEMBERS) == renamed
    # Alone or together.
    store.get_or_make("thing", MEMBERS[0], refuse)
    found = store.get_or_make_many("thing", MEMBERS, refuse_all)
    assert [artifact.file("index.txt").read_text() for artifact in found if artifact] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("wanted", [MEMBERS[:1], MEMBERS])
def test_scratch_goes_before_results_are_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[dict[str, int]]
) -> None:
    """A kill between the two would leave it behind, as nobody looks for the scratch of what is there."""
    store, plain, scratches = Store(tmp_path), shutil.rmtree, list[Path]()

    def make(folders: Mapping[int, Path], scratch: Path) -> None:
        (scratch / "checkpoint").write_text("epoch 3")
        scratches.append(scratch)
        write_indices(folders, scratch)

    def dies(path: Path, **options: Any) -> None:
        if path in scratches:
            raise KeyboardInterrupt
        plain(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make_many("thing", wanted, make)
    assert not any(store.find("thing", key_settings) for key_settings in wanted)
    found = store.get_or_make_many("thing", wanted, refuse_all)
    assert [artifact.reused for artifact in found if artifact] == [True] * len(wanted)
    assert not [path for path in (tmp_path / "unfinished").iterdir() if path.is_dir()]


def test_a_kill_while_results_are_marked_leaves_the_scratch_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plain, left, seen = Store(tmp_path), artifacts._seal, [2], list[bool]()

    def make(folders: Mapping[int, Path], scratch: Path) -> None:
        assert all(not list(folder.iterdir()) for folder in folders.values())
        seen.append((scratch / "checkpoint").exists())
        (scratch / "checkpoint").write_text("epoch 3")
        write_indices(folders, scratch)

    def dies(folder: Path, key_settings: Mapping[str, Any]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        plain(folder, key_settings)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_seal", dies)
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make_many("thing", MEMBERS, make)
    found = store.get_or_make_many("thing", MEMBERS, make)
    assert seen == [False, True]
    assert [artifact.file("index.txt").read_text() for artifact in found if artifact] == ["0", "1", "2", "3"]
    assert not [path for path in (tmp_path / "unfinished").iterdir() if path.is_dir()]


def _want_several(root: Path, wanted: list[int]) -> None:
    def make(folders: Mapping[int, Path], _: Path) -> None:
        for i, folder in folders.items():
            with (root / "calls").open("a") as calls:
                calls.write(f"{wanted[i]}\n")
            write_text(folder, str(wanted[i]))
        time.sleep(0.5)  # long enough for the others to arrive

    keys_settings = [{"seed": seed} for seed in wanted]
    found = made_of(Store(root / "store"), keys_settings, make)
    texts = [artifact.file("index.txt").read_text() for artifact in found]
    _answer(root, list(zip(wanted, texts, strict=True)))


@pytest.mark.slow
def test_processes_whose_groups_overlap_make_each_once_and_never_wait_for_each_other(tmp_path: Path) -> None:
    groups = [[0, 1, 2, 3], [5, 4, 3, 2], [3, 0, 5], [1]]
    got = _answers(tmp_path, [Rank(_want_several, (tmp_path, group)) for group in groups])
    assert sorted((tmp_path / "calls").read_text().split()) == ["0", "1", "2", "3", "4", "5"]
    assert all(text == str(seed) for group in got for seed, text in group)


# -- files


def test_tables_keep_infinities_missing_numbers_and_awkward_text(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "class": ["NA", "null", 'a "quoted", name', "two\nlines", "nan", "<b>&amp;", " spaces "],
            "alpha": [np.inf, -np.inf, np.nan, 0.1, 1e-300, 1 / 3, 5.0],
            "latent": [1, 2, 3, 4, 5, 6, 7],
            "separates": [True, False, True, False, True, False, True],
        }
    )
    write_table(tmp_path / "t.csv", frame)
    back = read_table(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(back, frame, check_exact=True, check_dtype=False)
    assert back["separates"].dtype == bool
    assert back["latent"].dtype == np.int64


@pytest.mark.parametrize(
    "names", [["01", "2", "10"], ["inf", "nan", "-inf"], ["True", "False", "True"], ["", "NA", "x"]]
)
def test_names_that_look_like_something_else_stay_names(tmp_path: Path, names: list[str]) -> None:
    frame = pd.DataFrame({"class": names, "target": names, "top_class": names, "latents": ["3", "4; 5", "6"]})
    write_table(tmp_path / "t.csv", frame)
    back = read_table(tmp_path / "t.csv")
    assert [list(back[column]) for column in frame] == [names, names, names, ["3", "4; 5", "6"]]
    assert all(isinstance(value, str) for column in back for value in back[column])


FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\tx",
    "\nx",
    "=",
    "-",
    "'",
    "''",
    "'=1",
    "＝1",
    "'x",
    "a=b",
]


def test_no_name_is_a_formula_in_a_spreadsheet_and_all_come_back(tmp_path: Path) -> None:
    frame = pd.DataFrame({"class": FORMULAS, "=own": FORMULAS, "value": np.linspace(-1, 1, len(FORMULAS))})
    frame["mixed"] = [*FORMULAS[:3], *([-0.5, None] * len(FORMULAS))[: len(FORMULAS) - 3]]
    before = frame.copy(deep=True)
    write_table(tmp_path / "t.csv", frame)
    pd.testing.assert_frame_equal(frame, before)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    numbers = [cell for cell in cells if cell[:1] in {*"+-"}]
    assert all(float(cell) < 0 for cell in numbers)
    assert numbers.count("-0.5") > 3
    assert not [cell for cell in cells if cell not in numbers and cell[:1] in {*"=+-@\t\r\n＝＋－＠"}]
    back = read_table(tmp_path / "t.csv")
    assert list(back) == list(frame)
    assert list(back["class"]) == list(back["=own"]) == FORMULAS
    assert back["value"].tolist() == frame["value"].tolist()
    assert list(back["mixed"][:4]) == [*FORMULAS[:3], "-0.5"]


def test_a_carriage_return_does_not_begin_a_row(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", pd.DataFrame({"class": ["a\r=1+1", "\r\nb", "c\rd"]}))
    assert b"\r" not in (tmp_path / "t.csv").read_bytes()
    assert list(read_table(tmp_path / "t.csv")["class"]) == ["a\n=1+1", "\nb", "c\nd"]


def test_texts_that_are_numbers_stay_numbers_in_a_spreadsheet(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", pd.DataFrame({"class": ["-1", "+2e3", "-inf"], "value": [-0.5, 1.0, -np.inf]}))
    assert (tmp_path / "t.csv").read_text().split() == ["class,value", "-1,-0.5", "+2e3,1.0", "-inf,-inf"]
    assert list(read_table(tmp_path / "t.csv")["class"]) == ["-1", "+2e3", "-inf"]


@pytest.mark.parametrize("folder", ["salve", "experiments"])
def test_tables_are_written_in_one_place(folder: str) -> None:
    """Whatever calls ``to_csv`` itself has to say that it is not for a spreadsheet, or that it is made for one."""
    written = [
        (path.name, line.strip())
        for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if ".to_csv(" in line
    ]
    assert written == (
        [
            ("artifacts.py", "for_spreadsheets(frame).to_csv(path, index=False)"),
            ("control.py", 'lines.to_csv(file, header=not file.tell(), index=False, float_format="%.6g")'),
        ]
        if folder == "salve"
        else []
    )


def test_numbers_come_back_to_the_last_bit(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal(2000) * 10.0 ** np.arange(-1000, 1000).clip(-300, 300)
    write_table(tmp_path / "t.csv", pd.DataFrame({"value": numbers}))
    assert read_table(tmp_path / "t.csv")["value"].tolist() == numbers.tolist()


def test_a_table_of_an_artifact_is_read_as_it_was_written(tmp_path: Path) -> None:
    frame = pd.DataFrame({"class": ["NA", "x"], "alpha": [np.inf, np.nan]})
    made = Store(tmp_path).get_or_make("thing", KEY_SETTINGS, lambda folder, _: write_table(folder / "t.csv", frame))
    pd.testing.assert_frame_equal(made.table("t.csv"), frame, check_dtype=False)


def test_tensors_round_trip_with_their_header_and_always_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"z": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([torch.nan, -0.0, torch.inf])}
    paths = [tmp_path / f"{i}.safetensors" for i in range(6)]
    for i, path in enumerate(paths):
        given = tensors if i % 2 else dict(reversed(tensors.items()))
        save_tensors(path, given, {"salve": '{"variant": "topk"}'})
    assert digest_of_tensors(load_tensors(paths[0])) == digest_of_tensors(tensors)
    assert read_header(paths[0]) == {"salve": '{"variant": "topk"}'}
    assert len({digest_of_file(path) for path in paths}) == 1


def test_a_header_whose_bytes_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one entry"):
        save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)}, {"variant": "topk", "k": "2"})
    assert not (tmp_path / "t.safetensors").exists()


def test_records_round_trip_and_only_objects_are_records(tmp_path: Path) -> None:
    record = {"name": "Église, <b>", "values": [1, 2.5, None], "nested": {"a": True}}
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json") == record
    (tmp_path / "list.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"list\.json"):
        read_record(tmp_path / "list.json")


def test_an_artifact_reads_its_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3)}
    made: Artifact = Store(tmp_path).get_or_make(
        "thing", KEY_SETTINGS, lambda folder, _: save_tensors(folder / "t.safetensors", tensors)
    )
    assert made.tensors("t.safetensors")["a"].tolist() == [0, 1, 2]


def write_a(text: str, folder: Path, _: Path) -> None:
    (folder / "a").write_text(text)


def test_results_of_an_older_revision_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.get_or_make("table", {"x": 1}, partial(write_a, "old"))
    assert store.find("table", {"x": 1}) is not None
    monkeypatch.setattr("salve.artifacts.REVISION", artifacts.REVISION + 1)
    assert store.find("table", {"x": 1}) is None
    made = store.get_or_make("table", {"x": 1}, partial(write_a, "new"))
    assert made.file("a").read_text() == "new"


def test_a_full_disk_is_the_systems_error_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.safetensors"))


def test_a_store_that_cannot_be_written_says_so_at_once(tmp_path: Path) -> None:
    Store(tmp_path / "store").check_writable()
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Not a directory"):
        Store(tmp_path / "file" / "store").check_writable()
