"""Commands that compute nothing load nothing that takes seconds: not an absolute time, but what is not imported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.commands import Command

#: Each takes from a third of a second to several seconds to import.
HEAVY = (
    *("torch", "torchvision", "timm", "pytorch_lightning", "lightning", "torchmetrics", "wandb", "optuna", "joblib"),
    *("numpy", "scipy", "pandas", "matplotlib", "sklearn", "jaxtyping"),
)
#: Runs each command that it is told of in a fork of its own, and says when it has ended. In a fork only what composes
#: and checks settings is imported; it has composed once, since Hydra's parser is slow at first.
PROGRAM = f"""
import json, os, runpy, sys
import hydra._internal.hydra, hydra._internal.utils
import salve.run.inputs, tests.composing
tests.composing.remember()
tests.composing.base()
for line in sys.stdin:
    order = json.loads(line)
    if child := os.fork():
        os.waitpid(child, 0)
        print(flush=True)
        continue
    os.chdir(order["folder"])
    for number in (1, 2):
        os.dup2(os.open(order["said"] + str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv[1:] = order["arguments"]
    status = None
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        status = left.code
    print("STATUS", status)
    print("LOADED", *sorted(set({HEAVY!r}) & set(sys.modules)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


class Commands:
    """Commands in processes of their own, which start with nothing heavy loaded.

    Args:
        process: runs ``PROGRAM``. folder: where what commands say is kept.
    """

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._said = process, folder / "said"

    def run(self, module: str, *arguments: str, folder: Path) -> tuple[str, str, str]:
        """A command's status, the heavy modules that it loaded, and all that it said."""
        order = {"module": module, "arguments": arguments, "folder": str(folder), "said": str(self._said)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "\n"
        out, errors = (Path(f"{self._said}{number}").read_text() for number in (1, 2))
        *said, status, loaded = out.splitlines()
        return status.removeprefix("STATUS "), loaded.removeprefix("LOADED").strip(), "\n".join(said) + errors


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[1:]])}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield Commands(process, tmp_path_factory.mktemp("commands"))
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(
    ("module", "arguments", "status", "named"),
    [
        ("salve.cli", ["--help"], "0", "salve experiment=imagenette/resnet18"),
        ("salve", ["--help"], "0", "salve experiment=imagenette/resnet18"),
        ("salve", ["sae=foo"], "2", "sae=foo is no choice"),
        ("salve.cli", ["--cfg", "job"], "None", "dictionary_size"),
        ("salve.cli", ["sae.foo=1"], "2", "sae.foo is no setting"),
        ("salve.cli", ["sae=foo"], "2", "sae=foo is no choice"),
        ("salve.cli", ["sae=5"], "2", "sae=5 is no choice"),
        ("salve.cli", ["sae.sparsity=-1"], "2", "sae.sparsity=-1.0 must not be negative"),
        ("salve.cli", ["sae=topk", "sae.k=99"], "2", "sae.k between 1 and sae.dictionary_size=32"),
        ("salve.cli", ["data=folder"], "2", "data.root"),
        ("salve.cli", ["data.root=a=b"], "2", "data.root"),
        ("salve.cli", ["data=folder", "data.root=nowhere"], "2", "data.root=nowhere is no folder"),
        ("salve.cli", ["data=imagenette"], "2", "data.root=data holds no Imagenette (160px)"),
        (
            "salve.cli",
            ["backbone.name=resnet1000"],
            "2",
            "backbone.name=resnet1000 is no model of timm; near it: ",
        ),
        (
            "salve.cli",
            ["backbone=resnet18", "backbone.name=resnet19"],
            "2",
            "is no model of torchvision; near it: resnet18",
        ),
        ("salve.cli", ["backbone.weights=none.pt"], "2", "backbone.weights=none.pt is neither"),
        ("salve.cli", ["rerun=nowhere"], "2", "nowhere is no folder of a run"),
        ("salve.cli", ["-m", "sae=topk", "sae.k=4,99"], "2", "sae.k between 1 and sae.dictionary_size=32"),
        ("salve.cli", ["-m", "seed=0,1", "data=folder", "data.root=nowhere"], "2", "data.root=nowhere is no folder"),
        ("salve.cli", ["-m", "backbone.weights=none.pt,nil.pt"], "2", "backbone.weights=nil.pt is neither"),
        ("salve.editing.cli", ["--help"], "0", "salve-edit"),
        ("salve.sweep.cli", ["--help"], "0", "salve-sweep"),
        ("salve.store.cli", ["--help"], "0", "salve-store"),
        ("salve.store.cli", ["gc", "nowhere"], "2", "There is no folder nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.slow
def test_what_computes_nothing_loads_nothing_heavy(
    commands: Commands, tmp_path: Path, module: str, arguments: list[str], status: str, named: str
) -> None:
    ended, loaded, said = commands.run(module, *arguments, folder=tmp_path)
    assert (ended, loaded) == (status, "")
    assert named in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_run_that_does_not_log_to_wandb_does_not_load_it(tmp_path: Path) -> None:
    """Its folders for temporary files stay behind where a process is killed."""
    few = ["data.train_per_class=4", "data.select_per_class=2", "data.test_per_class=2", "data.image_size=32"]
    small = ["backbone.args.channels=[8,8,8,8]", "finetune.epochs=1", "sae.steps=1", "stages=[discover]", "trainer=cpu"]
    run = Command("tests.integration.without_wandb", [*few, *small, f"output_dir={tmp_path}/out"], tmp_path)
    said, errors = run.communicate()
    assert run.returncode == 0, errors
    assert said.splitlines()[-1] == "LOADED timm torch"  # the check sees what it is there to see
