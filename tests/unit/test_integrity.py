"""Whatever happens to a file of an artifact or of a run's record is seen, and named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from salve import files
from salve.artifacts import DONE, Artifact, Store, digest_of_file, read_record, write_record
from salve.editing.folders import classifier_of
from salve.files import file_digests
from salve.integrity import (
    MANIFEST,
    METRICS,
    SETTINGS,
    Damaged,
    artifacts_of_run,
    check_artifact,
    check_file,
    damage_of,
    damage_of_run,
    read_manifest,
    sealed,
    set_aside,
)
from salve.sae import load_sae, make_sae, save_sae
from salve.types import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    def make(folder: Path, _: Path) -> None:
        (folder / "a.csv").write_text("class\nx\n")
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(bytes(100))

    return Store(tmp_path / "store").get_or_make("thing", {"a": 1}, make)


def flip(path: Path) -> None:
    """Change one bit and nothing else that an ordinary look would show."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HURTS: list[Callable[[Path], None]] = [flip, empty, Path.unlink, lead_nowhere, become_a_folder]


@pytest.mark.parametrize("name", ["a.csv", "deep/b.bin", "key.json", DONE])
@pytest.mark.parametrize("hurt", HURTS)
def test_every_file_of_an_artifact_is_checked(artifact: Artifact, name: str, hurt: Callable[[Path], None]) -> None:
    assert damage_of(artifact.path) == ""
    hurt(artifact.path / name)
    assert damage_of(artifact.path).startswith(f"{name} ")


@pytest.mark.parametrize("name", ["train-00001.safetensors", "deep/c.csv", ".hidden.json"])
def test_what_does_not_belong_to_an_artifact_is_damage(artifact: Artifact, name: str) -> None:
    (artifact.path / name).write_text("more")
    assert damage_of(artifact.path) == f"{name} does not belong to it"


def test_a_linked_folder_within_an_artifact_is_damage(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "linked").symlink_to(tmp_path)
    assert damage_of(artifact.path) == "linked does not belong to it"


def test_what_file_managers_leave_is_none(artifact: Artifact) -> None:
    for name in (".DS_Store", "Thumbs.db", ".nfs0001"):
        (artifact.path / "deep" / name).write_text("")
    assert damage_of(artifact.path) == ""


def test_no_folder_and_a_link_to_nowhere_are_damage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert damage_of(tmp_path / "file") == "it is no folder"
    assert damage_of(tmp_path / "link") == "it is a link to nowhere"


def test_an_artifact_without_the_digest_of_its_key_is_damaged(artifact: Artifact) -> None:
    done = read_record(artifact.file(DONE))
    del done["key_settings"]
    write_record(artifact.file(DONE), done)
    assert damage_of(artifact.path) == "DONE.json is not what was written"


def test_a_second_look_reads_nothing(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(path: Path) -> str:
        read.append(path.name)
        return digest_of_file(path)

    monkeypatch.setattr(files, "digest_of_file", noted)
    assert damage_of(artifact.path) == ""
    assert read == []  # it was remembered when it was made
    assert damage_of(artifact.path, reread=True) == ""
    assert sorted(read) == ["a.csv", "b.bin", "key.json"]


def test_a_damaged_memory_condemns_no_artifact(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "digest_of_file", lambda _: "0" * 64)
    file_digests(artifact.path, ["a.csv"], reread=True, own=True)
    monkeypatch.undo()
    assert damage_of(artifact.path) == ""


def test_what_is_read_by_its_path_is_refused_when_damaged(artifact: Artifact, tmp_path: Path) -> None:
    check_artifact(artifact.path)
    check_file(artifact.file("a.csv"))
    flip(artifact.file("a.csv"))
    for check, path in ((check_artifact, artifact.path), (check_file, artifact.file("a.csv"))):
        with pytest.raises(UserError, match=rf"{artifact.path} is damaged: a\.csv is not what was written; the comm"):
            check(path)
    empty(artifact.file(DONE))
    with pytest.raises(UserError, match=r"damaged: DONE\.json is empty"):
        check_file(artifact.file("a.csv"))
    with pytest.raises(UserError, match="There is no artifact"):
        check_artifact(tmp_path / "gone")
    (tmp_path / "own.csv").write_text("nobody's")
    check_file(tmp_path / "own.csv")


def test_an_sae_of_an_artifact_is_refused_when_damaged(tmp_path: Path) -> None:
    sae = make_sae("linear_l1", 4, 3)
    made = Store(tmp_path).get_or_make("sae", {}, lambda folder, _: save_sae(folder / "sae.safetensors", sae))
    assert load_sae(made.file("sae.safetensors")).dictionary_size == 3
    flip(made.file("sae.safetensors"))
    with pytest.raises(UserError, match=r"is damaged: sae\.safetensors is not what was written"):
        load_sae(made.file("sae.safetensors"))


def test_a_classifier_of_a_run_is_refused_when_damaged(run: Path) -> None:
    def make(folder: Path, _: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(100))

    made = Store(run.parent).get_or_make("classifier", {}, make)
    write_record(run / MANIFEST, {"artifacts": {"classifier": {"path": f"../classifier/{made.key}"}}})
    assert classifier_of([run]).samefile(made.file("model.safetensors"))
    flip(made.file("model.safetensors"))
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors is not what was written"):
        classifier_of([run])


def write_anew(folder: Path, _: Path) -> None:
    (folder / "a.csv").write_text("anew")


def test_nothing_that_was_set_aside_is_written_over(artifact: Artifact, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for text in ("first", "second", "third"):
        (artifact.path / "a.csv").write_text(text)
        set_aside(store.root, "thing", artifact.key)
        store.get_or_make("thing", {"a": 1}, write_anew)
    names = [f"thing-{artifact.key}{number}" for number in ("", "-2", "-3")]
    found = [(store.root / "damaged" / name / "a.csv").read_text() for name in names]
    assert found == ["first", "second", "third"]


# -- runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    for name in (SETTINGS, "index.html", "figures/a.png"):
        (folder / name).write_text(f"content of {name}")
    write_record(folder / METRICS, {"fve": 0.5})
    names = [SETTINGS, METRICS, "index.html", "figures/a.png"]
    record = {
        "seed": 0,
        "files": dict(zip(names, file_digests(folder, names), strict=True)),
        "artifacts": {"sae": {"key": "k", "digest": "d", "path": "../artifacts/sae/k"}},
    }
    write_record(folder / MANIFEST, sealed(record))
    return folder


@pytest.mark.parametrize("name", [MANIFEST, SETTINGS, METRICS])
@pytest.mark.parametrize("hurt", HURTS)
def test_the_record_of_a_run_is_checked(run: Path, name: str, hurt: Callable[[Path], None]) -> None:
    assert damage_of_run(run) == ""
    hurt(run / name)
    assert damage_of_run(run).startswith(f"{name} ")


@pytest.mark.parametrize("name", ["index.html", "figures/a.png"])
def test_the_rest_of_a_run_is_checked_when_all_is_asked_for(run: Path, name: str) -> None:
    flip(run / name)
    assert damage_of_run(run) == ""
    assert damage_of_run(run, names=None) == f"{name} is not what was written"


def test_a_manifest_of_which_a_name_or_number_was_changed_is_damaged(run: Path) -> None:
    assert artifacts_of_run(run) == {"sae": run.parent / "artifacts/sae/k"}
    text = (run / MANIFEST).read_text()
    for old, new in (('"seed": 0', '"seed": 1'), ('"files"', '"filez"'), ('"digest"', '"digesu"'), ("sae/k", "sae/j")):
        (run / MANIFEST).write_text(text.replace(old, new))
        with pytest.raises(Damaged, match=r"manifest\.json is not what was written"):
            read_manifest(run)
    for content in ("{}", '{"artifacts": 3}', '{"artifacts": {"sae": 1}}'):
        (run / MANIFEST).write_text(content)
        with pytest.raises(Damaged, match=r"manifest\.json names no artifacts"):
            read_manifest(run)
