"""``salve-store`` lists, verifies and clears an output folder, and leaves alone what a process works on."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salve.artifacts import Artifact, Store, digest_of_file, read_record, write_record
from salve.integrity import MANIFEST, METRICS, SETTINGS, USES, sealed
from salve.store.cli import age, main

OLD = time.time() - 10 * 86400


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Output:
    """An output folder with an artifact that a sweep's run uses, one that a single run uses, and one that none does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "artifacts")
        self.shared, self.own, self.idle = (self.make("sae", seed) for seed in range(3))
        self.run("sweeps/lambda/aaaa", self.shared)
        self.run("sweeps/lambda/bbbb", self.shared)
        self.run("runs/quickstart/now", self.own)

    def make(self, kind: str, seed: int) -> Artifact:
        return self.store.get_or_make(kind, {"seed": seed}, lambda folder, _: self.write(folder))

    @staticmethod
    def write(folder: Path) -> None:
        (folder / "sae.safetensors").write_bytes(bytes(2000))

    def run(self, name: str, *artifacts: Artifact, finished: bool = True, log: str = "") -> Path:
        run = self.folder / name
        run.mkdir(parents=True)
        (run / SETTINGS).write_text("seed: 0")
        (run / "salve.log").write_text(log)
        if finished:
            write_record(run / METRICS, {})
            made = {one.kind: {"key": one.key, "digest": one.digest, "path": ""} for one in artifacts}
            files = {METRICS: digest_of_file(run / METRICS)}
            write_record(run / MANIFEST, sealed({"artifacts": made, "files": files}))
        return run

    def scratch(self, name: str, *, lock: bool = True) -> Path:
        place = self.store.root / "unfinished" / name
        (place / "scratch").mkdir(parents=True)
        (place / "scratch" / "last.ckpt").write_bytes(bytes(5000))
        if lock:
            place.with_name(f"{name}.lock").touch()
        return place

    def grow_old(self) -> None:
        for path in self.folder.rglob("*"):
            os.utime(path, (OLD, OLD), follow_symlinks=False)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path / "outputs")


Said = pytest.CaptureFixture[str]


def line_with(text: str, *parts: str) -> str:
    [line] = [line for line in text.splitlines() if all(part in line for part in parts)]
    return line


# -- ls


def test_it_lists_artifacts_with_their_users_and_totals(output: Output, capsys: Said) -> None:
    output.scratch("sae-0123456789abcdef")
    output.grow_old()
    assert main(["ls", str(output.folder)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["kind", "key", "size", "age", "used", "by"]
    keys = [line.split()[1] for line in said.splitlines()[1:4]]
    assert keys == sorted(one.key for one in (output.shared, output.own, output.idle))
    assert line_with(said, output.shared.key).endswith("10 d  sweeps/lambda (2 runs)")
    assert line_with(said, output.own.key).endswith("runs/quickstart/now")
    assert line_with(said, output.idle.key).endswith("no run")
    size = sum(path.stat().st_size for path in output.idle.path.iterdir())
    assert line_with(said, output.idle.key).split()[2:4] == [f"{size / 1000:.3g}", "kB"]
    assert f"3 artifacts, {3 * size / 1000:.3g} kB; 1 of them used by no run, {size / 1000:.3g} kB." in said
    assert "unfinished: 1, 5 kB" in said
    assert "damaged" not in said


@pytest.mark.parametrize(
    ("name", "said"),
    [("gone", "There is no folder gone"), ("empty", "empty holds no artifacts"), ("file", "no folder")],
)
def test_what_is_no_output_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for action in ("ls", "verify", "gc"):
        assert main([action, name]) == 2
        assert said in capsys.readouterr().err
        assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    "arguments", [["ls", "--yes"], ["gc", "--set-aside"], ["verify", "--older-than", "1d"], ["gc", "--older-than", "x"]]
)
def test_options_go_with_their_action(arguments: list[str], capsys: Said) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "alone" in (said := capsys.readouterr().err) or "x is no age" in said


def test_ages_have_units() -> None:
    assert [age(text) for text in ("0", "2", "1.5d", "3h", "10m", "7s")] == [0, 172800, 129600, 10800, 600, 7]


# -- verify


def test_it_names_what_is_damaged_and_sets_it_aside_when_asked(output: Output, capsys: Said) -> None:
    assert main(["verify", str(output.folder)]) == 0
    assert "3 artifacts" in (said := capsys.readouterr().out)
    assert "3 runs were read: none damaged." in said
    file = output.own.file("sae.safetensors")
    stat = file.stat()
    file.write_bytes(bytes(1999) + b"\1")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (output.folder / "sweeps/lambda/bbbb" / METRICS).write_text("")
    assert main(["verify", str(output.folder)]) == 1
    said = capsys.readouterr().out
    assert f"sae/{output.own.key}: sae.safetensors is not what was written\n" in said
    assert "sweeps/lambda/bbbb: metrics.json is not what was written\n" in said
    assert "2 damaged" in said
    assert "--set-aside moves it now" in said
    assert output.own.path.is_dir()
    assert main(["verify", str(output.folder), "--set-aside"]) == 1
    aside = output.store.root / "damaged" / f"sae-{output.own.key}"
    assert f"set aside as {aside}" in capsys.readouterr().out
    assert (aside / "sae.safetensors").read_bytes()[-1] == 1
    assert main(["verify", str(output.folder)]) == 1
    assert f"runs/quickstart/now: its artifact sae/{output.own.key} is not there" in capsys.readouterr().out


def test_it_reads_everything_anew(output: Output, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage of a disk leaves size, times and inode as they were, so that the memory has the old digest."""
    file = output.own.file("sae.safetensors")
    before = os.stat(file)
    file.write_bytes(bytes(1999) + b"\1")
    plain = os.stat

    def same(path: Any, **options: Any) -> os.stat_result:
        return before if str(path) == str(file) else plain(path, **options)

    monkeypatch.setattr(os, "stat", same)
    assert output.store.find("sae", {"seed": 1}) is not None
    assert main(["verify", str(output.folder)]) == 1
    assert f"sae/{output.own.key}: sae.safetensors is not what was written" in capsys.readouterr().out
    assert output.store.find("sae", {"seed": 1}) is None  # what it has read is remembered


# -- gc


def test_a_dry_run_says_what_would_go_and_removes_nothing(output: Output, capsys: Said) -> None:
    output.scratch("sae-0123456789abcdef")
    output.grow_old()
    before = output.files()
    assert main(["gc", str(output.folder)]) == 0
    said = capsys.readouterr().out
    assert line_with(said, output.idle.key).endswith("no run uses it")
    assert "unfinished, and nobody works on it" in line_with(said, "sae-0123456789abcdef ")
    assert "4 locks that nobody holds" in said
    assert output.shared.key not in said
    assert "6 can go, " in said
    assert "Nothing was removed: --yes does so." in said
    assert output.files() == before


def test_it_removes_what_nobody_needs_and_nothing_else(output: Output, capsys: Said) -> None:
    output.scratch("sae-0123456789abcdef")
    output.scratch("sae-fedcba9876543210", lock=False)  # of several that were trained together
    leftovers = [
        output.folder / "sweeps/lambda/.sweep.json.999999999",
        output.folder / "sweeps/lambda/aaaa/.manifest.json.999999999.unfinished",
        output.store.root / "unfinished" / ".999999999.unfinished",
    ]
    for path in leftovers:
        path.write_text("half")
    damaged = output.make("features", 0)
    (damaged.path / "sae.safetensors").unlink()
    assert main(["verify", "--set-aside", str(output.folder)]) == 1
    (output.folder / "sweeps/lambda/.locks").mkdir()
    (output.folder / "sweeps/lambda/.locks/aaaa.lock").touch()
    output.grow_old()
    before = output.files()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    said = capsys.readouterr().out
    gone = before - output.files()
    expected = {str(path.relative_to(output.folder)) for path in (output.idle.path, *leftovers)}
    expected |= {f"artifacts/unfinished/sae-{key}" for key in ("0123456789abcdef", "fedcba9876543210")}
    expected |= {"sweeps/lambda/.locks/aaaa.lock", f"artifacts/damaged/features-{damaged.key}"}
    tops = {name for name in gone if not any(name.startswith(f"{other}/") for other in gone)}
    assert {
        name for name in tops if not (name.startswith("artifacts/unfinished") and name.endswith(".lock"))
    } == expected
    assert not list(output.store.root.glob("unfinished/*"))
    assert f"Removed: {len(tops)}, " in said
    assert output.store.find("sae", {"seed": 0}) is not None
    assert output.store.find("sae", {"seed": 1}) is not None
    assert output.store.find("sae", {"seed": 2}) is None
    assert main(["gc", str(output.folder), "--older-than", "0"]) == 0
    assert "Nothing can go." in capsys.readouterr().out


def test_what_a_used_artifact_is_made_of_stays(output: Output) -> None:
    part, idle = (output.make("method", seed) for seed in range(2))
    made_of = {"method": [part.key], "sae": [output.idle.key]}
    whole = output.store.get_or_make("compare", {}, lambda folder, _: write_record(folder / USES, made_of))
    damaged = output.store.get_or_make("compare", {"a": 1}, lambda folder, _: write_record(folder / USES, {"sae": 3}))
    output.run("runs/whole/now", whole)
    output.run("runs/damaged/now", damaged)
    output.grow_old()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert all(one.path.is_dir() for one in (part, output.idle, whole, damaged))
    assert not idle.path.exists()


def test_what_is_young_stays(output: Output, capsys: Said) -> None:
    place = output.scratch("sae-0123456789abcdef")
    output.grow_old()
    now = time.time()
    os.utime(place / "scratch" / "last.ckpt", (now, now))  # one new file in it makes all of it young
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert (place / "scratch" / "last.ckpt").is_file()
    assert not output.idle.path.exists()
    assert main(["gc", str(output.folder), "--yes", "--older-than", "0"]) == 0
    assert not place.exists()


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Set aside for the test to start; ended after it."""
    started: list[subprocess.Popen[str]] = []
    yield started  # type: ignore[misc]
    for process in started:
        process.communicate("", timeout=60)


@pytest.mark.parametrize("what", ["scratch", "together", "artifact"])
def test_what_another_process_has_locked_stays(output: Output, holder: list, capsys: Said, what: str) -> None:
    key = output.idle.key if what == "artifact" else "0123456789abcdef"
    place = output.scratch("sae-0123456789abcdef", lock=what != "together")
    guarded = output.idle.path if what == "artifact" else place
    if what == "together":  # one of those that are made together is locked by its own name
        key = output.idle.key
    lock = output.store.root / "unfinished" / f"sae-{key}.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    holder.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    output.grow_old()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert guarded.is_dir()
    assert lock.is_file()
    assert "left alone, since running processes have locked them" in capsys.readouterr().out
    process.communicate("", timeout=60)
    output.grow_old()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert not guarded.exists()


def test_what_an_unfinished_run_had_stays(output: Output, capsys: Said) -> None:
    """Its artifacts stand in no manifest yet; the log of a run with which it shared a job names them, too."""
    line = f"10:00:00  sae {output.idle.key}, 0123456789abcdef: making\n"
    (output.folder / "sweeps/lambda/aaaa/salve.log").write_text(line)
    waiting = output.run("sweeps/lambda/cccc", finished=False)
    output.grow_old()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert output.idle.path.is_dir()
    capsys.readouterr()
    assert main(["ls", str(output.folder)]) == 0
    assert line_with(capsys.readouterr().out, output.idle.key).endswith("sweeps/lambda (1 run)")
    shutil.rmtree(waiting)
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert not output.idle.path.exists()


def test_while_a_manifest_is_damaged_no_artifact_goes(output: Output, capsys: Said) -> None:
    manifest = output.folder / "runs/quickstart/now" / MANIFEST
    record = read_record(manifest)
    record["artifacts"]["sae"]["key"] = "0" * 16
    write_record(manifest, record)
    output.grow_old()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert output.own.path.is_dir()
    assert output.idle.path.is_dir()
    assert "runs/quickstart/now (manifest.json is not what was written)" in capsys.readouterr().out


def test_links_are_never_followed(output: Output, tmp_path: Path, capsys: Said) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "0123456789abcdef").mkdir(parents=True)
    (elsewhere / "0123456789abcdef" / "precious").write_text("mine")
    root = output.store.root
    (root / "unfinished" / "sae-0123456789abcdef").symlink_to(elsewhere)
    (root / "features").symlink_to(elsewhere)
    (root / "sae" / "0123456789abcdef").symlink_to(elsewhere / "0123456789abcdef")
    (root / "damaged").symlink_to(elsewhere)
    (output.folder / "runs" / "more").symlink_to(elsewhere)
    inside = output.scratch("sae-aaaaaaaaaaaaaaaa")
    (inside / "scratch" / "linked").symlink_to(elsewhere)
    output.grow_old()
    assert main(["gc", str(output.folder), "--yes"]) == 0
    assert f"{root / 'features'} is a link and was not looked into." in capsys.readouterr().out
    assert (elsewhere / "0123456789abcdef" / "precious").read_text() == "mine"
    assert not inside.exists()
    assert (root / "sae" / "0123456789abcdef").is_symlink()


def test_what_cannot_be_removed_is_said(output: Output, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    output.scratch("sae-0123456789abcdef")
    output.grow_old()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert main(["gc", str(output.folder), "--yes"]) == 1
    assert "sae-0123456789abcdef cannot be removed (Permission denied)." in capsys.readouterr().out
