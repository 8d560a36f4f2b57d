"""What tests on a GPU share: the device, a run on it, and float32 proper."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from salve.artifacts import Artifact

ON = os.environ.get("SALVE_GPU_TESTS_ON", "cuda")
HAS_IT = ON == "cpu" or torch.cuda.is_available()
DEVICE = torch.device(ON)
NEEDS_IT = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_IT, reason="no CUDA GPU here; SALVE_GPU_TESTS_ON=cpu runs these tests on the CPU"),
]
#: Of the small network.
CHANNELS = (8, 16, 24, 32)


@pytest.fixture(autouse=True)
def _full_float32() -> Any:
    """A GPU's convolutions and products in float32 proper, so that the CPU is something to compare with."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


Run = Callable[..., dict[str, Artifact]]


@pytest.fixture(scope="module")
def run() -> Run:
    """``run(folder, *overrides)`` composes the settings and does every stage."""
    from hydra import compose, initialize_config_dir
    from rich.console import Console

    from salve.run.execute import execute
    from salve.run.explain import conf_dir
    from salve.run.schema import register, resolve
    from tests.integration.conftest import FEW, NARROW, SMALL

    def execute_with(folder: Path, *overrides: str) -> dict[str, Artifact]:
        register()
        given = [*(one for one in SMALL if one != "trainer=cpu"), *FEW, *NARROW, f"output_dir={folder}/store"]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", [*given, f"trainer.accelerator={ON}", *overrides])
        return execute(resolve(config), folder / "run", "salve (test)", Console(quiet=True))

    return execute_with
