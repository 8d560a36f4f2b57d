"""Weights from anywhere: cast, checked key by key, never unpickled."""

import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet18_Weights, resnet18

from salve.backbones import load_backbone
from salve.backbones.weights import read_checkpoint
from salve.run import inputs
from salve.types import UserError

RESNET10: dict[str, Any] = {"channels": (8, 16, 24, 32)}


def small(classes: int = 5) -> Any:
    return timm.create_model("resnet10t", num_classes=classes, **RESNET10)


def load(weights: Path | str, classes: int = 5) -> tuple[Any, bool]:
    return load_backbone("timm", "resnet10t", str(weights), classes, RESNET10)[:2]


def written(path: Path, state: dict[str, Tensor]) -> Path:
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def one_sentence(refused: pytest.ExceptionInfo[UserError]) -> str:
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# -- weights that fit


def test_random_weights_have_the_right_head_which_is_not_trained() -> None:
    model, fits = load("random", 7)
    assert not fits
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_random_weights_follow_the_seed() -> None:
    def weights() -> Tensor:
        torch.manual_seed(3)
        return load("random")[0].fc.weight

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "no_suffix"])
def test_a_file_gives_back_the_same_bits(tmp_path: Path, name: str) -> None:
    state = small().state_dict()
    model, fits = load(written(tmp_path / name, state))
    assert fits
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_half_precision_is_cast_to_float32(tmp_path: Path, half: torch.dtype, name: str) -> None:
    state = {key: value.to(half) if value.is_floating_point() else value for key, value in small().state_dict().items()}
    path = written(tmp_path / name, state)
    read, _ = read_checkpoint(path)
    assert {value.dtype for value in read.values()} == {torch.float32, torch.int64}  # int64 counts batches
    model, _ = load(path)
    assert all(torch.equal(model.state_dict()[key], state[key].to(read[key].dtype)) for key in state)


def test_torchvision_weights_load_into_torchvision_models(tmp_path: Path) -> None:
    state = resnet18(num_classes=5).state_dict()
    model, fits, _ = load_backbone("torchvision", "resnet18", str(written(tmp_path / "w.safetensors", state)), 5)
    assert fits
    assert type(model) is torchvision.models.ResNet
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_a_head_of_another_size_is_replaced_and_has_to_be_trained(tmp_path: Path) -> None:
    state = small(11).state_dict()
    model, fits = load(written(tmp_path / "w.safetensors", state), 4)
    assert not fits
    assert model.fc.weight.shape == (4, 32)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if not key.startswith("fc."))


def test_a_model_that_has_no_head_by_itself_gets_one_that_fits_the_file(tmp_path: Path) -> None:
    """timm's DINOv2 models are made without a head unless asked for one."""
    arguments: dict[str, Any] = {"img_size": 28, "depth": 1}
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=6, **arguments).state_dict()
    path = str(written(tmp_path / "w.safetensors", state))
    model: Any
    model, fits, _ = load_backbone("timm", "vit_small_patch14_dinov2", path, 6, arguments)
    assert fits
    assert torch.equal(model.head.weight, state["head.weight"])
    _, fits, _ = load_backbone("timm", "vit_small_patch14_dinov2", path, 3, arguments)
    assert not fits


# -- weights that do not


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), ["lacks", "layer1.0.conv1.weight"]),
        (lambda s: s.pop("fc.weight"), ["lacks", "fc.weight"]),
        (lambda s: s.update({"module.extra": torch.zeros(1)}), ["unknown", "module.extra"]),
        (lambda s: s.update({"bn1.weight": torch.zeros(3)}), ["shape", "bn1.weight"]),
        (lambda s: s.update({"fc.weight": torch.zeros(5, 9)}), ["shape", "fc.weight"]),
        (lambda s: s.update({"fc.weight": torch.zeros(5)}), ["shape", "fc.weight"]),
        (lambda s: s.clear(), ["lacks", "more"]),
    ],
    ids=["missing", "no head", "unknown", "shape", "width of the head", "axes of the head", "empty"],
)
def test_weights_that_do_not_fit_are_refused_by_key(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: list[str]
) -> None:
    state = dict(small().state_dict())
    change(state)
    path = written(tmp_path / "w.safetensors", state)
    with pytest.raises(UserError) as refused:
        load(path)
    assert all(part in one_sentence(refused) for part in [str(path), "ResNet", *named])


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def as_torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [pickle.dumps, as_torch_file], ids=["plain pickle", "torch file"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_code_in_a_file_is_never_run(tmp_path: Path, wrap: Callable[[Any], bytes], name: str) -> None:
    target = tmp_path / "made-by-the-file"
    (tmp_path / name).write_bytes(wrap({"conv1.weight": torch.ones(1), "x": Malicious(target)}))
    with pytest.raises(UserError) as refused:
        load(tmp_path / name)
    assert name in one_sentence(refused)
    assert not target.exists()
    os.mkdir(target)  # what it would have done is possible


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", b"\x80\x02", b"PK\x03\x04 damaged", as_torch_file({"a": torch.ones(9)})[:-40]],
    ids=["empty", "text", "pickle", "zip", "cut short"],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_checkpoint(tmp_path / name)
    assert name in one_sentence(refused)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {"optimizer": {"state": {}, "lr": 0.1}, "epoch": 3}, {0: torch.ones(1)}, torch.ones(1)],
    ids=["list", "checkpoint without", "numbered", "tensor"],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state_dict"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("weights", ["missing.safetensors", "imagnet", "."])
def test_a_file_that_is_not_there_is_named_with_the_other_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load(weights)
    assert all(part in one_sentence(refused) for part in (f"backbone.weights={weights}", "random", "imagenet"))


# -- models that cannot be built


@pytest.mark.parametrize(
    ("library", "name", "near"),
    [
        ("torchvision", "renset18", "resnet18"),
        ("torchvision", "vit_b16", "vit_b_16"),
        ("timm", "resnet10", "resnet10t"),
    ],
)
def test_an_unknown_model_suggests_names_near_it(library: str, name: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        load_backbone(library, name, "random", 5)
    assert f"backbone.name={name}" in one_sentence(refused)
    assert near in str(refused.value)


def test_a_name_like_no_other_is_refused_without_suggestions() -> None:
    with pytest.raises(UserError, match=r"backbone\.name=zzzzzzzzzz is no model of timm\.$"):
        load_backbone("timm", "zzzzzzzzzz", "random", 5)


def test_an_unknown_library_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"backbone\.library=keras .*torchvision, timm, transformers, own"):
        load_backbone("keras", "resnet18", "random", 5)


@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("torchvision", "resnet18", {"depth": 3}),
        ("timm", "resnet10t", {"depth": 3}),
        ("torchvision", "vit_b_16", {"image_size": 33}),
        ("timm", "resnet10t", {"act_layer": "nonsense"}),
    ],
)
def test_arguments_that_the_library_refuses_are_named(library: str, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        load_backbone(library, name, "random", 5, arguments)
    assert name in one_sentence(refused)
    assert all(f"{key}" in str(refused.value) for key in arguments)


@pytest.mark.parametrize(
    ("library", "name", "arguments", "of_classes"),
    [
        ("torchvision", "squeezenet1_1", {}, "classifier.1."),
        ("timm", "deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, "head"),
    ],
)
def test_a_network_without_one_head_is_loaded_for_its_inner_sites(
    tmp_path: Path, library: str, name: str, arguments: dict[str, Any], of_classes: str
) -> None:
    def fresh(classes: int) -> Any:
        torch.manual_seed(1)
        return load_backbone(library, name, "random", classes, arguments).model

    state = fresh(7).state_dict()
    path = str(written(tmp_path / "w.safetensors", state))
    model, fits, remark = load_backbone(library, name, path, 7, arguments)
    assert (fits, remark) == (True, "")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    # With its own outputs kept, or replaced.
    model, fits, _ = load_backbone(library, name, path, 3, arguments, [0, 6, 2])
    assert fits
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    model, fits, remark = load_backbone(library, name, path, 3, arguments)
    assert not fits
    assert "its head of 7 outputs is left out" in remark
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])]
    assert changed
    assert all(key.startswith(of_classes) for key in changed)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    # Without them.
    without = {key: tensor for key, tensor in state.items() if not key.startswith(of_classes)}
    model, fits, remark = load_backbone(library, name, str(written(tmp_path / "v.safetensors", without)), 3, arguments)
    assert not fits
    assert "it has no head" in remark
    one = next(key for key in state if key.startswith(of_classes))
    path = str(written(tmp_path / "u.safetensors", {key: state[key] for key in state if key != one}))
    with pytest.raises(UserError, match=f"lacks {one}"):
        load_backbone(library, name, path, 7, arguments)


@pytest.mark.parametrize("name", ["dpn48b", "resnetv2_50x1_bit"])
def test_a_head_that_is_a_convolution_is_replaced_by_one(tmp_path: Path, name: str) -> None:
    state = load_backbone("timm", name, "random", 7).model.state_dict()
    model, fits, _ = load_backbone("timm", name, str(written(tmp_path / "w.safetensors", state)), 3)
    assert not fits
    head = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}
    reader = {key.rpartition(".")[0] for key in head}
    assert reader in ({"classifier"}, {"head.fc"})
    assert model.state_dict()[f"{reader.pop()}.weight"].shape[::2] == (3, 1)


def test_without_transformers_its_networks_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError) as refused:
        load_backbone("transformers", "somebody/net", "random", 5)
    assert "pip install 'salve[transformers]'" in one_sentence(refused)
    monkeypatch.setattr(inputs, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'salve\[transformers\]'"):
        inputs._check_name("transformers", "somebody/net")


# -- the libraries' own weights


def test_torchvisions_weights_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(UserError) as refused:
        load_backbone("torchvision", "resnet18", "imagenet", 5)
    assert all(part in one_sentence(refused) for part in ("resnet18", "Name or service", "backbone.weights", "random"))


def test_timms_weights_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE, which all tests run under, makes the hub refuse as it does without a network."""
    with pytest.raises(UserError) as refused:
        load_backbone("timm", "resnet10t", "imagenet", 5)
    assert all(part in one_sentence(refused) for part in ("resnet10t", "backbone.weights", "random"))


def test_torchvisions_weights_once_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnet18().state_dict()
    asked: list[str] = []

    def download(url: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    model: Any
    model, fits, _ = load_backbone("torchvision", "resnet18", "imagenet", 5)
    assert asked == [ResNet18_Weights.DEFAULT.url]
    assert not fits
    assert model.fc.out_features == 5
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if not key.startswith("fc."))
    model, fits, _ = load_backbone("torchvision", "resnet18", "imagenet", 1000)
    assert not fits  # as many classes, but not the same ones
    assert not torch.equal(model.fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("name", "arguments", "head"),
    [("resnet10t", {}, "fc."), ("vit_small_patch14_dinov2", {"depth": 1}, "head.")],
    ids=["with a head", "without a head"],
)
def test_timms_weights_once_downloaded(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], head: str
) -> None:
    state = timm.create_model(name, **arguments).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    model: Any
    model, fits, _ = load_backbone("timm", name, "imagenet", 5, arguments)
    assert not fits
    assert model.get_classifier().out_features == 5
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if not key.startswith(head))
