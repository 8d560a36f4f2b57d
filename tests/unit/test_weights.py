"""Weights as training scripts leave them: under other names, inside checkpoints, without a head, diverged."""

import argparse
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer, resnet18

from salve.backbones import Classifier, load_backbone, read_tensors
from salve.backbones.adapt import adapted
from salve.backbones.load import Loaded
from salve.backbones.scalars import NUMPY_SCALARS
from salve.backbones.weights import read_checkpoint
from salve.stages import BackboneSettings
from salve.stages.training import quiet_lightning
from salve.types import UserError

RESNET10: dict[str, Any] = {"channels": (8, 16, 24, 32)}
State = dict[str, Tensor]


def small(classes: int = 5) -> Any:
    """With weights of its own in the head too, and statistics that are not those of a fresh BatchNorm."""
    model = timm.create_model("resnet10t", num_classes=classes, **RESNET10)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(3)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def load(path: Path, classes: int = 5, **more: Any) -> Loaded:
    return load_backbone("timm", "resnet10t", str(path), classes, RESNET10, **more)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_same(model: nn.Module, state: State, but: str = " ") -> None:
    """All tensors of the model are those of the state, save those whose name contains ``but``."""
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    differing = {name for name in state if but not in name and not torch.equal(loaded[name], state[name])}
    assert differing == set()


def refusal(path: Path, classes: int = 5, **more: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(path, classes, **more)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# -- other names


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model.", "net.encoder.backbone."])
def test_what_stands_before_all_names_is_left_out_and_said(tmp_path: Path, prefix: str) -> None:
    state = small().state_dict()
    loaded = load(saved(tmp_path / "w.pt", {prefix + name: tensor for name, tensor in state.items()}))
    assert loaded.fits
    assert_same(loaded.model, state)
    assert loaded.remark == f"{tmp_path / 'w.pt'}: '{prefix}' is removed from the names of its tensors."


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "model._orig_mod."])
@pytest.mark.parametrize("entry", ["state_dict", "model"])
def test_prefixes_upon_each_other_within_a_checkpoint(tmp_path: Path, prefix: str, entry: str) -> None:
    state = small().state_dict()
    path = saved(tmp_path / "w.pt", {entry: {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3})
    loaded = load(path)
    assert loaded.fits
    assert_same(loaded.model, state)
    other = prefix.replace("_orig_mod.", "")
    assert loaded.remark == (
        f"{path}: its entry {entry} is read; '_orig_mod.' and '{other}' is removed from the names of its tensors."
    )


def test_an_averaged_model(tmp_path: Path) -> None:
    averaged = AveragedModel(small())
    averaged.update_parameters(small())
    assert "n_averaged" in averaged.state_dict()
    loaded = load(saved(tmp_path / "w.pt", averaged.state_dict()))
    assert loaded.fits
    assert_same(loaded.model, small().state_dict())


def compiled_within(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model)
    return nn.DataParallel(compiled)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        lambda model: torch.compile(nn.DataParallel(model)),
        compiled_within,
    ],
    ids=["DataParallel", "compiled", "both", "both, the other way"],
)
@pytest.mark.slow
def test_the_libraries_own_wrappers(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    state = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    wrapped = wrap(small()).state_dict()
    assert not wrapped.keys() & state.keys()
    loaded = load(saved(tmp_path / "w.pt", wrapped))
    assert loaded.fits
    assert_same(loaded.model, state)


def test_a_part_that_was_compiled(tmp_path: Path) -> None:
    model, state = small(), small().state_dict()
    model.layer2 = torch.compile(model.layer2)
    loaded = load(saved(tmp_path / "w.pt", model.state_dict()))
    assert_same(loaded.model, state)
    assert "'_orig_mod.' is removed from the names" in loaded.remark


def test_weights_under_their_own_names_need_no_remark(tmp_path: Path) -> None:
    assert load(saved(tmp_path / "w.pt", small().state_dict())).remark == ""


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    state = small().state_dict()
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    loaded = load(saved(tmp_path / "w.pt", old))
    assert loaded.fits
    assert_same(loaded.model, state, but="num_batches_tracked")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(images), small().eval()(images))


def test_tensors_beside_the_wrapped_model_are_unknown_and_named(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in small().state_dict().items()}
    assert "unknown loss.weight" in refusal(saved(tmp_path / "w.pt", {**state, "loss.weight": torch.ones(5)}))


def test_two_models_in_one_file_are_not_chosen_from(tmp_path: Path) -> None:
    state = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in small().state_dict().items()}
    assert "unknown teacher." in refusal(saved(tmp_path / "w.pt", state))


def test_a_file_of_another_model_is_refused_under_its_own_names(tmp_path: Path) -> None:
    state = {
        f"model.{name}": tensor for name, tensor in timm.create_model("test_vit", num_classes=5).named_parameters()
    }
    assert "lacks" in refusal(saved(tmp_path / "w.pt", state))


# -- inside checkpoints


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "weights"])
def test_a_checkpoints_entry_is_found_and_said(tmp_path: Path, entry: str) -> None:
    state = small().state_dict()
    optimizer = torch.optim.SGD(small().parameters(), 0.1, momentum=0.9).state_dict()
    path = saved(tmp_path / "w.pt", {"epoch": 3, "best": 0.8, "optimizer": optimizer, entry: state})
    loaded = load(path)
    assert loaded.fits
    assert_same(loaded.model, state)
    assert loaded.remark == f"{path}: its entry {entry} is read."


def test_a_checkpoint_of_timms_with_its_command_line_gives_the_averaged_weights(tmp_path: Path) -> None:
    state = small().state_dict()
    raw = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    content = {"arch": "resnet10t", "args": argparse.Namespace(lr=0.1), "state_dict": raw, "state_dict_ema": state}
    loaded = load(saved(tmp_path / "w.pth.tar", content))
    assert_same(loaded.model, state)
    assert "state_dict_ema" in loaded.remark


def test_an_entry_within_an_entry(tmp_path: Path) -> None:
    state = small().state_dict()
    loaded = load(saved(tmp_path / "w.pt", {"model": {"state_dict": state, "step": 4}}))
    assert_same(loaded.model, state)
    assert "model.state_dict" in loaded.remark


def test_a_checkpoint_that_lightning_writes(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    with quiet_lightning():
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(Classifier(small(), torch.arange(5), 0.1, 0.1))
    path = tmp_path / "epoch=3-step=12.ckpt"
    trainer.save_checkpoint(path)
    loaded = load(path)
    assert loaded.fits
    assert_same(loaded.model, state)
    assert loaded.remark == f"{path}: its entry state_dict is read; 'model.' is removed from the names of its tensors."


def test_several_state_dicts_under_unknown_names_are_not_chosen_from(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"generator": small().state_dict(), "critic": small().state_dict()})
    assert "several state_dicts (generator, critic)" in refusal(path)


class Settings:
    """What a training script might keep in its checkpoint."""


def test_a_checkpoint_with_objects_in_it_says_how_to_save_its_weights(tmp_path: Path) -> None:
    content = {"state_dict": small().state_dict(), "hyper_parameters": {"settings": Settings()}}
    message = refusal(saved(tmp_path / "w.ckpt", content))
    assert all(part in message for part in ("w.ckpt", "Settings", "never unpickles", "state_dict of a checkpoint"))


@pytest.mark.parametrize("name", ["w.pt", "w.pth"])
def test_a_whole_pickled_model_says_how_to_save_its_weights(tmp_path: Path, name: str) -> None:
    message = refusal(saved(tmp_path / name, small()))
    assert all(part in message for part in (name, "ResNet", "torch.save(model.state_dict(), 'weights.pt')"))


def test_a_scripted_model_says_how_to_save_its_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated, but such files exist
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert "torch.save(model.state_dict(), 'weights.pt')" in refusal(tmp_path / "w.pt")


# -- heads


def test_a_backbone_without_its_head_gets_one_that_has_to_be_trained(tmp_path: Path) -> None:
    state = small().state_dict()
    path = saved(tmp_path / "w.pt", {name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    loaded = load(path, 3)
    assert not loaded.fits
    head: Any = loaded.model.fc
    assert head.weight.shape == (3, 32)
    assert_same(loaded.model, small(3).state_dict(), but="fc.")
    assert loaded.remark.startswith(f"{path}: it has no head, and one of 3 outputs must be trained (finetune=probe")


def test_a_head_that_is_left_out_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", small(11).state_dict())
    remark = load(path, 4).remark
    assert remark.startswith(
        f"{path}: its head of 11 outputs is left out, and one of 4 outputs must be trained (finetune=probe"
    )


@pytest.mark.parametrize("place", ["fc.0", "fc.1", "fc.drop.linear", "classifier", "head.1"])
def test_a_head_of_one_linear_layer_elsewhere_becomes_the_models(tmp_path: Path, place: str) -> None:
    state = small().state_dict()
    elsewhere = {name.replace("fc.", f"{place}."): tensor for name, tensor in state.items()}
    loaded = load(saved(tmp_path / "w.pt", {f"model.{name}": tensor for name, tensor in elsewhere.items()}))
    assert loaded.fits
    assert_same(loaded.model, state)
    assert f"its {place} is used as the head, fc" in loaded.remark


def test_a_head_beside_the_backbone_becomes_the_models(tmp_path: Path) -> None:
    state = small().state_dict()
    beside = {("backbone." + name).replace("backbone.fc", "classifier"): tensor for name, tensor in state.items()}
    loaded = load(saved(tmp_path / "w.pt", beside))
    assert loaded.fits
    assert_same(loaded.model, state)


@pytest.mark.parametrize("place", ["heads.1", "heads", "heads.0"])
def test_the_head_of_torchvisions_vit(place: str) -> None:
    state = VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5).state_dict()
    other = {name.replace("heads.head", place): tensor for name, tensor in state.items()}
    found, done = adapted(other, VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5), "heads.head")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert done == [f"its {place} is used as the head, heads.head"]


@pytest.mark.parametrize(
    "head",
    [
        {"fc.0.weight": (16, 32), "fc.0.bias": (16,), "fc.2.weight": (5, 16), "fc.2.bias": (5,)},
        {"fc.0.weight": (32,), "fc.0.bias": (32,)},
        {"fc.0.weight": (5, 32), "fc.0.bias": (5,), "fc.0.scale": (5,)},
        {"projector.weight": (5, 32), "projector.bias": (5,)},
    ],
    ids=["two layers", "a norm", "more than a linear layer", "no head by name"],
)
def test_other_heads_are_unknown_and_named(tmp_path: Path, head: dict[str, tuple[int, ...]]) -> None:
    state = {name: tensor for name, tensor in small().state_dict().items() if not name.startswith("fc.")}
    path = saved(tmp_path / "w.pt", {**state, **{name: torch.ones(shape) for name, shape in head.items()}})
    assert f"unknown {min(head)}" in refusal(path)


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    state = small().state_dict()
    state.pop("fc.bias")
    assert "lacks fc.bias" in refusal(saved(tmp_path / "w.pt", state))


# -- values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var", "fc.bias"])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, value: float, name: str) -> None:
    state = small().state_dict()
    state[name].view(-1)[-1] = value
    message = refusal(saved(tmp_path / "w.pt", state))
    assert all(part in message for part in ("NaN or infinite", name, "w.pt"))


# -- paths


def test_the_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    state = small().state_dict()
    saved(tmp_path / "w.pt", state)
    assert_same(load(Path("~/w.pt")).model, state)
    assert read_tensors("~/w.pt")[0].keys() == state.keys()
    # Keys and records see the file itself.
    assert BackboneSettings("timm", "resnet10t", "~/w.pt").weights == str(tmp_path / "w.pt")


# -- as they are


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_tensors_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    state = {"module.a": torch.arange(6).to(dtype).view(2, 3), "b": torch.tensor(float("nan"))}
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    read, entry = read_tensors(tmp_path / name)
    assert entry == ""
    assert read.keys() == state.keys()
    assert read["module.a"].dtype == dtype
    assert torch.equal(read["module.a"], state["module.a"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(1)], r"w\.pt holds no state_dict"),
        ({"a": 1}, r"w\.pt holds no state_dict .*entries are a"),
    ],
)
def test_what_holds_no_state_dict_is_not_read(tmp_path: Path, content: Any, says: str) -> None:
    saved(tmp_path / "w.pt", content)
    with pytest.raises(UserError, match=says):
        read_tensors(tmp_path / "w.pt")


def test_the_entry_of_a_checkpoint_is_read_as_it_is_too(tmp_path: Path) -> None:
    saved(tmp_path / "w.pt", {"epoch": 3, "model": {"a": torch.ones(1, dtype=torch.float16)}})
    read, entry = read_tensors(tmp_path / "w.pt")
    assert (entry, read["a"].dtype) == ("model", torch.float16)


@pytest.mark.parametrize("number", [np.float64(0.9), np.float32(0.5), np.int64(3), np.bool_(True), np.uint8(7)])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_number_of_numpys_beside_the_weights(tmp_path: Path, number: np.generic, module: bytes) -> None:
    """As numpy 1 and as numpy 2 write it."""
    path = saved(tmp_path / "w.pt", {"best": number, "state_dict": {"a": torch.ones(2)}})
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, re.sub(rb"numpy\._?core\.multiarray", module, content))
    assert module in path.read_bytes()
    assert torch.equal(read_checkpoint(path)[0]["a"], torch.ones(2))
    with torch.serialization.safe_globals(list(NUMPY_SCALARS)):
        assert torch.load(path, weights_only=True)["best"] == number.item()


class _Sized:
    """Pickles as a NumPy number that claims another size than it has, or as another type."""

    def __init__(self, kind: str, content: object) -> None:
        self.kind, self.content = kind, content

    def __reduce__(self) -> Any:
        return np.float64(1).__reduce__()[0], (np.dtype(self.kind), self.content)


@pytest.mark.parametrize("held", [_Sized("V2000000000", None), _Sized("V2000000000", b""), _Sized("f8", b"abc")])
def test_a_number_of_numpys_that_is_none_is_refused(tmp_path: Path, held: _Sized) -> None:
    saved(tmp_path / "w.pt", {"best": held, "state_dict": {"a": torch.ones(2)}})
    assert "numpy" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("read", [read_tensors, read_checkpoint])
def test_a_file_that_is_not_there(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere\.pt"):
        read(tmp_path / "nowhere.pt")


@pytest.mark.slow
def test_reading_a_file_imports_no_models() -> None:
    code = (
        "import sys; from salve.backbones.weights import read_tensors; "
        "print([name for name in ('timm', 'torchvision', 'pytorch_lightning', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- more outputs than classes


def test_a_head_with_more_outputs_than_classes_is_kept(tmp_path: Path) -> None:
    state = small(1000).state_dict()
    loaded = load(saved(tmp_path / "w.pt", state), 3, outputs=[999, 0, 217])
    assert loaded.fits
    assert_same(loaded.model, state)
    assert loaded.remark == ""


def test_a_head_with_as_many_outputs_as_classes_is_kept_too(tmp_path: Path) -> None:
    state = small(3).state_dict()
    loaded = load(saved(tmp_path / "w.pt", state), 3, outputs=[2, 0, 1])
    assert loaded.fits
    assert_same(loaded.model, state)


@pytest.mark.parametrize("unit", [10, -1])
def test_a_unit_that_the_head_does_not_have_is_refused(tmp_path: Path, unit: int) -> None:
    message = refusal(saved(tmp_path / "w.pt", small(10).state_dict()), 3, outputs=[0, 9, unit])
    assert all(part in message for part in (f"data.outputs names unit {unit},", "units 0 to 9"))


def test_units_of_weights_without_a_head_are_refused(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in small().state_dict().items() if not name.startswith("fc.")}
    assert "no head" in refusal(saved(tmp_path / "w.pt", state), 3, outputs=[0, 1, 2])
    with pytest.raises(UserError, match=r"data\.outputs .*weights=random; set it to imagenet or to the path"):
        load_backbone("timm", "resnet10t", "random", 3, RESNET10, [0, 1, 2])


def test_imagenets_head_is_kept_by_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    loaded = load_backbone("torchvision", "resnet18", "imagenet", 2, outputs=[207, 999])
    assert loaded.fits
    assert_same(loaded.model, state)
    with pytest.raises(UserError, match=r"unit 1000, .* 0 to 999"):
        load_backbone("torchvision", "resnet18", "imagenet", 2, outputs=[207, 1000])


def test_imagenets_head_is_kept_by_timm_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def downloaded(name: str, **arguments: Any) -> State:
        state = timm.create_model(name, **arguments).state_dict()
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
        return state

    state = downloaded("resnet10t")
    loaded = load_backbone("timm", "resnet10t", "imagenet", 2, outputs=[207, 999])
    assert loaded.fits
    assert_same(loaded.model, state)
    downloaded("vit_small_patch14_dinov2", depth=1)
    with pytest.raises(UserError, match=r"imagenet has no head"):
        load_backbone("timm", "vit_small_patch14_dinov2", "imagenet", 2, {"depth": 1}, [207, 999])
