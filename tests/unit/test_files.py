"""Files are there as a whole or not at all, and what is not what was written is seen."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from salve import files
from salve.files import (
    cache_folder,
    digest_of_file,
    file_digests,
    forget,
    is_kept,
    keep,
    move_memory,
    read_record,
    write_whole,
    written_whole,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes are read from here on."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return digest_of_file(path)

    monkeypatch.setattr(files, "digest_of_file", noted)
    return names


# -- written as a whole


@pytest.mark.skipif(os.name != "posix", reason="folders can be flushed on POSIX alone")
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "a", "text")
    assert done == [f"flush .a.{os.getpid()}.unfinished", "rename to a", f"flush {tmp_path.name}"]
    assert (tmp_path / "a").read_text() == "text"


def failing(path: Path) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError("in the middle")


def test_what_fails_leaves_what_there_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "before")
    with pytest.raises(RuntimeError):
        failing(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), "text")
    assert (tmp_path / ("n" * 255)).read_text() == "text"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"^r\.json is empty\.$"),
        (b"{", r"^r\.json is no JSON\.$"),
        (b"\xff\xfe", r"^r\.json is no JSON\.$"),
        (b"[1]", r"^r\.json holds no JSON object\.$"),
        (b"[" * 100_000, r"^r\.json is nested too deeply\.$"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_record(tmp_path / "r.json")


# -- scratch


def kept(path: Path, text: str) -> None:
    (path.parent / "new").write_text(text)
    keep(path.parent / "new", path)


def test_scratch_counts_only_as_it_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    assert not is_kept(path)
    kept(path, "one")
    assert is_kept(path)
    path.write_text("on")  # cut
    assert not is_kept(path)
    kept(path, "two")
    assert is_kept(path)
    (tmp_path / "other").write_text("foreign")
    os.replace(tmp_path / "other", path)
    assert not is_kept(path)
    kept(path, "three")
    path.with_name("shard.sha256").write_bytes(b"\xff")
    assert not is_kept(path)


def test_a_kill_between_the_digest_and_the_name_keeps_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "last.ckpt", os.replace
    kept(path, "epoch 1")

    def dies(source: Path, target: Path) -> None:
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            kept(path, "epoch 2")
    assert is_kept(path)
    assert path.read_text() == "epoch 1"
    kept(path, "epoch 3")
    assert is_kept(path)
    # What was kept two times before is old, and no longer what belongs here.
    path.write_text("epoch 1")
    assert not is_kept(path)


# -- what is remembered


def test_own_files_are_remembered_at_once_and_go_along_when_their_folder_is_renamed(
    tmp_path: Path, read: list[str]
) -> None:
    before, after = tmp_path / "unfinished", tmp_path / "final"
    before.mkdir()
    (before / "a").write_text("a")
    expected = [hashlib.sha256(b"a").hexdigest()]
    assert file_digests(before, ["a"], own=True) == expected
    before.rename(after)
    move_memory(before, after)
    assert file_digests(after, ["a"]) == expected
    assert read == ["a"]
    assert file_digests(after, ["a"], reread=True) == expected
    assert read == ["a", "a"]
    forget(after)
    assert file_digests(after, ["a"]) == expected
    assert read == ["a", "a", "a"]


def test_the_memory_of_a_folder_that_was_there_before_does_not_stay(tmp_path: Path, cache: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
        file_digests(tmp_path / name, ["a"], own=True)
    move_memory(tmp_path / "one", tmp_path / "two")
    [memory] = cache.iterdir()
    assert json.loads(memory.read_text())["files"]["a"][-1] == hashlib.sha256(b"one").hexdigest()
    move_memory(tmp_path / "nothing", tmp_path / "two")
    assert not list(cache.iterdir())


def test_a_file_that_cannot_be_read_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        file_digests(tmp_path, ["gone"])
    assert caught.value.filename == str(tmp_path / "gone")
