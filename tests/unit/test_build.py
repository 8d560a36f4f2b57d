"""What is checked before a job starts, and on which device it then computes."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console

from salve.artifacts import Store
from salve.processes.ranks import Ranks
from salve.run import build
from salve.run.build import build_context, check_job
from salve.run.schema import Config
from salve.types import UserError

Compose = Callable[..., Config]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backbones that are built, as they are built; nothing is known from before."""
    names: list[str] = []
    plain = build.load_backbone

    def watched(library: str, name: str, *args: object) -> object:
        names.append(name)
        return plain(library, name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "load_backbone", watched)
    build._checked_data.cache_clear()
    build._checked_model.cache_clear()
    return names


def test_the_jobs_of_a_sweep_share_what_is_checked_and_need_no_gpu(
    composed: Compose, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on a login node
    for sparsity in (1, 2, 3):
        check_job(composed(f"sae.sparsity={sparsity}", "layer=global_pool", "trainer.accelerator=gpu"))
    for _ in range(2):
        with pytest.raises(UserError, match=r"layer=conv1 is no site.*near it: .*conv1\.3"):
            check_job(composed("layer=conv1"))
    assert loads == ["resnet10t", "resnet10t"]  # for what is not the last site, a second one with its graph
    check_job(composed("backbone=resnet18", "backbone.weights=random"))
    assert loads == ["resnet10t", "resnet10t", "resnet18"]


@pytest.mark.slow
def test_what_is_wrong_is_found_once_and_said_for_every_job(
    composed: Compose, loads: list[str], tmp_path: Path
) -> None:
    for seed in range(3):
        with pytest.raises(UserError, match=r"nothing\.pt is neither random, imagenet nor a file"):
            check_job(composed(f"seed={seed}", f"backbone.weights={tmp_path / 'nothing.pt'}"))
        with pytest.raises(UserError, match="train"):
            check_job(composed(f"seed={seed}", "data=folder", f"data.root={tmp_path}"))
        with pytest.raises(UserError, match=r"data\.image_size=1 must be at least"):
            check_job(composed("data.image_size=1"))
    assert loads == ["resnet10t"]


def test_a_job_computes_on_the_gpu_that_it_was_given(composed: Compose, tmp_path: Path) -> None:
    def device(ranks: Ranks) -> torch.device:
        config, console = composed("layer=last"), Console(file=io.StringIO())
        return build_context(config, Store(tmp_path), lambda _: DummyLogger(), console, ranks).device

    assert device(Ranks("cpu")) == torch.device("cpu")
    assert device(Ranks("cuda", gpus=[3])) == torch.device("cuda", 3)
    assert device(Ranks("cuda")) == torch.device("cuda")


@pytest.mark.parametrize(
    ("overrides", "size", "resize"),
    [
        ((), 160, 168),
        (("backbone.preprocess.size=80", "backbone.preprocess.squash=true"), 80, None),
        (("backbone.preprocess.resize=256", "backbone.preprocess.size=224"), 224, 256),
    ],
)
def test_the_data_are_read_with_the_preset_of_weights_from_a_file(
    composed: Compose, tmp_path: Path, overrides: tuple[str, ...], size: int, resize: int | None
) -> None:
    torch.save({"state_dict": timm.create_model("test_efficientnet").state_dict()}, tmp_path / "w.pt")
    backbone = ["backbone=timm", "backbone.name=test_efficientnet", f"backbone.weights={tmp_path / 'w.pt'}"]
    config, console = composed(*backbone, "layer=last", *overrides), Console(file=io.StringIO())
    context = build_context(config, Store(tmp_path), lambda _: DummyLogger(), console, Ranks("cpu"))
    assert context.data.preprocess is not None
    assert (context.data.preprocess.size, context.data.preprocess.resize) == (size, resize)
    assert context.data.preprocess.interpolation == "bicubic"
