"""What would fail after hours is refused within a second, in a sentence that says why."""

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from salve.artifacts import Store
from salve.processes.ranks import Ranks
from salve.run import tryout
from salve.run.build import build_context
from salve.run.schema import Config
from salve.run.tryout import try_once, try_out
from salve.stages import StageContext
from salve.types import UserError
from tests.composing import settings

SMALL = ["data.train_per_class=2", "data.select_per_class=1", "data.test_per_class=1", "data.image_size=32"]
NARROW = ["backbone.args.channels=[8,16,24,32]", "trainer=cpu", "sae.dictionary_size=8"]
VIT = ["backbone=timm", "backbone.name=test_vit", "backbone.weights=random", "+backbone.args.img_size=32"]

#: Reads sizes that its windows divide, and no others.
MAXVIT = [
    *("backbone=timm", "backbone.name=maxvit_nano_rw_256", "backbone.weights=random", "backbone.preprocess.size=32"),
]


def composed(*overrides: str) -> Config:
    chosen = any(override.startswith("backbone=") for override in overrides)
    return settings(*SMALL, *(NARROW[1:] if chosen else NARROW), *overrides)


def built(tmp_path: Path, *overrides: str) -> tuple[Config, StageContext]:
    config, console = composed(*overrides), Console(file=io.StringIO())
    return config, build_context(config, Store(tmp_path), lambda _: DummyLogger(), console, Ranks("cpu"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            MAXVIT,
            r"^This MaxxVit cannot read 32 × 32 images \(AssertionError: .*divisible.*\); set "
            r"backbone\.preprocess\.size to another size, such as 256, for which it is made\.$",
        ),
        (
            ["backbone=resnet18", "backbone.weights=random", "data.batch_size=1"],
            r"BatchNorm compares the images of a batch \(ValueError: .*\); set data\.batch_size=2 or more, or "
            r"finetune=probe\.$",
        ),
        (["edit.sets=[[castle]]"], r"^edit\.sets names castle, which is neither a class \(harbour, .*from 0 to 7\.$"),
        (["edit.sets=[[storm,8]]"], r"^edit\.sets names 8, which is neither a class .*from 0 to 7\.$"),
        ([*VIT, "edit.channels=aligned"], r"activations that are never negative, but some at cls are"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        try_out(*built(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["edit.sets=[[castle]]"], "discover,validate,diagnose"),
        (["backbone=resnet18", "backbone.weights=random", "data.batch_size=1", "finetune=probe"], "discover"),
        (MAXVIT, "report"),
    ],
)
def test_what_is_not_asked_for_is_not_tried(tmp_path: Path, overrides: list[str], stages: str) -> None:
    try_out(*built(tmp_path, *overrides, f"stages=[{stages}]"))
    with pytest.raises(UserError):
        try_out(*built(tmp_path, *(o for o in overrides if o != "finetune=probe")))


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("fc.weight", r"^The classifier's head \(fc\) holds NaN or infinite weights"),
        (
            "layer4.0.bn2.weight",
            "^The activations at global_pool are NaN or infinite for image 0 of the train split; check",
        ),
    ],
)
def test_weights_that_give_nan_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, says: str
) -> None:
    config, context = built(tmp_path)
    plain = StageContext.build

    def spoiled(self: StageContext) -> tuple[nn.Module, bool]:
        model, fits = plain(self)
        dict(model.named_parameters())[weight].data.view(-1)[0] = torch.nan
        return model, fits

    monkeypatch.setattr(StageContext, "build", spoiled)
    with pytest.raises(UserError, match=says):
        try_out(config, context)


def test_outputs_that_the_head_does_not_make_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, context = built(tmp_path)
    plain = timm.models.resnet.ResNet.forward
    monkeypatch.setattr(timm.models.resnet.ResNet, "forward", lambda self, x: 2 * plain(self, x))
    with pytest.raises(UserError, match=r"not what its layers behind global_pool \(fc\) make of the activations there"):
        try_out(config, context)


def test_a_failure_of_a_stage_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, context = built(tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no gradient")

    for part, says in (
        ("grad_fam", "Stage validate"),
        ("maximise", "Stage validate"),
        ("undo_edit_file", "The weights of"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tryout, part, fails)
            with pytest.raises(UserError, match=rf"^{says}.* \(RuntimeError: no gradient\); leave .* out of stages\.$"):
                try_out(config, context)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_a_step_is_trained_in_the_precision_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: list[torch.dtype] = []
    plain = nn.functional.cross_entropy

    def watched(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return plain(logits, labels)

    monkeypatch.setattr(nn.functional, "cross_entropy", watched)
    config, context = built(tmp_path, f"trainer.precision={precision}")
    state = torch.random.get_rng_state()
    try_out(config, context)
    kinds = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    assert seen == [kinds[precision.partition("-")[0]]]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_that_are_taken_as_they_are_are_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32], output_stride=8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(tryout, "_train", lambda *_: pytest.fail("trained"))
    try_out(*built(tmp_path, f"backbone.weights={tmp_path / 'model.safetensors'}"))


@pytest.mark.parametrize(
    ("zero", "mode", "refused"),
    [
        ("all", "none", True),
        ("all", "probe", True),
        ("all", "full", True),
        ("fc.", "none", True),
        ("fc.", "probe", False),  # a head that is trained may begin so
        ("fc.", "full", False),
    ],
)
def test_weights_that_say_the_same_of_every_image(tmp_path: Path, zero: str, mode: str, refused: bool) -> None:
    model = timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32], output_stride=8)
    state = {n: t * 0 if zero in ("all", n[:3]) else t for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    config, context = built(tmp_path, f"backbone.weights={tmp_path / 'model.safetensors'}", f"finetune.mode={mode}")
    if not refused:
        try_out(config, context)
        return
    with pytest.raises(UserError, match=r"model\.safetensors the network says the same of different images"):
        try_out(config, context)


def test_a_strength_that_makes_infinite_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, context = built(tmp_path, "edit.alpha=[0,1,3e38]", "stages=[control]")
    plain = StageContext.build

    def large(self: StageContext) -> tuple[nn.Module, bool]:
        model, fits = plain(self)
        model.fc.weight.data.mul_(1e4)  # type: ignore[union-attr,operator]
        return model, fits

    monkeypatch.setattr(StageContext, "build", large)
    with pytest.raises(UserError, match=r"Enhanced at α = 3e\+38, the logits are larger than float32 can hold"):
        try_out(config, context)
    try_out(*built(tmp_path, "edit.alpha=[0,1,3e38]", "stages=[control]", "edit.modes=[suppress]"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("edit.alpha=[0,1e39]", r"edit\.alpha holds 1e\+39, more than float32 can hold: strengths go up to 3\.4e\+38"),
        ("sae.learning_rate=1e39", r"sae\.learning_rate=1e\+39 must be at most 3\.4e\+38"),
        ("sae.sparsity=inf", r"sae\.sparsity=inf must be at most 3\.4e\+38"),
    ],
)
def test_settings_beyond_float32_are_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        composed(override)


def test_the_runs_of_a_sweep_are_tried_once_for_each_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def watched(config: Config, _: StageContext) -> None:
        tried.append(config.backbone.name)
        raise UserError("It cannot be read.")

    monkeypatch.setattr(tryout, "try_out", watched)
    tryout._tried.cache_clear()
    try:
        for sparsity in (1, 2, 3):
            for backbone in ([], VIT):
                with pytest.raises(UserError, match="It cannot be read"):
                    try_once(composed(f"sae.sparsity={sparsity}", *backbone))
    finally:
        tryout._tried.cache_clear()
    assert tried == ["resnet10t", "test_vit"]
