"""What every test runs under: shapes checked at run time, no network, nothing in the user's home, nothing left behind.

The functions on tensors say their shapes in their annotations; here, and only here, jaxtyping and beartype check every
call against them, but for the later epochs of trainings in unit tests (``plain_trainer``). A test that gives a function
what its annotations forbid, to see it refused, asks for the fixture ``unchecked_shapes``. Where beartype is not
installed, the tests run unchecked, and the report's first lines say so.
"""

import gc
import logging
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from ctypes import CDLL
from inspect import get_annotations, isclass, isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jaxtyping
import numpy as np
import pytest
from jaxtyping import AbstractArray, install_import_hook
from jaxtyping import config as jaxtyping_config

if TYPE_CHECKING:  # the process that hands out tests to others runs none
    from torch import nn

    from salve.run.schema import Config

HOME = Path(__file__).parents[1] / ".pytest_cache" / "home"

# Before anything that reads them is imported; processes that tests start inherit them.
os.environ |= {
    # Tests run beside each other, each on one core.
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    # Else OmegaConf words its errors otherwise when coverage is measured.
    "OC_CAUSE": "0",
    "MPLCONFIGDIR": str(HOME / "matplotlib"),
    "XDG_CACHE_HOME": str(HOME / "cache"),
    "TORCH_HOME": str(HOME / "torch"),
    "HF_HOME": str(HOME / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_CONFIG_DIR": str(HOME / "wandb"),
    "WANDB_CACHE_DIR": str(HOME / "wandb"),
    "WANDB_DATA_DIR": str(HOME / "wandb"),
}
for _variable in ("WANDB_API_KEY", "HYDRA_FULL_ERROR", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
    os.environ.pop(_variable, None)

# A test run that was started in the background, or by nohup, ignores these signals, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Where there is no CUDA, torch looks for its library again and again.
try:
    CDLL("libcuda.so.1")
except OSError:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def says_shape(annotation: Any) -> bool:
    """Whether an annotation, or a part of it, is one of jaxtyping's; texts are taken for one that is."""
    is_one = isinstance(annotation, str) or (isclass(annotation) and issubclass(annotation, AbstractArray))
    return is_one or any(map(says_shape, get_args(annotation)))


PURE = ("salve.metrics", "salve.sae", "salve.features", "salve.saliency", "salve.editing", "salve.diagnosis")
try:
    from beartype import BeartypeConf, beartype
except ImportError:  # as on a machine that has PyTorch and pytest, and little else
    CHECKED = False
else:
    CHECKED = True
    #: As type checkers have it, an int will do for a float; as of jaxtyping, a violation is a TypeError.
    checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
    with_shapes = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Any) -> "Callable[[Any], Any]":
        """In place of jaxtyping's: leave out what it does at every call for functions that say no shapes."""

        def decorate(target: Any) -> Any:
            if not isfunction(target) or any(map(says_shape, get_annotations(target).values())):
                return with_shapes(typechecker=typechecker)(target)
            # A function within another would be prepared anew at every call of that one.
            return target if "<locals>" in target.__qualname__ else checked(target)

        return decorate

    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
    install_import_hook(PURE, f"{__name__}.checked")

from tests.integration import commands  # noqa: E402  (after the environment is set)

# Results of tests need not survive a power cut, and each call waits for the disk.
os.fsync = lambda fd: None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process that will run tests, of several, which server they share."""
    node.workerinput["server"] = commands.server()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        commands.shared = config.workerinput["server"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while everything is imported: there is none, and looking for it takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leave all that is imported out of garbage collections, which would look through it hundreds of times."""
    from tests.composing import remember

    remember()
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    return "shapes of tensors: checked" if CHECKED else "shapes of tensors: NOT checked, as beartype is not installed"


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the same random state and leaves generators, threads, logs and environment alone."""
    import torch

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    threads, environment = torch.get_num_threads(), dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the global one is what must be kept)
    with torch.random.fork_rng(devices=[]):
        # The seeds of devices that are not there would take a millisecond.
        torch.manual_seed(0) if torch.cuda.is_available() else torch.default_generator.manual_seed(0)
        yield
    # A command that is run within a test has Hydra log into its run's folder, which is gone after the test.
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere but this machine fails the test; code cannot mistake that for a network error."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"The test reached for the network: {address}.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """As a user has it: no shapes are checked at run time, so that a function's own refusal is what is seen."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dot for every drawing of reports and sweeps."""
    from tests.drawing import draw_nothing

    draw_nothing(monkeypatch)


@pytest.fixture
def composed() -> "Callable[..., Config]":
    """``composed(*overrides)``: checked settings."""
    from tests.composing import settings

    return settings


def _resnet18() -> "nn.Module":
    from torchvision.models import resnet18

    return resnet18(num_classes=5)


def _resnet50() -> "nn.Module":
    from torchvision.models import resnet50

    return resnet50(num_classes=5, width_per_group=8)


def _vit() -> "nn.Module":
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def _timm(name: str, **arguments: Any) -> "Callable[[], nn.Module]":
    def build() -> "nn.Module":
        import timm

        return timm.create_model(name, num_classes=5, **arguments)

    return build


TINY: "dict[str, Callable[[], nn.Module]]" = {
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "vit": _vit,
    "timm resnet10t": _timm("resnet10t", channels=(8, 16, 24, 32)),
    "timm test_vit": _timm("test_vit", img_size=32),
    "timm efficientnet": _timm("tf_efficientnet_lite0"),
    "timm convnext": _timm("convnext_atto"),
    "timm dinov2 registers": _timm("vit_small_patch14_reg4_dinov2", img_size=28, depth=2),
}


@pytest.fixture
def tiny() -> "Callable[[str], nn.Module]":
    """``tiny(name)``: a small backbone with random weights, five classes and inputs of 32 pixels, in eval mode.

    The input of ``timm dinov2 registers`` is 28 pixels: its patches are of 14.
    """

    import torch
    from torch import nn

    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = TINY[name]()
        # A fresh classifier of timm's may be all zeros, behind which every activation gives the same logits.
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return build
