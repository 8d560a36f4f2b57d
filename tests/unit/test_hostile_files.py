"""Files that are damaged, or made to harm whoever opens them, end in one sentence: no traceback, nothing written.

Memory is bounded because sizes are looked at before anything is read; the child of the last test has a limit besides.
"""

import base64
import collections
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from salve.backbones import read_tensors
from salve.editing.cli import main
from salve.sae import load_sae, make_sae, save_sae
from salve.types import UserError
from tests.unit.damages import archives, cut_and_flipped, headers, of_other_types, special_files
from tests.unit.test_edit_command import Studied, bits, metadata

pytestmark = pytest.mark.timeout(120)


def sentence_of(read: Callable[[], object]) -> str | None:
    """What is said of a file; None if it is read."""
    try:
        read()
    except UserError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, said[:200]
        assert len(said) < 2500, said[:200]
        return said
    return None


def all_refused(what: Iterable[tuple[str, Any]], read: Callable[[Any], object]) -> None:
    accepted = [name for name, content in what if sentence_of(partial(read, content)) is None]
    assert accepted == []


def said_by_command(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What ``salve-edit`` says as it refuses."""
    assert main([str(argument) for argument in arguments]) == 2, arguments
    said = capsys.readouterr().err
    assert said.startswith("salve-edit: ")
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    return said


# -- edit files


def test_edit_files_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With any damage: status 2, a sentence and no file written; or the right edit."""
    studied = Studied(tmp_path)
    file = studied.files[0]
    whole, record = file.read_bytes(), json.loads(file.read_text())
    assert main(["apply", str(file), str(studied.weights), str(studied.out("good"))]) == 0
    good = bits(studied.out("good"))
    # What these say is for people, or does not matter where all channels are gated.
    free = {"name", "backbone", "site", "sae", "edits.0.sign"}
    refused = 0
    texts = [(name, text.encode("utf-8", "surrogatepass")) for name, text in of_other_types(record)]
    for name, content in [*cut_and_flipped(whole), *texts]:
        file.write_bytes(content)
        if main(["apply", str(file), str(studied.weights), str(studied.out())]) == 0:
            assert bits(studied.out()) == good, name
            assert name.split(" ")[0] in free or name.startswith(("bit", "goes on")), name
            studied.out().unlink()
            capsys.readouterr()
            continue
        refused += 1
        said = capsys.readouterr().err
        assert said.startswith("salve-edit: "), name
        assert said.count("\n") == 1, name
        assert len(said) < 2500, name
        assert not studied.out().exists(), name
        assert not list(studied.root.glob(".*")), name
    assert refused > 300


def test_what_an_edit_file_must_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studied = Studied(tmp_path)
    (tmp_path / "special").mkdir()
    for _, path in special_files(tmp_path / "special", ".json"):
        for words in (["apply", path, studied.weights, studied.out()], ["show", path]):
            if not os.path.isdir(path):
                said_by_command(words, capsys)
    record = json.loads(studied.files[0].read_text())
    studied.files[0].write_text(json.dumps({**record, "contributions": [base64.b64encode(bytes(13 * 2**20)).decode()]}))
    said = said_by_command(["apply", studied.files[0], studied.weights, studied.out()], capsys)
    assert "a text may have at most 16,777,216" in said
    long = tmp_path / ("x" * 300 + ".safetensors")
    assert "name too long" in said_by_command(["apply", studied.files[1], long, studied.out()], capsys)
    pointing = {**record, "originals": "originals-0123456789ab.safetensors"}
    studied.files[0].write_text(json.dumps(pointing))
    os.mkfifo(studied.files[0].with_name(pointing["originals"]))
    assert "is a named pipe" in said_by_command(["apply", studied.files[0], studied.weights, studied.out()], capsys)
    assert not studied.out().exists()


def test_a_folder_of_edits_with_a_pipe_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studied = Studied(tmp_path)
    os.mkfifo(studied.run / "edits" / "zz.json")
    assert main(["apply", str(studied.run), "--edit", "church", str(studied.weights), str(studied.out())]) == 0
    capsys.readouterr()
    assert "zz.json is a named pipe" in said_by_command(["show", studied.run], capsys)


@pytest.mark.slow
def test_originals_and_weights_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studied = Studied(tmp_path)
    (originals,) = studied.files[0].parent.glob("originals-*.safetensors")
    for victim in (originals, studied.weights):
        whole = victim.read_bytes()
        for name, content in [*cut_and_flipped(whole), *headers(victim)]:
            victim.write_bytes(content)
            status = main(["apply", str(studied.files[0]), str(studied.weights), str(studied.out())])
            said = capsys.readouterr().err
            if status == 0:  # a flipped bit in what the file says of itself, such as its author
                assert name.startswith("bit"), name
                studied.out().unlink()
                continue
            assert said.count("\n") == 1, name
            assert len(said) < 2500, name
            assert not studied.out().exists(), name
        victim.write_bytes(whole)


def test_a_list_of_held_edits_that_does_not_fit_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hostile metadata: an edit of the same network with another number of channels."""
    studied = Studied(tmp_path)
    assert main(["apply", str(studied.files[0]), str(studied.weights), str(studied.out("edited"))]) == 0
    capsys.readouterr()
    [held] = json.loads(metadata(studied.out("edited"))["salve_edits"])
    held["contributions"] = [base64.b64encode(struct.pack("<9f", *range(1, 10))).decode()]
    save_file(load_file(studied.out("edited")), studied.weights, {"salve_edits": json.dumps([held])})
    said = said_by_command(["apply", studied.files[1], studied.weights, studied.out()], capsys)
    assert "an edit that the file lists has 9 channels" in said


# -- SAEs


def sae_file(path: Path) -> Path:
    save_sae(path, make_sae("topk", 6, 4, torch.Generator().manual_seed(0), k=2), {"site": "last", "width": 6})
    return path


@pytest.mark.slow
def test_sae_files(tmp_path: Path) -> None:
    path = sae_file(tmp_path / "sae.safetensors")
    whole = path.read_bytes()

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return load_sae(path)

    all_refused(((n, c) for n, c in [*cut_and_flipped(whole, flips=0), *headers_of(path)]), read)
    path.write_bytes(whole)
    all_refused(special_files(tmp_path / "special", ".safetensors"), load_sae)


def headers_of(path: Path) -> list[tuple[str, bytes]]:
    (path.parent / "special").mkdir()
    return list(headers(path))


@pytest.mark.usefixtures("unchecked_shapes")  # what refuses a setting here is what refuses it outside of tests
@pytest.mark.parametrize("field", ["format", "variant", "settings", "facts", "settings.k"])
def test_sae_headers_of_other_types(tmp_path: Path, field: str) -> None:
    path = sae_file(tmp_path / "sae.safetensors")
    tensors = load_file(path)
    header = json.loads(metadata(path)["salve"])
    changed = 0
    for name, text in of_other_types(header):
        if name.split(" as ")[0].removeprefix("no ") != field:
            continue
        save_file(tensors, path, {"salve": text})
        said = sentence_of(lambda: load_sae(path))
        fits = {"facts": ("{}", "{'': {}}"), "settings.k": ("True",)}.get(field, ())  # which say nothing wrong
        assert (said is None) == any(repr(fit) in name for fit in fits) or name == "no settings.k", (name, said)
        changed += 1
    assert changed >= 17


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("encoder"), "it holds b_dec, bias, decoder instead of"),
        (lambda t: t.update(more=torch.ones(1)), "instead of"),
        (lambda t: t.pop("decoder"), "it has no decoder"),
        (lambda t: t.update(decoder=torch.ones(6)), "it has no decoder"),
        (lambda t: t.update(decoder=torch.ones(0, 2**40)), "it has no decoder"),
        (lambda t: t.update(decoder=torch.ones(6, 5)), "the shape of its encoder, bias does not go with"),
        (lambda t: t.update(encoder=torch.ones(6, 4)), "the shape of its encoder does not go with"),
        (lambda t: t.update(bias=torch.full((4,), torch.inf)), "its bias holds NaN or infinity"),
        (lambda t: t.update(bias=torch.ones(4).half()), "must be float32 or float64"),
        (lambda t: t.update({n: v.int() for n, v in t.items()}), "must be float32 or float64"),
        (lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items()}), "must be float32 or float64"),
    ],
)
def test_sae_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    path = sae_file(tmp_path / "sae.safetensors")
    tensors, header = load_file(path), metadata(path)
    change(tensors)
    save_file(tensors, path, header)
    with pytest.raises(UserError, match=says):
        load_sae(path)


# -- torch files


def rebuilt(size: tuple[int, ...], stride: tuple[int, ...], marks: dict[str, bool] | None = None) -> bytes:
    """The pickle of a state_dict with one tensor that looks at four numbers in its own way."""

    class Storage:
        pass

    class Odd:
        def __reduce__(self) -> Any:
            more = (marks,) if marks else ()
            return torch._utils._rebuild_tensor_v2, (
                Storage(),
                0,
                size,
                stride,
                False,
                collections.OrderedDict(),
                *more,
            )

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None

    import io

    content = io.BytesIO()
    Pickler(content, 2).dump({"a": Odd()})
    return content.getvalue()


def torch_file(path: Path, pickled: bytes | None = None) -> Path:
    torch.save({"a": torch.ones(4)}, path)
    if pickled is not None:
        with zipfile.ZipFile(path) as archive:
            parts = {part: archive.read(part) for part in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, pickled if part.endswith("data.pkl") else content)
    return path


def test_torch_files(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "w.pt")
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1, 1]
    whole = path.read_bytes()

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return read_tensors(path)

    for name, content in cut_and_flipped(whole, flips=60):
        said = sentence_of(partial(read, content))
        assert said is not None or name.startswith(("bit", "goes on")), name
    torch_file(path)
    all_refused(archives(path), read_tensors)
    (tmp_path / "special").mkdir()
    all_refused(special_files(tmp_path / "special", ".pt"), read_tensors)


@pytest.mark.parametrize(
    ("size", "stride", "marks", "says"),
    [
        ((10**9,), (0,), None, "its tensors share the same numbers, and would take 4,000,000,000 bytes"),
        ((4,), (1,), {"neg": True}, "a view with negated values"),
        ((10**6,), (1,), None, "could not be read"),
        ((-1,), (1,), None, "could not be read"),
    ],
)
def test_tensors_that_are_larger_than_their_numbers(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], marks: dict[str, bool] | None, says: str
) -> None:
    path = torch_file(tmp_path / "w.pt", rebuilt(size, stride, marks))
    assert says in (sentence_of(lambda: read_tensors(path)) or "")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.empty(3, device="meta"),
    ],
    ids=["sparse", "complex", "no device"],
)
def test_tensors_that_are_no_plain_arrays(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "w.pt")
    assert sentence_of(lambda: read_tensors(tmp_path / "w.pt")) is not None


def test_sizes_are_looked_at_before_anything_is_read(tmp_path: Path) -> None:
    """Of bombs that would take a quarter of a gigabyte and more, Python holds no more than a few megabytes."""
    path = torch_file(tmp_path / "w.pt")
    bombs = [path for _, path in archives(path)]
    header = tmp_path / "huge.safetensors"
    header.write_bytes(struct.pack("<Q", 90 * 2**20) + b"{")
    with header.open("r+b") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        for bomb in bombs:
            assert sentence_of(partial(read_tensors, bomb)) is not None
        assert "its header claims 94,371,840 bytes" in (sentence_of(lambda: load_sae(header)) or "")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_bomb_ends_in_a_sentence_where_memory_is_short(tmp_path: Path) -> None:
    """Through the command, in a process that may not have more than torch itself takes and some."""
    studied = Studied(tmp_path)
    torch.save(load_file(studied.weights), tmp_path / "w.pt")
    bomb = dict(archives(tmp_path / "w.pt", large=2**28))["compressed"]
    assert bomb.stat().st_size < 2**20
    code = """if True:
        import resource, sys, torch, salve.backbones.adapt, salve.editing.files
        from salve.editing.cli import main
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**27,) * 2)
        sys.exit(main(sys.argv[1:]))
    """
    words = ["apply", str(studied.files[0]), str(bomb), str(studied.out())]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[-500:]
    assert "it is a compressed archive" in done.stderr
    assert done.stderr.count("\n") == 1
