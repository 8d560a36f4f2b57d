"""A full disk is one sentence that names the place and what to do, whichever library met it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from salve.processes.trainer import _Checkpoints
from salve.run.folder import RunFolder
from salve.system import in_one_sentence, refused_by_system
from salve.types import UserError

#: Writes of more bytes fail in the process below, as on a full disk, but for the number of the error.
LIMIT = 20_000
FULL_DISK = f"""
import os, resource, signal, sys
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from salve.artifacts import save_tensors, write_record, write_table
from salve.run.folder import RunFolder
from salve.processes.trainer import _Checkpoints
from safetensors.torch import save_file

folder = Path(sys.argv[1])
numbers = np.random.default_rng(0).random((100, 100, 3))
tensors = {{"a": torch.from_numpy(numbers)}}
WRITERS = {{
    "checkpoint": lambda: _Checkpoints().save_checkpoint(tensors, folder / "a.ckpt"),
    "torch": lambda: torch.save(tensors, folder / "a.pt"),
    "tensors": lambda: save_tensors(folder / "a.safetensors", tensors),
    "safetensors": lambda: save_file(tensors, folder / "a.safetensors"),
    "table": lambda: write_table(folder / "a.csv", pd.DataFrame(numbers[:, :, 0])),
    "record": lambda: write_record(folder / "a.json", {{"a": numbers.tolist()}}),
    "picture": lambda: plt.imsave(folder / "a.png", numbers),
    "figure": lambda: (plt.figure(), plt.imshow(numbers), plt.savefig(folder / "a.pdf")),
    "parquet": lambda: pd.DataFrame(numbers[:, :, 0]).to_parquet(folder / "a.parquet"),
}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
for name, write in WRITERS.items():
    try:
        write()
    except Exception as error:
        print(name, RunFolder(folder).fail(error), sep="\\t")
    else:
        print(name, "was written", sep="\\t")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_every_library_that_writes_ends_in_the_systems_reason_with_a_place(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ
    )
    said = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(said) == 9
    for name, sentence in said.items():
        assert sentence.startswith(f"{tmp_path}"), (name, sentence)
        assert "make room and give the same command again" in sentence, (name, sentence)
    assert said["checkpoint"].startswith(f"{tmp_path}/a.ckpt: File too large")
    assert "unexpected pos" not in done.stdout


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__context__ = by
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FULL, "/run: No space left on device; make room"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: No space left on device; make room"),
        (caused(RuntimeError("unexpected pos 704 vs 598"), FULL), "/run: No space left on device; make room"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "/run: a file could not",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "/run: a file could not"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "/run: No space left on device; make"),
        (RuntimeError("On rank 1: OSError(28, 'No space left on device')"), "/run: No space left on device; make room"),
        (caused(AttributeError("fileno"), caused(KeyError(1), FULL)), "/run: No space left on device; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "/run: Disk quota exceeded; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system; choose a folder"),
    ],
)
def test_a_full_disk_is_found_behind_what_it_led_to(error: BaseException, says: str) -> None:
    refused = refused_by_system(error, "/run")
    assert refused is not None
    assert in_one_sentence(refused).startswith(says)


def test_an_error_of_its_own_is_not_the_systems() -> None:
    looked = FileNotFoundError(errno.ENOENT, "No such file", "/cache")
    assert refused_by_system(caused(KeyError("a"), looked)) is None
    assert refused_by_system(RuntimeError("shapes do not fit")) is None
    loop = RuntimeError("a")
    loop.__cause__ = caused(RuntimeError("b"), loop)
    assert refused_by_system(loop) is None
    assert RunFolder(Path("nowhere")).fail(UserError("Too few images.")) == "Too few images."


def test_a_checkpoint_that_is_not_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(_: object, file: object) -> None:
        file.write(b"the first part")  # type: ignore[attr-defined]
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", short)
    with pytest.raises(OSError, match=r"last\.ckpt"):
        _Checkpoints().save_checkpoint({}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
