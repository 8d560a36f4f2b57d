"""Files are read again exactly when they may have changed."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from salve import files
from salve.data.digests import file_digests
from salve.files import cache_folder
from salve.types import UserError


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that are read from now on; digests are cached in a folder of the test."""
    names: list[str] = []
    digest = files.digest_of_file

    def noted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(files, "digest_of_file", noted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files whose times say that they were written a day ago."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 100)
    later = time.time_ns() + 86_400 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    return folder


def expected(root: Path, *names: str) -> list[str]:
    return [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names]


def test_files_are_read_once(root: Path, read: list[str]) -> None:
    for _ in range(2):
        assert file_digests(root, ["b", "a"]) == expected(root, "b", "a")
    assert sorted(read) == ["a", "b"]
    assert file_digests(root, ["a"]) == expected(root, "a")
    (root.parent / "link").symlink_to(root)
    assert file_digests(root.parent / "link", ["b"]) == expected(root, "b")
    assert len(read) == 2


def test_long_reading_is_announced_once(
    root: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file_digests(root, ["a"])
    assert caplog.messages == []
    monkeypatch.setattr(files, "MUCH", 199)
    file_digests(root, ["a", "b"])  # a is known: 100 bytes are read
    assert caplog.messages == []
    cache_folder().rename(root.parent / "elsewhere")
    for _ in range(2):
        file_digests(root, ["a", "b"])
    assert caplog.messages == ["Reading 2 images (0.0 GB) once, to find results that were made from them."]


def test_changed_files_are_read_again(root: Path, read: list[str]) -> None:
    file_digests(root, ["a", "b"])
    read.clear()
    stat = (root / "a").stat()
    (root / "a").write_bytes(b"c" * 100)
    now = stat
    while now.st_ctime_ns == stat.st_ctime_ns:  # some clocks stand still for milliseconds
        os.utime(root / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as tools do that keep times
        now = (root / "a").stat()
        time.sleep(0.001)
    assert (now.st_mtime_ns, now.st_size, now.st_ino) == (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    assert file_digests(root, ["a", "b"]) == expected(root, "a", "b")
    assert read == ["a"]
    os.replace(root / "b", root / "a")
    assert file_digests(root, ["a"]) == expected(root, "a")
    assert read == ["a", "a"]


def test_files_that_were_just_written_are_not_remembered(
    root: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of file systems are coarse: a second write within milliseconds may not change any time."""
    now = (root / "a").stat().st_ctime_ns + 10**9
    monkeypatch.setattr(time, "time_ns", lambda: now)
    file_digests(root, ["a"])
    file_digests(root, ["a"])
    assert read == ["a", "a"]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", '{"version": 1}', '{"version": 1, "files": {"a": []}}', '{"version": 1, "files": {"a": 5}}'),
        '{"version": 99, "files": {"a": [1]}}',
        '{"version": 1, "files": {"a": 5}}',
    ],
)
def test_a_damaged_memory_is_no_obstacle(root: Path, read: list[str], content: str) -> None:
    file_digests(root, ["a"])
    [memory] = cache_folder().iterdir()
    memory.write_text(content)
    assert file_digests(root, ["a"]) == expected(root, "a")
    assert read == ["a", "a"]
    assert json.loads(memory.read_text())["files"]["a"][-1] == expected(root, "a")[0]


def test_without_a_place_for_the_memory_everything_is_read(
    root: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    for _ in range(2):
        assert file_digests(root, ["a"]) == expected(root, "a")

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert file_digests(root, ["a"]) == expected(root, "a")
    assert read == ["a"] * 3


def test_the_memory_lies_where_users_caches_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other/salve/files"
    for unusable in ("", "relative"):  # as the XDG specification has it
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == tmp_path / ".cache/salve/files"


def test_files_that_cannot_be_read_are_named(root: Path, read: list[str]) -> None:
    with pytest.raises(UserError, match=r"The image .*gone cannot be read \(No such file"):
        file_digests(root, ["gone"])
    (root / "folder").mkdir()
    with pytest.raises(UserError, match=r"The image .*folder cannot be read \(Is a directory"):
        file_digests(root, ["folder"])
