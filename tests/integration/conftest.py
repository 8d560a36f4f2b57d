"""A whole run, small enough for a test, and the means to start others like it."""

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from salve.artifacts import Artifact
from salve.cli import main
from salve.run.execute import execute
from tests.composing import settings
from tests.integration.commands import ranks_are_forks

SMALL = [
    "trainer=cpu",
    "finetune.epochs=2",
    "sae.epochs=3",
    "sae.dictionary_size=24",
    "sae.batch_size=32",
    "validate.top_images=2",
    "validate.localise_images=2",
    "validate.random_latents=2",
    "validate.faithfulness_steps=2",
    "validate.maximisation_steps=2",
    "edit.alpha=[0,1,5,20,100]",
]

FEW = [
    "data.train_per_class=8",
    "data.select_per_class=4",
    "data.test_per_class=4",
    "data.image_size=32",
    "data.batch_size=20",
]
NARROW = ["backbone.args.channels=[8,16,24,32]"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is in this folder trains and measures, which takes seconds."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Hydra sets up logging for a process of its own; this gives back the handlers and the level."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)


Start = Callable[..., dict[str, Artifact]]


@pytest.fixture(scope="session")
def start() -> Start:
    """``start(folder, *overrides)`` composes and runs, with artifacts under ``folder/store``."""

    def run(folder: Path, *overrides: str) -> dict[str, Artifact]:
        chosen = {override.split("=")[0] for override in overrides}
        fitting = [*([] if "data" in chosen else FEW), *([] if "backbone" in chosen else NARROW)]
        config = settings(*SMALL, *fitting, f"output_dir={folder / 'store'}", *overrides)
        with (folder / "console.txt").open("a") as file:
            return execute(config, folder / "run", "salve (test)", Console(file=file, width=120))

    return run


@pytest.fixture(scope="session")
def whole_run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    """One run of all stages, made once for all processes that run tests; read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / "whole", root / "whole.pickle"
    with FileLock(root / "whole.lock"):
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(start(folder)))
    return folder, pickle.loads(made.read_bytes())


@pytest.fixture
def _ranks_are_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_are_forks(monkeypatch)


Salve = Callable[..., int]


@pytest.fixture
def salve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Salve]:
    """``salve(*arguments)`` is the command in this process; it gives the status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["salve", *arguments])
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0)
        finally:
            HydraConfig.instance().cfg = None
        return 0

    with quiet_logging():
        yield run
